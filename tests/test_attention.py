"""Every way to compute attention gives the same outputs and gradients."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jepa_vl import sharding
from jepa_vl.model import attention, layers


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


@pytest.mark.parametrize("kind", ["none", "keys", "packed"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_few_queries_read_what_they_would_among_all(kind, causal):
  """Also where what lies behind `length` is padding."""
  qkv, mask, where = draw(19), masks(19)[kind], jnp.array([[0, 7], [18, 3]])
  select = lambda x: jnp.take_along_axis(x, where[..., None], axis=1)
  rows = lambda x: x.reshape(*x.shape[:2], -1)

  def read(qkv, length=19):
    q, k, v = attention.parts(qkv)
    visible = attention.visible(qkv.shape[:2], mask, causal, length, select)
    return rows(attention.read(select(rows(q)).reshape(2, 2, 2, 16), k, v, visible))

  expected = lambda qkv: select(rows(attention.xla(qkv, mask, causal, 19)))
  (out, pull), (out2, pull2) = (jax.vjp(f, qkv) for f in (read, expected))
  np.testing.assert_allclose(out, out2, atol=2e-5)
  grad = jax.random.normal(jax.random.key(1), out.shape)
  np.testing.assert_allclose(pull(grad)[0], pull2(grad)[0], atol=2e-5)
  if not causal:
    changed = qkv.at[:, 15:, 1:].set(7.0)
    where = where.at[1, 0].set(14)
    np.testing.assert_array_equal(read(qkv, 15), read(changed, 15))


@pytest.mark.parametrize("implementation", ["short", "pallas"])
def test_biases_that_are_left_out_change_nothing(implementation):
  """Keys have none and values' comes behind the attention; gradients are those of all in place."""
  init = jax.nn.initializers.normal(0.5)
  ours = layers.Attention(2, True, 9, implementation, init, init, jnp.float32)
  x = jax.random.normal(jax.random.key(0), (3, 9, 32))
  params = ours.init(jax.random.key(1), x, None)["params"]
  params = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(jax.random.key(2), p.shape), params)

  def theirs(params, x):
    qkv = jnp.einsum("blw,wphk->blphk", x, params["qkv"]["kernel"]) + params["qkv"]["bias"]
    x = attention.xla(qkv, None, True, 9)
    return jnp.einsum("blhk,hkw->blw", x, params["out"]["kernel"]) + params["out"]["bias"]

  given = lambda params, x: attention.with_bias(*ours.apply({"params": params}, x, None))
  found = []
  for f in (given, theirs):
    value = lambda params, x, f=f: (jnp.sum(jnp.sin(f(params, x))), f(params, x))
    grads, out = jax.jit(jax.grad(value, (0, 1), has_aux=True))(params, x)
    found.append((out, grads))
  near = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(b).max()))
  jax.tree.map(near, *found)


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
