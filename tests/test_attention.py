"""Every way to compute attention gives the same outputs and gradients."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jepa_vl import sharding
from jepa_vl.model import attention


def draw(L, dtype=jnp.float32, seed=0):
  """qkv (2, L, 3, 2, 16) whose scores have a deviation of about 4: far from uniform attention."""
  return 2 * jax.random.normal(jax.random.key(seed), (2, L, 3, 2, 16), dtype)


def masks(L):
  packed = jnp.arange(L) >= (jnp.arange(L) // 5 * 5)[:, None]  # keys of captions of 5 tokens
  return {
    "none": None,
    "keys": (jnp.arange(L) < jnp.array([[L - 3], [L]]))[:, None, None],
    "packed": jnp.broadcast_to(packed, (2, 1, L, L)),
  }


def outputs_and_gradient(implementation, qkv, mask, causal):
  """The output, and the gradient of a random projection of it, float32."""

  def value(qkv):
    out = attention.attend(qkv, mask, causal=causal, implementation=implementation)
    weight = jax.random.normal(jax.random.key(1), out.shape)
    return jnp.sum(weight * out.astype(jnp.float32)), out

  grad, out = jax.grad(value, has_aux=True)(qkv)
  return [np.asarray(x, np.float32) for x in (out, grad)]


@pytest.mark.parametrize("kind", ["none", "keys", "packed"])
@pytest.mark.parametrize("causal", [False, True])
def test_short_is_xla(kind, causal):
  qkv, mask = draw(19), masks(19)[kind]
  ours, theirs = (outputs_and_gradient(name, qkv, mask, causal) for name in ("short", "xla"))
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max())


def test_short_in_float64_numpy():
  """Softmax and its products as the definition reads."""
  qkv = np.asarray(draw(7), np.float64)
  q, k, v = np.moveaxis(qkv, 2, 0)
  scores = np.einsum("blhk,bmhk->bhlm", q, k) / 4
  weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
  expected = np.einsum("bhlm,bmhk->blhk", weights, v)
  found = attention.attend(
    jnp.asarray(qkv, jnp.float32), None, causal=False, implementation="short"
  )
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_large_scores_do_not_overflow():
  out, grad = outputs_and_gradient("short", 100 * draw(9), None, True)
  assert np.isfinite(out).all() and np.isfinite(grad).all()


def test_bfloat16_is_as_near_as_xla():
  exact = outputs_and_gradient("xla", draw(33, jnp.bfloat16).astype(jnp.float32), None, True)
  error = {}
  for name in ("short", "xla"):
    found = outputs_and_gradient(name, draw(33, jnp.bfloat16), None, True)
    error[name] = [np.abs(a - b).mean() for a, b in zip(found, exact, strict=True)]
  assert all(a < 1.2 * b for a, b in zip(error["short"], error["xla"], strict=True)), error


def test_nothing_comes_from_later_tokens():
  gradient = jax.grad(
    lambda x: attention.attend(x, None, causal=True, implementation="short")[:, 3].sum()
  )(draw(8))
  assert np.abs(gradient[:, :4]).max() > 0 and np.abs(gradient[:, 4:]).max() == 0


def test_unknown_implementation():
  with pytest.raises(ValueError, match="model.attention must be one of auto, short, xla, pallas"):
    attention.attend(draw(3), None, causal=False, implementation="flash")


def test_auto_takes_kernels_where_they_are_for_it(monkeypatch):
  gpu = lambda capability, kind="NVIDIA H200": types.SimpleNamespace(
    device_kind=kind, compute_capability=capability
  )

  def choose(device, dtype=jnp.bfloat16, name="auto", lengths=(197, 77), size=64, masked=False):
    return attention.choose(name, dtype, device, lengths, size, masked)

  assert choose(gpu("9.0")) == "pallas"  # here only compiled for
  assert choose(jax.devices()[0]) == choose(None) == "short"
  assert choose(gpu("7.5")) == choose(gpu("9.0"), jnp.float32) == "short"
  assert choose(gpu("9.0", "AMD Instinct MI300X")) == "short"
  assert choose(gpu("9.0"), name="xla") == "xla"
  others = {"lengths": (785, 77)}, {"lengths": (197, 12)}, {"size": 80}, {"masked": True}
  assert {choose(gpu("9.0"), **what) for what in others} == {"short"}  # no cuDNN to ask
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert {choose(gpu("9.0"), **what) for what in others} == {"cudnn"}


def test_each_gpu_settles_its_own_rows():
  """Of the whole array the compiler would make a copy on every device, ten a layer; and a gradient
  that all devices of `tensor` hold would be added up."""
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  rows = NamedSharding(mesh, P(sharding.BATCH))
  x = jax.ShapeDtypeStruct((16, 5, 64), jnp.bfloat16, sharding=rows)
  with jax.set_mesh(mesh):
    for f in (attention.settle, lambda x: jax.vjp(attention.settle, x)[1](x)[0]):
      program = jax.jit(f).trace(x).lower(lowering_platforms=("cuda",)).as_text()
      lines = [line for line in program.splitlines() if "LayoutConstraint" in line]
      assert lines and all("tensor<4x5x64xbf16>" in line for line in lines)
      assert "all_reduce" not in program
