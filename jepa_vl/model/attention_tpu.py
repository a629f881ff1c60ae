"""Self-attention over a short sequence as Pallas TPU kernels: no logits in main memory.

The whole sequence of an image or caption lies in the chip's vector memory, all heads of it.
Queries, keys and values are read as the projection wrote them and the result is written as the next
projection reads it, so nothing is transposed. The backward pass computes the weights again.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Rows of the batch that a program takes: as many as together have about this many tokens.
TOKENS = 256

VMEM = 2**24  # bytes that a kernel gets unless it asks for more

_NEVER = -1e30  # a logit whose weight is 0; finite, so that no row's maximum is infinite


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def attention(qkv, heads, causal, interpret):
  """qkv: (B, L, 3 H K), queries, keys and values of all heads side by side -> (B, L, H K).

  Products take their operands as they come and add up in float32; the softmax is in float32.
  interpret: True to run anywhere, slowly.
  """
  return _call(_forward, (qkv,), qkv.shape[-1] // 3, heads, causal, interpret)


def _attention_fwd(qkv, heads, causal, interpret):
  return attention(qkv, heads, causal, interpret), qkv


def _attention_bwd(heads, causal, interpret, qkv, cotangent):
  return (_call(_backward, (qkv, cotangent), qkv.shape[-1], heads, causal, interpret),)


attention.defvjp(_attention_fwd, _attention_bwd)


def _call(kernel, arrays, columns, heads, causal, interpret):
  """`kernel` over `arrays` (B, L, *) -> (B, L, columns), a few rows of the batch at a time."""
  B, L, _ = arrays[0].shape
  rows = max(r for r in range(1, max(TOKENS // L, 1) + 1) if B % r == 0)
  # Sequences are padded to whole tiles where they are read, by what happens to be in memory.
  padded = _up(L, 128)
  block = lambda n: pl.BlockSpec((rows, padded, n), lambda i: (i, 0, 0))
  # Every block twice, while the next is read, and a dozen arrays as large as the weights.
  width = columns + sum(x.shape[-1] for x in arrays)
  need = 2 * rows * padded * width * arrays[0].dtype.itemsize + 12 * padded**2 * 4
  return pl.pallas_call(
    functools.partial(kernel, length=L, heads=heads, causal=causal),
    grid=(B // rows,),
    in_specs=[block(x.shape[-1]) for x in arrays],
    out_specs=block(columns),
    out_shape=jax.ShapeDtypeStruct((B, L, columns), arrays[0].dtype),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel",), vmem_limit_bytes=need if need > VMEM else None
    ),
    interpret=interpret,
  )(*arrays)


def _up(n, multiple):
  return -(-n // multiple) * multiple


def _forward(qkv_ref, out_ref, *, length, heads, causal):
  rows, padded, width = out_ref.shape
  K = width // heads
  mask = _mask(_up(length, 16), padded, length, causal)

  def row(r, _):
    for h in range(heads):
      q, k, v = (_read(qkv_ref, r, i * width + h * K, K, length) for i in range(3))
      q = q[: mask.shape[0]]
      e, total = _weights(q, k, mask)
      out = _dot(e.astype(v.dtype), v, (1, 0)) / total  # (Q, K)
      _write(out_ref, r, h * K, out)

  jax.lax.fori_loop(0, rows, row, None)


def _backward(qkv_ref, dout_ref, dqkv_ref, *, length, heads, causal):
  rows, padded, width = dout_ref.shape
  K = width // heads
  mask = _mask(_up(length, 16), padded, length, causal)

  def row(r, _):
    for h in range(heads):
      q, k, v = (_read(qkv_ref, r, i * width + h * K, K, length) for i in range(3))
      dout = _read(dout_ref, r, h * K, K, length)[: mask.shape[0]]
      q = q[: mask.shape[0]]
      e, total = _weights(q, k, mask)
      p = e / total  # (Q, L)
      dp = _dot(dout, v, (1, 1))
      ds = p * (dp - jnp.sum(p * dp, axis=1, keepdims=True)) * K**-0.5
      p, ds = p.astype(v.dtype), ds.astype(v.dtype)
      grads = _dot(ds, k, (1, 0)), _dot(ds, q, (0, 0)), _dot(p, dout, (0, 0))
      for i, grad in enumerate(grads):
        _write(dqkv_ref, r, i * width + h * K, grad)

  jax.lax.fori_loop(0, rows, row, None)


def _read(ref, r, start, count, length):
  """Columns of one row of the batch, (padded L, count); zeros where the sequence has ended."""
  x = ref[r, :, start : start + count]
  inside = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) < length
  return jnp.where(inside, x, jnp.zeros_like(x))


def _write(ref, r, start, x):
  ref[r, : x.shape[0], start : start + x.shape[1]] = x.astype(ref.dtype)


def _mask(queries, keys, length, causal):
  """Which key a query sees, (queries, keys) bool."""
  key = jax.lax.broadcasted_iota(jnp.int32, (queries, keys), 1)
  seen = key < length
  if causal:
    seen &= key <= jax.lax.broadcasted_iota(jnp.int32, (queries, keys), 0)
  return seen


def _weights(q, k, mask):
  """Unnormalised weights (Q, L) float32 and their sums (Q, 1)."""
  logits = _dot(q, k, (1, 1)) * q.shape[1] ** -0.5
  logits = jnp.where(mask, logits, _NEVER)
  e = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
  return e, jnp.sum(e, axis=1, keepdims=True)


def _dot(a, b, axes):
  """Contracts axis axes[0] of a with axes[1] of b, in float32."""
  dimensions = (((axes[0],), (axes[1],)), ((), ()))
  return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
