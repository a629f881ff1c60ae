"""SIGReg against float64 NumPy, against inputs that are not Gaussian, and in bounded memory."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jepa_vl import sharding
from jepa_vl.objectives import sigreg as module
from jepa_vl.objectives.sigreg import sigreg

CFG = {"num_slices": 128, "knots": 17, "t_max": 3.0, "group_size": 0, "scale_rows": 256}


def reference(rng, z, *, num_slices, knots, t_max, group_size, scale_rows):
  """METHOD's formulas in float64 with the same directions; returns the value and d value / d z."""
  A = np.asarray(module._directions(rng, z.shape[1], num_slices), np.float64)
  A = A.transpose(1, 0, 2).reshape(z.shape[1], -1)
  z = np.asarray(z, np.float64)
  t = t_max * np.arange(knots) / (knots - 1)
  phi = np.exp(-(t**2) / 2)
  w = np.full(knots, 2 * (t[1] - t[0]))
  w[0] = w[-1] = t[1] - t[0]
  value, grad = 0.0, np.zeros_like(z)
  groups = np.split(np.arange(len(z)), len(z) // (group_size or len(z)))
  for rows in groups:
    xt = (z[rows] @ A)[..., None] * t  # (g, M, T)
    real, imaginary = np.cos(xt).mean(0) - phi, np.sin(xt).mean(0)
    value += scale_rows * ((real**2 + imaginary**2) @ (w * phi)).mean() / len(groups)
    inner = 2 * (imaginary * np.cos(xt) - real * np.sin(xt)) * t * (w * phi)
    grad[rows] = scale_rows * inner.sum(-1) @ A.T / (len(rows) * A.shape[1] * len(groups))
  return value, grad


@pytest.mark.parametrize("change", [
  {}, {"group_size": 16}, {"scale_rows": 64}, {"knots": 9, "t_max": 5.0}, {"num_slices": 96},
])
@pytest.mark.parametrize("kind", ["normal", "shifted", "collapsed"])
def test_value_and_gradient_equal_float64(change, kind):
  cfg = CFG | change
  z = jax.random.normal(jax.random.key(1), (64, 24))
  z = {"normal": z, "shifted": 1.7 * z + 0.5, "collapsed": 0.01 * z + 1.0}[kind]
  rng = jax.random.key(2)
  value, grad = jax.jit(jax.value_and_grad(lambda z: sigreg(rng, z, **cfg)))(z)
  expected, expected_grad = reference(rng, z, **cfg)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  error = np.linalg.norm(grad - expected_grad) / np.linalg.norm(expected_grad)
  assert error < 1e-5


def test_gradient_equals_automatic_differentiation():
  z = jax.random.normal(jax.random.key(1), (32, 8)) * 1.3
  A = module._directions(jax.random.key(2), 8, 64)
  plain = lambda z: module._scan_chunks(z[None], A, 17, 3.0, with_gradient=False)[0]
  ours = lambda z: module._statistic(z[None], A, 17, 3.0)
  np.testing.assert_allclose(jax.grad(ours)(z), jax.grad(plain)(z), rtol=1e-4, atol=1e-8)


def test_joined_chunks_give_the_same_numbers():
  """Many chunks are taken at once where that is faster, of the same directions."""
  z = jax.random.normal(jax.random.key(1), (2, 32, 8))
  A = module._directions(jax.random.key(2), 8, 512)
  scan = lambda A: module._scan(z, A, 17, 3.0, True)
  expected = scan(A)
  for budget, chunks in ((64 * 64 * 2, 4), (64 * 64 * 3, 4), (2**20, 1), (1, 8)):
    joined = module._joined(A, 64, budget)
    assert len(joined) == chunks
    for a, b in zip(scan(joined), expected, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)


def test_gradient_is_scaled_by_the_cotangent():
  z = jax.random.normal(jax.random.key(1), (32, 8))
  f = lambda z: sigreg(jax.random.key(0), z, **CFG)
  np.testing.assert_allclose(jax.grad(lambda z: 3 * f(z))(z), 3 * jax.grad(f)(z), rtol=1e-6)


def test_gaussian_scores_lower_than_anything_else():
  """Collapsed, shifted, scaled and low-rank embeddings are each told from a Gaussian."""
  z = jax.random.normal(jax.random.key(0), (512, 16))
  score = lambda z: float(sigreg(jax.random.key(1), z, **CFG))
  gaussian = score(z)
  worse = {
    "collapsed to a point": jnp.zeros_like(z) + 0.1,
    "collapsed to a line": z[:, :1] * jnp.ones((1, 16)) / 4,
    "half the dimensions": z * (jnp.arange(16) < 8),
    "shifted": z + 0.3,
    "too wide": 1.5 * z,
    "too narrow": 0.5 * z,
    "uniform": (jax.random.uniform(jax.random.key(2), (512, 1)) - 0.5) * 12**0.5 * jnp.ones(16) / 4,
  }
  for name, other in worse.items():
    assert score(other) > 2 * gaussian, name


def test_expected_value_on_a_gaussian():
  """E[S] = n / B sum_k w_k phi_k (1 - phi_k^2): the multiplier and the rows are two things."""
  t, phi, weight = module._quadrature(17, 3.0)
  expected = 256 / 512 * np.sum(weight * (1 - phi**2))
  z = jax.random.normal(jax.random.key(3), (32, 512, 64))  # one draw scatters by a fifth
  value = sigreg(jax.random.key(4), z, **{**CFG, "num_slices": 512})
  np.testing.assert_allclose(value, expected, rtol=0.1)


def test_groups_are_averaged():
  z = jax.random.normal(jax.random.key(1), (64, 8))
  rng = jax.random.key(2)
  halves = [sigreg(rng, half, **CFG) for half in (z[:32], z[32:])]
  grouped = sigreg(rng, z, **{**CFG, "group_size": 32})
  np.testing.assert_allclose(grouped, np.mean(halves), rtol=1e-6)


def test_views_are_averaged():
  views = jax.random.normal(jax.random.key(1), (3, 32, 8))
  rng = jax.random.key(2)
  each = [sigreg(rng, view, **CFG) for view in views]
  np.testing.assert_allclose(sigreg(rng, views, **CFG), np.mean(each), rtol=1e-6)


def test_group_that_does_not_divide_is_named():
  with pytest.raises(ValueError, match="group_size=24 does not divide the 64 rows"):
    sigreg(jax.random.key(0), jnp.zeros((64, 4)), **{**CFG, "group_size": 24})


@pytest.mark.parametrize("views", [(), (3,)])
def test_groups_on_their_own_devices_need_no_communication_in_the_loop(views):
  """One sum of the groups' values at the end is all that the eight devices exchange."""
  mesh = sharding.make_mesh(data=8, fsdp=1, tensor=1)
  rows = NamedSharding(mesh, P(*(None for _ in views), sharding.BATCH))
  z = jax.ShapeDtypeStruct((*views, 64, 24), jnp.float32, sharding=rows)
  grad = jax.value_and_grad(lambda z: sigreg(jax.random.key(0), z, **CFG | {"group_size": 8}))
  text = jax.jit(grad, out_shardings=(None, rows)).lower(z).compile().as_text()
  in_loops, _, after = text.partition("\nENTRY ")
  collectives = lambda hlo: re.findall(r" ((?:all|reduce-s|collective)[\w-]+)\(", hlo)
  assert "while" in after and not collectives(in_loops)
  assert collectives(after) == ["all-reduce"]


def test_temporary_memory_is_bounded():
  """B = M = 4096 with the gradient: under 64 MiB, where (B, M, T) alone would take 1.1 GiB."""
  f = lambda rng, z: sigreg(rng, z, **{**CFG, "num_slices": 4096})
  z = jax.ShapeDtypeStruct((4096, 256), jnp.float32)
  rng = jax.eval_shape(lambda: jax.random.key(0))
  compiled = jax.jit(jax.value_and_grad(f, argnums=1)).lower(rng, z).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 64 * 2**20


def test_cos_and_sin_are_computed_once_for_a_chunk():
  """XLA on CPUs would fuse them into all 4 (T - 1) arrays that follow: twice the time."""
  grad = jax.value_and_grad(lambda z: sigreg(jax.random.key(0), z, **CFG))
  text = jax.jit(grad).lower(jax.ShapeDtypeStruct((64, 24), jnp.float32)).compile().as_text()
  for name in ("cosine", "sine"):
    assert 1 <= text.count(f" {name}(") <= 2, name
