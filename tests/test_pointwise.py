"""LayerNorm and GELU, and their kernels for GPUs interpreted, against Flax's."""

import math
import re
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jepa_vl import sharding
from jepa_vl.model import pointwise, pointwise_gpu

EACH = pytest.mark.parametrize("implementation", ["xla", "pallas"])


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
  """Of several steps each, not all of as many."""
  monkeypatch.setattr(pointwise_gpu, "PROGRAMS", 3)


@EACH
@pytest.mark.parametrize("width", [192, 256])  # in three pieces of four rows, and in one of one
@pytest.mark.parametrize("with_branch", [False, True])
def test_layer_norm_is_flaxs(implementation, width, with_branch):
  """Also of rows in several programs of several steps, and with a gradient from around the norm.

  What is added before has its gradient too, and so has the bias in it.
  """
  draw = lambda i: jax.random.normal(jax.random.key(i), (8, 5, width))
  x, grads = 3 + 2 * draw(0), (draw(1), draw(2))
  ours, theirs = pointwise.LayerNorm(1e-5, implementation), nn.LayerNorm(epsilon=1e-5)
  stopped = jax.lax.stop_gradient

  def f(variables, x, branch, bias):
    return ours.apply(variables, x, (branch + stopped(bias), bias) if with_branch else None)

  def expected(variables, x, branch, bias):
    x = x + branch + bias if with_branch else x
    return x, theirs.apply(variables, x)

  variables = theirs.init(jax.random.key(0), x)
  variables = jax.tree.map(lambda p: p + jnp.linspace(0, 1, width), variables)
  args = variables, x, draw(3), jnp.linspace(-1, 1, width)
  found = [(y, *pull(grads)) for y, pull in (jax.vjp(f, *args) for f in (f, expected))]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *found)


@EACH
@pytest.mark.parametrize("tanh", [False, True])
def test_gelu_is_flaxs(implementation, tanh):
  """Its bias has the gradient that it would have where it was added."""
  x = jnp.linspace(-8, 8, 16 * 4 * 128).reshape(16, 4, 128)
  bias, grad = jnp.linspace(-1, 1, 128), jax.random.normal(jax.random.key(0), x.shape)
  stopped = jax.lax.stop_gradient
  found = [jax.vjp(f, x, bias) for f in (
    lambda x, bias: pointwise.gelu(x + stopped(bias), bias, tanh, implementation),
    lambda x, bias: nn.gelu(x + bias, approximate=tanh),
  )]  # fmt: skip
  for a, b in zip(*((y, *pull(grad)) for y, pull in found), strict=True):
    np.testing.assert_allclose(a, b, atol=8e-6 * max(1, np.abs(b).max()))


@EACH
def test_in_bfloat16_sums_are_added_in_float32(implementation):
  x = jnp.ones((4096, 1, 64), jnp.bfloat16)
  norm = lambda bias: pointwise.layer_norm(x, None, jnp.ones(64), bias, 1e-5, implementation)[1]
  small = lambda bias: jnp.sum(norm(bias) / 16)
  np.testing.assert_array_equal(jax.grad(small)(jnp.zeros(64)), 256)


@EACH
def test_each_device_has_its_rows(implementation):
  x = jax.random.normal(jax.random.key(0), (16, 8, 128))
  weights = jax.random.normal(jax.random.key(1), x.shape)

  def loss(x, scale, bias):
    branch = jnp.sin(x) + jax.lax.stop_gradient(bias), bias
    x, y = pointwise.layer_norm(x, branch, scale, bias, 1e-5, implementation)
    y = pointwise.gelu(y + jax.lax.stop_gradient(bias), bias, False, implementation)
    return jnp.sum(weights * (x + y))

  args = x, jnp.linspace(0.5, 1, 128), jnp.linspace(-1, 1, 128)
  expected = jax.grad(loss, (0, 1, 2))(*args)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  with jax.set_mesh(mesh):
    x = jax.device_put(x, NamedSharding(mesh, P(sharding.BATCH)))
    found = jax.jit(jax.grad(loss, (0, 1, 2)))(x, *args[1:])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5), found, expected)


def test_a_step_has_what_a_warp_loads_and_a_threads_registers_hold():
  tiles = {width: pointwise_gpu._tile(width) for width in (64, 192, 384, 576, 768, 1024, 1152)}
  assert tiles == {
    64: (4, 1), 192: (4, 1), 384: (2, 1), 576: (1, 1), 768: (1, 1), 1024: (1, 1), 1152: (1, 2)
  }  # fmt: skip
  for width in range(64, 2049, 64):  # else rows would be left out
    assert pointwise_gpu.ROWS % pointwise_gpu._tile(width)[0] == 0
  assert pointwise_gpu.ROWS % pointwise_gpu.PAIR == 0


def test_the_polynomial_is_as_near_to_the_normal_distribution_as_is_said():
  x = np.linspace(-8, 8, 100001)
  phi = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])
  odds = np.polynomial.Polynomial(pointwise_gpu._NORMAL)(x**2)
  ours = 1 / (1 + 2.0 ** (-x * odds))
  np.testing.assert_allclose(ours, phi, atol=1.1e-7)
  np.testing.assert_allclose(x * ours, x * phi, atol=8e-8)
  near = np.abs(x) < 4
  np.testing.assert_allclose(ours[near], phi[near], rtol=3e-4)


def test_the_gpu_kernels_can_be_made_without_a_gpu():
  """Each is there, with the instructions that are not interpreted."""

  def f(x, bias):
    x, y = pointwise.layer_norm(x, (x, bias), bias, bias, 1e-5, "pallas")
    return sum(jnp.sum(x + pointwise.gelu(y, bias, tanh, "pallas")) for tanh in (False, True))

  x, bias = jax.ShapeDtypeStruct((2, 8, 256), jnp.bfloat16), jax.ShapeDtypeStruct((256,), "float32")
  lowered = jax.jit(jax.value_and_grad(f)).trace(x, bias).lower(lowering_platforms=("cuda",))
  program = lowered.as_text()
  for kernel in ("norm", "norm_gradient", "gelu", "gelu_gradient"):
    assert re.search(f'name = "{kernel}"', program), kernel


def test_auto_takes_the_kernels_where_triton_does():
  gpu = lambda capability: types.SimpleNamespace(
    device_kind="NVIDIA T4", compute_capability=capability
  )
  choose = lambda device, dtype=jnp.bfloat16: pointwise.choose("auto", dtype, device)
  assert choose(gpu("8.0")) == "pallas"
  for other in (gpu("7.5"), jax.devices()[0], None):
    assert choose(other) == "xla"
  assert choose(gpu("9.0"), jnp.float32) == "xla"


def test_unknown_implementations_are_named():
  with pytest.raises(ValueError, match="model.pointwise must be one of auto, xla, pallas, got 'x'"):
    pointwise.choose("x", jnp.float32, None)
