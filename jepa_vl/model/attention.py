"""Self-attention over short sequences, by name of its implementation."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jepa_vl import sharding
from jepa_vl.model import attention_tpu

# Up to here a sequence fits into the vector memory of a v5e, v5p or v6e at the width of any of our
# sizes; beyond, what is kept on the chip is better cut into blocks.
PALLAS_LENGTH = 512


def xla(qkv, mask, causal):
  """As XLA compiles it: the weights are an array of their own, (B, H, L, L) float32."""
  return _dot_product_attention(qkv, mask, causal, "xla")


def cudnn(qkv, mask, causal):
  """cuDNN's flash attention: NVIDIA GPUs, bfloat16, head dimension up to 128."""
  return _even(qkv, mask, causal, "cudnn")


def _even(qkv, mask, causal, implementation):
  """Attention over one token more where their number is odd, which JAX (0.10) refuses for cuDNN
  when it differentiates. No query sees that token."""
  B, L, *_ = qkv.shape
  if L % 2 == 0:
    return _dot_product_attention(qkv, mask, causal, implementation)
  behind = lambda x, axes: jnp.pad(x, [(0, int(axis in axes)) for axis in range(x.ndim)])
  lengths = None
  if mask is not None:
    mask = behind(mask, (2, 3) if mask.shape[2] == L else (3,))
  elif not causal:
    lengths = jnp.full(B, L, jnp.int32)
  return _dot_product_attention(behind(qkv, (1,)), mask, causal, implementation, lengths)[:, :L]


def pallas(qkv, mask, causal):
  """Kernels of our own for TPUs (`attention_tpu`), which keep the weights on the chip.

  Interpreted on CPUs, slowly; GPUs have none. Masks and long sequences go to `xla`.
  """
  if mask is not None or qkv.shape[1] > PALLAS_LENGTH:
    return xla(qkv, mask, causal)
  f = functools.partial(_pallas, causal=causal)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return f(qkv)
  # The compiler cannot divide a kernel; each device runs it on its own rows and heads.
  batch, _, _, heads, _ = spec = sharding.spec_of(qkv.shape, "batch", None, None, "tensor", None)
  out = P(batch, None, heads, None)
  return jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=out, check_vma=False)(qkv)


def _pallas(qkv, causal):
  B, L, _, H, K = qkv.shape
  kernel = lambda interpret: lambda x: attention_tpu.attention(x, H, causal, interpret)
  # Not by the default backend: a program may be compiled for chips that are not here.
  out = jax.lax.platform_dependent(
    qkv.reshape(B, L, 3 * H * K), tpu=kernel(False), cpu=kernel(True)
  )
  return out.reshape(B, L, H, K)


def _dot_product_attention(qkv, mask, causal, implementation, lengths=None):
  q, k, v = (qkv[:, :, i] for i in range(3))
  return jax.nn.dot_product_attention(
    q, k, v, mask=mask, is_causal=causal, implementation=implementation,
    query_seq_lengths=lengths, key_value_seq_lengths=lengths,
  )  # fmt: skip


def short(qkv, mask, causal):
  """XLA's with fewer passes over the weights: they are never divided by their sums, outputs are.

  With P = exp(S - max S) and r = 1 / sum P, O = r (P V), and given dO, dV = P^T (r dO) and
  dS = r P * (dO V^T - rowsum(dO * O)): P serves both passes as it is.
  """
  q, k, v = (qkv[:, :, i].swapaxes(1, 2) for i in range(3))  # (B, H, L, K)
  if causal:
    earlier = jnp.tril(jnp.ones((qkv.shape[1],) * 2, bool))
    mask = earlier if mask is None else mask & earlier
  return _short(q * q.shape[-1] ** -0.5, k, v, mask).swapaxes(1, 2)


@jax.custom_vjp
def _short(q, k, v, mask):
  return _short_forward(q, k, v, mask)[0]


def _short_forward(q, k, v, mask):
  scores = _product("bhlk,bhmk->bhlm", q, k)
  if mask is not None:
    scores = jnp.where(mask, scores, -0.7 * jnp.finfo(jnp.float32).max)
  weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))  # (B, H, L, L) float32
  share = 1 / weights.sum(axis=-1, keepdims=True)
  weights = weights.astype(v.dtype)
  out = _product("bhlm,bhmk->bhlk", weights, v) * share
  return out.astype(v.dtype), (q, k, v, weights, share, out)


def _short_backward(kept, grad):
  q, k, v, weights, share, out = kept
  dv = _product("bhlm,bhlk->bhmk", weights, (grad * share).astype(v.dtype))
  own = jnp.sum(grad * out, axis=-1, keepdims=True)  # of float32: it is taken from its like
  ds = (weights * share * (_product("bhlk,bhmk->bhlm", grad, v) - own)).astype(v.dtype)
  dq = _product("bhlm,bhmk->bhlk", ds, k)
  dk = _product("bhlm,bhlk->bhmk", ds, q)
  return (*(x.astype(v.dtype) for x in (dq, dk, dv)), None)


_short.defvjp(_short_forward, _short_backward)


def _product(spec, a, b):
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


# All compute the same. `short` is the fastest on CPUs and, of the first two, moves less through a
# TPU's main memory as compiled. `pallas` and `cudnn` were compiled and compared number by number,
# never timed on a chip; beside remat=names the compiler's own figures see no gain in the kernels.
IMPLEMENTATIONS = {"short": short, "xla": xla, "pallas": pallas, "cudnn": cudnn}


def attend(qkv, mask, *, causal, implementation):
  """Queries, keys and values of all heads, (B, L, 3, H, K) -> (B, L, H, K).

  mask: (B, 1, 1 or L, L) bool over keys, True where a query may look, or None; `causal` comes on
  top of it. implementation: a name of IMPLEMENTATIONS.

  Raises:
    ValueError: unknown implementation.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"model.attention must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}"
    )
  return IMPLEMENTATIONS[implementation](qkv, mask, causal)
