"""CLIP and SigLIP against float64 NumPy; the same numbers in every chunk and on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jepa_vl import sharding
from jepa_vl.objectives import contrastive

B, D = 48, 12
DEVICES = [1, 8]


@pytest.fixture
def out():
  rng = np.random.default_rng(0)
  z = lambda: jnp.asarray(rng.normal(size=(B, D)), jnp.float32)
  return {"z_img": z(), "z_txt": z(), "log_scale": jnp.float32(2.0), "bias": jnp.float32(-3.0)}


def cosines(out):
  a, b = (np.asarray(out[k], np.float64) for k in ("z_img", "z_txt"))
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  return unit(a) @ unit(b).T


def value_and_grads(objective, out, devices):
  """Sum of the terms and its gradient, the rows split over so many devices."""
  mesh = sharding.make_mesh(data=devices, fsdp=1, tensor=1, devices=jax.devices()[:devices])
  put = lambda x: jax.device_put(x, NamedSharding(mesh, P("data") if x.ndim else P()))
  loss = lambda out: sum(objective(out, None).values())
  with jax.set_mesh(mesh):
    return jax.device_get(jax.jit(jax.value_and_grad(loss))(jax.tree.map(put, out)))


@pytest.mark.parametrize("devices", DEVICES)
def test_clip_is_the_symmetric_cross_entropy(out, devices):
  logits = np.exp(2.0) * cosines(out)
  log_p = lambda axis: logits - np.log(np.exp(logits).sum(axis=axis, keepdims=True))
  expected = -np.mean(np.diag(log_p(1))) - np.mean(np.diag(log_p(0)))
  found, _ = value_and_grads(lambda o, r: contrastive.clip(o, r, scale_max=100.0), out, devices)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("chunk_size", [0, 1, 5, 16, 47, 1000])
def test_siglip_is_the_sum_over_all_pairs(out, chunk_size, devices):
  logits = np.exp(2.0) * cosines(out) - 3.0
  sign = 2 * np.eye(B) - 1
  expected = np.log1p(np.exp(-sign * logits)).sum() / B
  objective = lambda o, r: contrastive.siglip(o, r, chunk_size=chunk_size)
  found, grads = value_and_grads(objective, out, devices)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  _, plain = value_and_grads(lambda o, r: contrastive.siglip(o, r, chunk_size=0), out, 1)
  for name, grad in plain.items():
    np.testing.assert_allclose(grads[name], grad, rtol=1e-5, atol=1e-6, err_msg=name)


def test_clip_on_eight_devices_is_clip_on_one(out):
  objective = lambda o, r: contrastive.clip(o, r, scale_max=100.0)
  (one, grads), (eight, grads8) = (value_and_grads(objective, out, n) for n in DEVICES)
  np.testing.assert_allclose(eight, one, rtol=1e-6)
  del grads["bias"], grads8["bias"]
  for name, grad in grads.items():
    assert np.abs(grad).max() > 0
    np.testing.assert_allclose(grads8[name], grad, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_large_logit_is_not_rounded_away(out):
  """A matched pair far on the right side still has its small loss, to float32's last digits."""
  out |= {"z_img": jnp.eye(D), "z_txt": jnp.eye(D)}
  out |= {"log_scale": jnp.log(30.0), "bias": jnp.float32(-15)}
  found = contrastive.siglip(out, None, chunk_size=4)["sigmoid"]
  np.testing.assert_allclose(found, D * np.log1p(np.exp(-15.0)), rtol=1e-5)


def test_the_scale_is_held_at_its_most_and_finds_its_way_back(out):
  objective = lambda o: sum(contrastive.clip(o, None, scale_max=10.0).values())
  at = lambda scale: out | {"log_scale": jnp.log(jnp.float32(scale))}
  assert objective(at(50.0)) == objective(at(10.0)) != objective(at(9.0))
  # Random pairs: a lower scale is better, so the gradient leads down from above the limit too.
  above, there = (jax.grad(objective)(at(scale))["log_scale"] for scale in (50.0, 10.0))
  assert above == there > 0
  aligned = at(50.0) | {"z_txt": out["z_img"]}  # here a higher one is: nothing leads further up
  assert jax.grad(objective)(aligned)["log_scale"] == 0
  assert jax.grad(objective)(aligned | {"log_scale": jnp.log(jnp.float32(9.0))})["log_scale"] < 0


def test_no_device_holds_all_pairs():
  """The backward pass of SigLIP keeps rows x chunk, not rows x B."""
  rows, width = 2048, 16
  out = {k: jax.ShapeDtypeStruct((rows, width), jnp.float32) for k in ("z_img", "z_txt")}
  out |= {k: jax.ShapeDtypeStruct((), jnp.float32) for k in ("log_scale", "bias")}

  def temporary(chunk_size):
    loss = lambda out: contrastive.siglip(out, None, chunk_size=chunk_size)["sigmoid"]
    return jax.jit(jax.grad(loss)).lower(out).compile().memory_analysis().temp_size_in_bytes

  pairs = 4 * rows * rows
  assert temporary(0) >= pairs
  assert temporary(128) < pairs / 4
