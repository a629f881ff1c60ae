"""The kernels for TPUs and GPUs, interpreted, and what cuDNN is given: XLA's numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_model import build, example, init, loss_and_grads

from jepa_vl import sharding
from jepa_vl.model import attention, attention_gpu, two_tower
from jepa_vl.model.gpt import own_caption


def qkv_of(rows, length, heads, size, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(0), (rows, length, 3, heads, size)).astype(dtype)


def value_and_grad(qkv, implementation, causal, mask=None):
  """The attention's result, and the gradient of a function of it."""

  def f(qkv):
    out = attention.attend(qkv, mask, causal=causal, implementation=implementation)
    return jnp.sum(jnp.sin(3 * out.astype(jnp.float32))), out

  (_, out), grad = jax.jit(jax.value_and_grad(f, has_aux=True))(qkv)
  return np.asarray(out, np.float32), np.asarray(grad, np.float32)


@pytest.mark.parametrize(("rows", "length", "heads", "size", "causal"), [
  (2, 197, 2, 64, False),  # ViT-B/16's tokens
  (6, 77, 3, 64, True),  # captions, three to a program; heads that fill no whole tile
  (5, 37, 1, 80, False),  # a local view's, and the largest size's heads
  (1, 128, 2, 32, True),
  (3, 1, 1, 8, False),
])
def test_the_kernels_equal_xla(rows, length, heads, size, causal):
  """Also where what lies behind a sequence in memory is not a number, as it is interpreted."""
  qkv = qkv_of(rows, length, heads, size)
  expected, found = (value_and_grad(qkv, name, causal) for name in ("xla", "pallas"))
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_bfloat16_is_as_near_to_float32_as_xlas_own():
  qkv = qkv_of(4, 77, 2, 64, jnp.bfloat16)
  exact = value_and_grad(qkv.astype(jnp.float32), "xla", True)
  error = lambda name: [
    np.abs(a - b).mean() for a, b in zip(value_and_grad(qkv, name, True), exact, strict=True)
  ]
  for ours, theirs in zip(error("pallas"), error("xla"), strict=True):
    assert 0 < ours < 1.1 * theirs


@pytest.mark.parametrize(
  "sizes",
  [(2, 2, 2), *(pytest.param(x, marks=pytest.mark.slow) for x in [(8, 1, 1), (1, 1, 8)])],
  ids=str,
)
def test_each_device_runs_its_rows_and_heads(sizes):
  """Over `tensor` = 8 the heads do not divide: every device then has all of them."""
  qkv = qkv_of(8, 21, 4, 16)
  expected = value_and_grad(qkv, "pallas", True)
  mesh = sharding.make_mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
  heads = "tensor" if 4 % sizes[2] == 0 else None
  with jax.set_mesh(mesh):
    split = NamedSharding(mesh, P(sharding.BATCH, None, None, heads, None))
    found = value_and_grad(jax.device_put(qkv, split), "pallas", True)
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_masks_and_long_sequences_go_to_xla():
  mask = jnp.arange(9)[None, None, None] < jnp.array([4, 9])[:, None, None, None]
  for qkv, keys in ((qkv_of(2, 9, 2, 16), mask), (qkv_of(1, 600, 1, 8), None)):
    expected, found = (value_and_grad(qkv, name, True, keys) for name in ("xla", "pallas"))
    np.testing.assert_array_equal(found[0], expected[0])


@pytest.mark.slow
def test_towers_with_the_kernels(config):
  """Under rematerialisation too, which runs the forward kernel again."""
  model = build(config)
  other = build(config, **{"model.attention": "pallas", "model.remat": "dots"})
  variables, batch = init(model), example(model)
  (out, grads), (out2, grads2) = (loss_and_grads(m, variables, batch) for m in (model, other))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), out, out2)
  # of the size of 20: round-off that BatchNorm over eight rows amplifies
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-4), grads, grads2)


@pytest.mark.slow
def test_what_is_shown_of_the_inside_is_the_same(config):
  model = build(config)
  variables, images = init(model), example(model, rows=2)["image"]
  expected, found = (
    two_tower.look_inside(model.clone(attention=name), variables, images)
    for name in ("xla", "pallas")
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), expected, found)


@pytest.mark.parametrize("changes", [
  {}, {"text.readout": "last"}, pytest.param({"text.length": 12}, marks=pytest.mark.slow),
])  # fmt: skip
def test_what_cudnn_is_given(changes, config, monkeypatch):
  """A token behind an odd number of them, and three products for one, change no number; cuDNN's
  part itself is computed by XLA here."""
  monkeypatch.setitem(
    attention.IMPLEMENTATIONS, "cudnn", functools.partial(attention._cudnn, implementation="xla")
  )
  model, other = (
    build(config, **{"text.length": 11, "model.attention": name, **changes})
    for name in ("xla", "cudnn")
  )
  assert two_tower.image_tokens(model, model.image_size) % 2
  variables, batch = init(model), example(model)
  jax.tree.map(np.testing.assert_array_equal, init(other), variables)
  (out, grads), (out2, grads2) = (loss_and_grads(m, variables, batch) for m in (model, other))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), out, out2)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-4), grads, grads2)
  shown = (two_tower.look_inside(m, variables, batch["image"]) for m in (model, other))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *shown)


@pytest.mark.parametrize(("length", "causal", "packed"), [
  (197, False, False),  # three whole blocks and five rows more
  (77, True, False), (77, True, True), (64, True, False), (130, True, True), (37, False, False),
  (16, False, False),
])  # fmt: skip
def test_the_gpu_kernels_equal_xla(length, causal, packed):
  """Where the last block reaches back over rows of the one before, these count once."""
  qkv, bias = qkv_of(2, length, 2, 16), jax.random.normal(jax.random.key(2), (2, 16))
  grad = jax.random.normal(jax.random.key(1), (2, length, 2, 16))
  # Captions of 30 tokens in one row and of 7 in the other.
  first = own_caption(jnp.arange(length) % jnp.array([[30], [7]])) if packed else None
  mask = attention._of_pairs(first)
  stopped = jax.lax.stop_gradient(bias)
  to_queries = lambda x, bias: x.at[:, :, 0].add(bias)
  results = []
  for f in (
    lambda x, bias: attention.xla(to_queries(x, bias), mask, causal, length),
    lambda x, bias: attention_gpu.attention(to_queries(x, stopped), bias, first, causal, True),
  ):
    out, pull = jax.vjp(jax.jit(f), qkv, bias)
    results.append((out, *pull(grad)))
  for a, b in zip(*reversed(results), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_the_queries_bias_has_its_gradient_without_a_gpu_too():
  """On a mesh as well, and where the kernels leave it to XLA."""
  qkv, bias = qkv_of(8, 9, 2, 16), jax.random.normal(jax.random.key(2), (2, 16))
  mask = jnp.broadcast_to(jnp.arange(9) < 5, (8, 1, 1, 9))

  def grads(name, mask, apart=True):
    def f(bias):
      x = qkv.at[:, :, 0].add(jax.lax.stop_gradient(bias) if apart else bias)
      extra = {"bias": bias} if apart else {}
      out = attention.attend(x, mask, causal=True, implementation=name, **extra)
      return jnp.sum(jnp.sin(3 * out))

    return jax.jit(jax.grad(f))(bias)

  for kind in (None, mask, own_caption(jnp.arange(9) % jnp.full((8, 1), 4))):
    expected = grads("xla", kind, apart=False)
    for name in ("xla", "pallas"):
      np.testing.assert_allclose(grads(name, kind), expected, atol=1e-4)
    with jax.set_mesh(sharding.make_mesh(data=4, fsdp=1, tensor=2)):
      np.testing.assert_allclose(grads("pallas", kind), expected, atol=1e-4)


@pytest.mark.parametrize("length", [77, 197])
def test_the_gpu_kernels_can_be_made_without_a_gpu(length):
  """As what is interpreted has other instructions."""
  qkv = jax.ShapeDtypeStruct((2, length, 3, 2, 64), jnp.bfloat16)
  f = lambda x: attention.attend(x, None, causal=False, implementation="pallas").sum()
  program = jax.jit(jax.grad(f)).trace(qkv).lower(lowering_platforms=("cuda",)).as_text()
  assert program.count("triton") >= 2


def test_what_the_gpu_kernels_take():
  shape = lambda L, K, dtype: jax.ShapeDtypeStruct((2, L, 3, 4, K), dtype)
  assert attention_gpu.takes(shape(197, 64, jnp.bfloat16))
  assert not attention_gpu.takes(shape(15, 64, jnp.bfloat16))
  assert not attention_gpu.takes(shape(197, 80, jnp.bfloat16))  # ViT-H's heads
  assert not attention_gpu.takes(shape(197, 64, jnp.float32))


def test_the_gpu_kernels_in_bfloat16_are_as_near_to_float32_as_xlas_own():
  qkv = qkv_of(2, 77, 2, 64, jnp.bfloat16)
  bias = jnp.zeros(qkv.shape[3:])
  exact = attention.xla(qkv.astype(jnp.float32), None, True, 77)
  error = lambda out: np.abs(np.asarray(out, np.float32) - exact).mean()
  ours = error(jax.jit(lambda x: attention_gpu.attention(x, bias, None, True, True))(qkv))
  assert 0 < ours < 1.1 * error(attention.xla(qkv, None, True, 77))
