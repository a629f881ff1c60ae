"""The GPU kernels as compiled for an A100 and an H200, run by `ptx_machine`, against float64."""

import math
import re

import jax
import ml_dtypes
import numpy as np
import pytest
import scipy.special

from jepa_vl import sharding
from jepa_vl.aot import topologies
from jepa_vl.model import attention_gpu, pointwise_gpu
from tests import ptx_machine, test_aot

BF16, F32 = ml_dtypes.bfloat16, np.float32
pytestmark = pytest.mark.slow


@pytest.fixture
def kernels(tmp_path):
  """kernels(topology, f, *shapes): of f's kernels by name, what runs it on inputs and outputs."""
  test_aot.needs("h100")

  def compiled(topology, f, *shapes):
    devices = topologies.get(topology).devices
    mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=devices)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = [jax.ShapeDtypeStruct(*s, sharding=split) for s in shapes]
    with jax.set_mesh(mesh):
      lowered = jax.jit(f).lower(*shapes)
    dump = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    lowered.compile(compiler_options={
      "xla_dump_to": str(dump), "xla_gpu_dump_llvmir": True, "xla_dump_emitter_re": ".*",
      "xla_dump_hlo_pass_re": "NONE",
    })  # fmt: skip
    texts = [path.read_text() for path in dump.glob("*.ptx")]
    machines = [ptx_machine.Machine(text) for text in texts if ".entry" in text]
    return {m.entry: _with_grid(m, lowered.as_text()) for m in machines}

  return compiled


def _with_grid(machine, lowered):
  """The machine's run over the grid that its call in the program has."""
  calls = [c for c in lowered.splitlines() if f'name = "{machine.entry}"' in c]
  grid = [int(re.search(rf"grid_{axis} = (\d+)", calls[0])[1]) for axis in "xyz"] if calls else None
  return lambda inputs, outputs: machine(grid, inputs, outputs)


@pytest.fixture
def normal():
  rng = np.random.default_rng(0)
  return lambda *shape, dtype=BF16: rng.normal(0.3, 1.5, shape).astype(dtype)


@pytest.fixture
def few_programs(monkeypatch):
  """Of the backward passes: so that some have a step more than others."""
  monkeypatch.setattr(pointwise_gpu, "PROGRAMS", 33)
  return 33


def rounded(got, want):
  """Within rounding to bfloat16, of float64 and of what float32 makes of it near 0."""
  assert got.dtype == BF16
  np.testing.assert_allclose(np.float64(got), want, rtol=2**-8, atol=1e-5)


def close(parts, of):
  """Parts of sums over rows, (P, ..., W) float32."""
  got, want = parts.sum(axis=0, dtype=np.float64), of.sum(axis=0)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(of).sum(axis=0).max())


def gelu(x, tanh):
  """GELU of x and its derivative."""
  if not tanh:
    gate, bell = scipy.special.ndtr(x), np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return x * gate, gate + x * bell
  a, b = math.sqrt(2 / math.pi), 0.044715
  t = np.tanh(a * (x + b * x**3))
  return x * (1 + t) / 2, (1 + t) / 2 + x * (1 - t * t) * a * (1 + 3 * b * x * x) / 2


@pytest.mark.parametrize("tanh", [False, True], ids=["erf", "tanh"])
def test_gelu(kernels, normal, few_programs, tanh):
  N, F = 160, 512
  x, grad = normal(N, F), normal(N, F)
  x[0, :8] = 0, -0.0, 30, -30, 1e30, -1e30, np.inf, np.nan
  run = kernels("h200:1", lambda x: pointwise_gpu.gelu(x, tanh), ((N, F), BF16))["gelu"]
  (y,) = run([x], [((N, F), BF16)])
  want, slope = gelu(np.float64(x[1:]), tanh)
  assert y[0, 6] == np.inf and np.isnan(y[0, 7])
  np.testing.assert_allclose(np.float64(y[0, :6]), [0, 0, 30, 0, 1e30, 0], rtol=2**-8, atol=1e-30)
  rounded(y[1:], want)

  run = kernels(
    "h200:1", lambda x, g: pointwise_gpu.gelu_gradient(x, g, tanh), ((N, F), BF16), ((N, F), BF16)
  )["gelu_gradient"]
  x[0], slope = x[1], np.concatenate([slope[:1], slope])
  programs = 4 * few_programs * 256 // F
  dx, sums = run([x, grad], [((N, F), BF16), ((programs, F), F32)])
  want = slope * np.float64(grad)
  rounded(dx, want)
  close(sums, want)


@pytest.mark.parametrize(
  ("W", "added", "with_branch"),
  [(768, False, False), (768, True, True), (512, True, True), (384, True, True),
   (192, True, False)],
)  # fmt: skip
def test_norm(kernels, normal, few_programs, W, added, with_branch):
  N, eps = 160, 1e-5
  x, branch, grad, around = (normal(N, W) for _ in range(4))
  scale, bias = normal(W, dtype=F32), normal(W, dtype=F32)
  rows, row, each = ((N, W), BF16), ((W,), F32), ((N,), F32)
  given = [x, scale, bias, *([branch] if added else [])]
  run = kernels(
    "h200:1", lambda x, scale, bias, *added: pointwise_gpu.norm(x, scale, bias, eps, *added),
    *[rows, row, row, *([rows] if added else [])],
  )["norm"]  # fmt: skip
  *new, y, mean, share = run(given, [*([rows] if added else []), rows, each, each])
  if added:
    np.testing.assert_array_equal(new[0], x + branch)
    x = new[0]
  wide = np.float64(x)
  center, deviation = wide.mean(axis=1), np.sqrt(wide.var(axis=1) + eps)
  np.testing.assert_allclose(mean, center, atol=1e-6)
  np.testing.assert_allclose(share, 1 / deviation, rtol=1e-6)
  unit = (wide - center[:, None]) / deviation[:, None]
  rounded(y, unit * scale + bias)

  def backward(*arrays):
    return pointwise_gpu.norm_gradient(*arrays, with_branch)

  run = kernels("h200:1", backward, rows, each, each, row, rows, rows)["norm_gradient"]
  size, _ = pointwise_gpu._tile(W)
  count = 3 if with_branch else 2
  sums = (few_programs, count, W), F32
  dx, sums = run([x, mean, share, scale, grad, around], [rows, sums])
  grad = np.float64(grad)
  scaled = grad * scale
  along = lambda v: v.mean(axis=1, keepdims=True)
  want = (scaled - along(scaled) - unit * along(scaled * unit)) / deviation[:, None]
  want += np.float64(around)
  rounded(dx, want)
  close(sums, np.stack([grad * unit, grad, want][:count], axis=1))


@pytest.mark.parametrize(
  ("L", "causal", "packed", "kernel"),
  [(150, False, False, ""), (77, True, False, "_short"), (77, True, True, "_short")],
  ids=["image", "caption", "packed"],
)
def test_attention(kernels, normal, L, causal, packed, kernel):
  """Compiled for an A100: an H200's products of whole warp groups are not what the machine runs."""
  B, H, K = 2, 2, 32
  qkv, grad, bias = normal(B, L, 3, H, K), normal(B, L, H, K), np.zeros((H, K), F32)
  first = np.broadcast_to(np.where(np.arange(L) < 30, 0, 30), (B, L)).astype(np.int32)
  extra = [first] if packed else []

  def both(qkv, bias, grad, *first):
    f = lambda qkv, bias: attention_gpu.attention(qkv, bias, *(first or [None]), causal, False)
    y, pull = jax.vjp(f, qkv, bias)
    return y, pull(grad)

  shapes = [(x.shape, x.dtype) for x in (qkv, bias, grad, *extra)]
  run = kernels("a100:1", both, *shapes)
  out, total = run["attention_forward"]([qkv, *extra], [((B, L, H, K), BF16), ((B, H, L), F32)])
  own = np.sum(np.float32(grad) * np.float32(out), axis=-1).swapaxes(1, 2)
  dqkv, sums = run[f"attention_backward{kernel}"](
    [qkv, grad, total, own, *extra], [(qkv.shape, BF16), ((B, H, K), F32)]
  )
  want, wanted, logs = reference(np.float64(qkv), np.float64(grad), causal, extra)
  np.testing.assert_allclose(total, logs / math.log(2), atol=1e-4)
  np.testing.assert_allclose(np.float64(out), want, atol=0.01 * np.abs(want).max())
  np.testing.assert_allclose(np.float64(dqkv), wanted, atol=0.01 * np.abs(wanted).max())
  np.testing.assert_allclose(sums, wanted[:, :, 0].sum(axis=1), atol=0.02 * np.abs(wanted).max())


def reference(qkv, grad, causal, first):
  """Attention's output, its gradient and the logarithms of weights' sums, in float64."""
  L, K = qkv.shape[1], qkv.shape[-1]
  q, k, v = np.moveaxis(qkv, 2, 0)
  logits = np.einsum("bqhk,bshk->bhqs", q, k) / math.sqrt(K)
  seen = np.tril(np.ones((L, L), bool)) if causal else np.ones((L, L), bool)
  if first:
    seen = (seen & (np.arange(L) >= first[0][:, :, None]))[:, None]
  logits = np.where(seen, logits, -np.inf)
  logs = scipy.special.logsumexp(logits, axis=-1)
  weights = np.exp(logits - logs[..., None])
  out = np.einsum("bhqs,bshk->bqhk", weights, v)
  slope = np.einsum("bqhk,bshk->bhqs", grad, v)
  slope = weights * (slope - (slope * weights).sum(axis=-1, keepdims=True)) / math.sqrt(K)
  dq, dk = np.einsum("bhqs,bshk->bqhk", slope, k), np.einsum("bhqs,bqhk->bshk", slope, q)
  return out, np.stack([dq, dk, np.einsum("bhqs,bqhk->bshk", weights, grad)], axis=2), logs
