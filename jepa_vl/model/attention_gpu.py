"""Self-attention over a short sequence as Pallas kernels for NVIDIA GPUs: no logits in main memory.

A program has one head of one image or caption, whose queries, keys and values it reads as the
projection wrote them and from then on finds in the cache. It goes over them in blocks; where these
do not divide the sequence, the last one reaches back over rows of the one before, which it then
counts once. The backward pass computes the weights again (FlashAttention, arXiv 2205.14135,
2307.08691).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

BLOCK = 64  # rows; a power of two, as Triton wants it
WARPS = 4
SHORTEST = 16  # tokens of a sequence, and rows of a block: what a tensor core takes

_NEVER = -1e30  # a logit whose weight is 0; finite, so that no row's maximum is infinite


def takes(qkv):
  """Whether the kernels are for such an array, (B, L, 3, H, K)."""
  K = qkv.shape[-1]
  return qkv.shape[1] >= SHORTEST and K >= 16 and K & (K - 1) == 0 and qkv.dtype == jnp.bfloat16


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def attention(qkv, causal, interpret):
  """qkv: (B, L, 3, H, K) -> (B, L, H, K).

  Products take their operands as they come and add up in float32; the softmax is in float32.
  interpret: True to run anywhere, slowly.
  """
  return _attention_fwd(qkv, causal, interpret)[0]


def _attention_fwd(qkv, causal, interpret):
  B, L, _, H, K = qkv.shape
  out = jax.ShapeDtypeStruct((B, L, H, K), qkv.dtype), jax.ShapeDtypeStruct((B, H, L), jnp.float32)
  out, total = _call(_forward, (qkv,), out, causal, interpret, stages=2)
  return out, (qkv, out, total)


def _attention_bwd(causal, interpret, kept, grad):
  qkv, out, total = kept
  own = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1).swapaxes(1, 2)
  kernel, stages = (_backward_short, 2) if len(_parts(qkv.shape[1])) <= 2 else (_backward, 3)
  (dqkv,) = _call(kernel, (qkv, grad, total, own), (qkv,), causal, interpret, stages)
  return (dqkv,)


attention.defvjp(_attention_fwd, _attention_bwd)


def _call(kernel, arrays, out_shapes, causal, interpret, stages):
  B, L, _, H, K = arrays[0].shape

  def block(x):
    if x.ndim == 5:
      return pl.BlockSpec((None, L, 3, None, K), lambda h, b: (b, 0, 0, h, 0))
    if x.ndim == 4:
      return pl.BlockSpec((None, L, None, K), lambda h, b: (b, 0, h, 0))
    return pl.BlockSpec((None, None, L), lambda h, b: (b, h, 0))

  return pl.pallas_call(
    functools.partial(kernel, L=L, causal=causal),
    grid=(H, B),  # an image's heads one after the other: they are neighbours in memory
    in_specs=[block(x) for x in arrays],
    out_specs=[block(x) for x in out_shapes],
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in out_shapes],
    compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=stages),
    interpret=interpret,
    name=f"attention{kernel.__name__}",
  )(*arrays)


def blocks(L):
  """Rows of a whole block, their number, and rows of the last, which ends with the sequence."""
  size = min(BLOCK, 1 << (L.bit_length() - 1))
  rest = L % size
  return size, L // size, max(SHORTEST, 1 << (rest - 1).bit_length()) if rest else 0


def _over(L, body, carry, first=0, last=None, tail=True):
  """carry after body(start, size, carry) on the whole blocks, `first` to `last`, and the tail."""
  size, count, rest = blocks(L)
  step = lambda i, carry: body(i * size, size, carry)
  carry = jax.lax.fori_loop(first, count if last is None else last, step, carry)
  return body(L - rest, rest, carry) if tail and rest else carry


def _each(L, body):
  """body(start, size, i) on every block; i is its number, or None of the tail."""
  size, count, rest = blocks(L)
  jax.lax.fori_loop(0, count, lambda i, _: body(i * size, size, i), None)
  if rest:
    body(L - rest, rest, None)


def _visible(s, L, start, outer, causal, keys_inside):
  """Logits s (outer rows, rows from `start`) with those of weight 0 made so.

  Of the tail, rows that the block before has had; if causal, keys behind their query, the keys
  being the inner rows or the outer ones.
  """
  inner = start + jnp.arange(s.shape[1])
  visible = None
  if isinstance(start, int) and start:  # the tail
    size, count, _ = blocks(L)
    visible = inner[None, :] >= count * size
  if causal:
    inner, outer = inner[None, :], outer[:, None]
    earlier = inner <= outer if keys_inside else outer <= inner
    visible = earlier if visible is None else visible & earlier
  return s if visible is None else jnp.where(visible, s, _NEVER)


def _forward(qkv_ref, out_ref, total_ref, *, L, causal):
  K = qkv_ref.shape[-1]
  scale = math.log2(math.e) / K**0.5  # weights are powers of two

  def queries(start, size, i):
    mine = pl.ds(start, size)
    q = qkv_ref[mine, 0, :]
    rows = start + jnp.arange(size)

    def keys(start, size, carry):
      out, most, total = carry
      k, v = (qkv_ref[pl.ds(start, size), part, :] for part in (1, 2))
      s = _visible(_dot(q, k.T) * scale, L, start, rows, causal, True)
      more = jnp.maximum(most, s.max(axis=1))
      weights, share = jnp.exp2(s - more[:, None]), jnp.exp2(most - more)
      out = out * share[:, None] + _dot(weights.astype(v.dtype), v)
      return out, more, total * share + weights.sum(axis=1)

    zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
    start = (zeros(size, K), zeros(size) + _NEVER, zeros(size))
    out, most, total = _over(L, keys, start, **_before(i, causal))
    out_ref[mine, :] = (out / total[:, None]).astype(out_ref.dtype)
    total_ref[mine] = most + jnp.log2(total)

  _each(L, queries)


def _before(i, causal):
  """Blocks of keys that the queries of block i see."""
  return dict(last=i + 1, tail=False) if causal and i is not None else {}


def _backward(qkv_ref, grad_ref, total_ref, own_ref, dqkv_ref, *, L, causal):
  """Logits twice: once for the gradients of queries, once for those of keys and values.

  own: the sum over a query's numbers of its result times the gradient, (L,).
  """
  K = qkv_ref.shape[-1]
  scale = math.log2(math.e) / K**0.5
  zeros = lambda size: jnp.zeros((size, K), jnp.float32)
  of_queries = lambda mine: (qkv_ref[mine, 0, :], grad_ref[mine, :], total_ref[mine], own_ref[mine])

  def queries(start, size, i):
    q, grad, total, own = of_queries(pl.ds(start, size))
    rows = start + jnp.arange(size)

    def keys(start, size, dq):
      k, v = (qkv_ref[pl.ds(start, size), part, :] for part in (1, 2))
      s = _visible(_dot(q, k.T) * scale, L, start, rows, causal, True)
      ds = jnp.exp2(s - total[:, None]) * (_dot(grad, v.T) - own[:, None])
      return dq + _dot(ds.astype(k.dtype), k)

    dq = _over(L, keys, zeros(size), **_before(i, causal))
    dqkv_ref[pl.ds(start, size), 0, :] = (dq * K**-0.5).astype(dqkv_ref.dtype)

  def keys(start, size, i):
    k, v = (qkv_ref[pl.ds(start, size), part, :] for part in (1, 2))
    rows = start + jnp.arange(size)

    def queries(start, size, carry):
      dk, dv = carry
      q, grad, total, own = of_queries(pl.ds(start, size))
      # Keys first: no result need be turned.
      s = _visible(_dot(k, q.T) * scale, L, start, rows, causal, False)
      weights = jnp.exp2(s - total[None, :])
      ds = weights * (_dot(v, grad.T) - own[None, :])
      dv += _dot(weights.astype(grad.dtype), grad)
      return dk + _dot(ds.astype(q.dtype), q), dv

    # The tail's first rows are of the last whole block.
    first = 0 if not causal else blocks(L)[1] - 1 if i is None else i
    dk, dv = _over(L, queries, (zeros(size), zeros(size)), first=first)
    dqkv_ref[pl.ds(start, size), 1, :] = (dk * K**-0.5).astype(dqkv_ref.dtype)
    dqkv_ref[pl.ds(start, size), 2, :] = dv.astype(dqkv_ref.dtype)

  _each(L, queries)
  _each(L, keys)


def _parts(L):
  """(first row, rows, which of them no part before has) of each block, the tail's last."""
  size, count, rest = blocks(L)
  whole = [(i * size, size, None) for i in range(count)]
  return [*whole, (L - rest, rest, L - count * size)] if rest else whole


def _backward_short(qkv_ref, grad_ref, total_ref, own_ref, dqkv_ref, *, L, causal):
  """As `_backward`, with all gradients of all queries at hand, so that logits are computed once."""
  K = qkv_ref.shape[-1]
  scale = math.log2(math.e) / K**0.5
  zeros = lambda size: jnp.zeros((size, K), jnp.float32)
  parts = _parts(L)
  dqs = [zeros(size) for _, size, _ in parts]
  for j, (k_start, k_size, k_new) in enumerate(parts):
    k, v = (qkv_ref[pl.ds(k_start, k_size), part, :] for part in (1, 2))
    dk, dv = zeros(k_size), zeros(k_size)
    for i, (start, size, new) in enumerate(parts):
      if causal and i < j:
        continue
      mine = pl.ds(start, size)
      q, grad = qkv_ref[mine, 0, :], grad_ref[mine, :]
      s = _dot(k, q.T) * scale
      visible = _new(k_size, k_new)[:, None] & _new(size, new)[None, :]
      if causal:
        visible &= (k_start + jnp.arange(k_size))[:, None] <= (start + jnp.arange(size))[None, :]
      weights = jnp.exp2(jnp.where(visible, s, _NEVER) - total_ref[mine][None, :])
      ds = (weights * (_dot(v, grad.T) - own_ref[mine][None, :])).astype(q.dtype)
      dv += _dot(weights.astype(grad.dtype), grad)
      dk += _dot(ds, q)
      dqs[i] += _dot(ds.T, k)
    _store(dqkv_ref, parts[j], 1, dk * K**-0.5)
    _store(dqkv_ref, parts[j], 2, dv)
  for part, dq in zip(parts, dqs, strict=True):
    _store(dqkv_ref, part, 0, dq * K**-0.5)


def _new(size, new):
  """Which rows of a part no part before it has."""
  return jnp.arange(size) >= size - (new or size)


def _store(ref, part, which, x):
  start, size, new = part
  # An array for an index: masked stores, interpreted, take no number.
  ref = ref.at[pl.ds(start, size), jnp.asarray(which, jnp.int32), :]
  mask = jnp.broadcast_to(_new(size, new)[:, None], x.shape)
  plgpu.store(ref, x.astype(ref.dtype), mask=mask)


def _dot(a, b):
  return jnp.dot(a, b, preferred_element_type=jnp.float32)
