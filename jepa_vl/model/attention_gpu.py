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

from jepa_vl.model import ptx

BLOCK = 64  # rows; a power of two, as Triton wants it
WARPS, STAGES = 4, 2
SHORTEST = 16  # tokens of a sequence, and rows of a block: what a tensor core takes

_NEVER = -1e30  # a logit whose weight is 0; finite, so that no row's maximum is infinite


def takes(qkv):
  """Whether the kernels are for such an array, (B, L, 3, H, K)."""
  K = qkv.shape[-1]
  return qkv.shape[1] >= SHORTEST and K >= 16 and K & (K - 1) == 0 and qkv.dtype == jnp.bfloat16


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def attention(qkv, bias, first, causal, interpret):
  """qkv: (B, L, 3, H, K) -> (B, L, H, K).

  first: (B, L) int32, the first key that each query sees, or None.
  bias: (H, K), what was added to the queries with its gradient stopped; it has that gradient from
  here.
  Products take their operands as they come and add up in float32; the softmax is in float32.
  interpret: True to run anywhere, slowly.
  """
  return _attention_fwd(qkv, bias, first, causal, interpret)[0]


def _attention_fwd(qkv, bias, first, causal, interpret):
  B, L, _, H, K = qkv.shape
  out = jax.ShapeDtypeStruct((B, L, H, K), qkv.dtype), jax.ShapeDtypeStruct((B, H, L), jnp.float32)
  out, total = _call(_forward, (qkv,), out, first, causal, interpret)
  return out, (qkv, bias, first, out, total)


def _attention_bwd(causal, interpret, kept, grad):
  qkv, bias, first, out, total = kept
  own = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1).swapaxes(1, 2)
  kernel = _backward_short if len(_parts(qkv.shape[1])) <= 2 else _backward
  outs = qkv, jax.ShapeDtypeStruct((len(qkv), *bias.shape), jnp.float32)
  dqkv, sums = _call(
    kernel, (qkv, grad, total, own), outs, first, causal, interpret,
    exp2=functools.partial(ptx.exp2, on_gpu=not interpret),
  )  # fmt: skip
  return dqkv, sums.sum(axis=0).astype(bias.dtype), None


attention.defvjp(_attention_fwd, _attention_bwd)


def _call(kernel, arrays, out_shapes, first, causal, interpret, **how):
  B, L, _, H, K = arrays[0].shape
  if first is not None:
    arrays = *arrays, first

  def block(x):
    if x.ndim == 5:
      return pl.BlockSpec((None, L, 3, None, K), lambda h, b: (b, 0, 0, h, 0))
    if x.ndim == 4:
      return pl.BlockSpec((None, x.shape[1], None, K), lambda h, b: (b, 0, h, 0))
    if x.ndim == 2:
      return pl.BlockSpec((None, L), lambda h, b: (b, 0))
    return pl.BlockSpec((None, None, x.shape[2]), lambda h, b: (b, h, 0))

  def body(*refs):
    ins, outs = refs[: len(arrays)], refs[len(arrays) :]
    *ins, first_ref = ins if first is not None else (*ins, None)
    kernel(*ins, *outs, first_ref, L=L, causal=causal, **how)

  return pl.pallas_call(
    body,
    grid=(H, B),  # an image's heads one after the other: they are neighbours in memory
    in_specs=[block(x) for x in arrays],
    out_specs=[block(x) for x in out_shapes],
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in out_shapes],
    compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES),
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


def _each(L, body, carry=None):
  """carry after body(start, size, i, carry) on every block; i: its number, None of the tail."""
  size, count, rest = blocks(L)
  step = lambda i, carry: body(i * size, size, i, carry)
  carry = jax.lax.fori_loop(0, count, step, carry)
  return body(L - rest, rest, None, carry) if rest else carry


def _visible(s, L, start, outer, causal, keys_inside, first):
  """Logits s (outer rows, rows from `start`) with those of weight 0 made so.

  Of the tail, rows that the block before has had; if causal, keys behind their query, the keys
  being the inner rows or the outer ones; and keys before each query's `first`, or None.
  """
  inner = start + jnp.arange(s.shape[1])
  conditions = []
  if isinstance(start, int) and start:  # the tail
    conditions.append(inner[None, :] >= blocks(L)[0] * blocks(L)[1])
  inner, outer = inner[None, :], outer[:, None]
  keys, queries = (inner, outer) if keys_inside else (outer, inner)
  if causal:
    conditions.append(keys <= queries)
  if first is not None:
    conditions.append(keys >= (first[:, None] if keys_inside else first[None, :]))
  if not conditions:
    return s
  return jnp.where(functools.reduce(jnp.logical_and, conditions), s, _NEVER)


def _scale(K):
  """Of logits, so that weights are powers of two."""
  return math.log2(math.e) / K**0.5


def _reader(L, read):
  """read(rows) by a block's first row and size; the tail is read at once, so that no step waits."""
  rest = blocks(L)[2]
  tail = read(pl.ds(L - rest, rest)) if rest else None
  return lambda start, size: tail if isinstance(start, int) else read(pl.ds(start, size))


def _keys(L, qkv_ref):
  return _reader(L, lambda rows: (qkv_ref[rows, 1, :], qkv_ref[rows, 2, :]))


def _forward(qkv_ref, out_ref, total_ref, first_ref, *, L, causal):
  scale = _scale(qkv_ref.shape[-1])
  of_queries = _reader(L, lambda rows: (qkv_ref[rows, 0, :], _of(first_ref, rows)))
  of_keys = _keys(L, qkv_ref)

  def queries(start, size, i, _):
    mine, rows = pl.ds(start, size), start + jnp.arange(size)
    q, first = of_queries(start, size)

    def keys(start, size, carry):
      out, most, total = carry
      k, v = of_keys(start, size)
      s = _visible(_dot(q, k.T) * scale, L, start, rows, causal, True, first)
      more = jnp.maximum(most, s.max(axis=1))
      # By `ptx.exp2` it is a fifth fewer instructions, but registers for two programs, not three.
      weights, share = jnp.exp2(s - more[:, None]), jnp.exp2(most - more)
      out = out * share[:, None] + _dot(weights.astype(v.dtype), v)
      return out, more, total * share + weights.sum(axis=1)

    zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
    start = (zeros(size, qkv_ref.shape[-1]), zeros(size) + _NEVER, zeros(size))
    out, most, total = _over(L, keys, start, **_before(i, causal))
    out_ref[mine, :] = (out / total[:, None]).astype(out_ref.dtype)
    total_ref[mine] = most + jnp.log2(total)

  _each(L, queries)


def _of(ref, rows):
  return None if ref is None else ref[rows]


def _before(i, causal):
  """Blocks of keys that the queries of block i see."""
  return dict(last=i + 1, tail=False) if causal and i is not None else {}


def _backward(
  qkv_ref, grad_ref, total_ref, own_ref, dqkv_ref, sum_ref, first_ref, *, L, causal, exp2
):
  """Logits twice: once for the gradients of queries, once for those of keys and values.

  own: the sum over a query's numbers of its result times the gradient, (L,). sum: of the queries'
  gradients, (K,).
  """
  K = qkv_ref.shape[-1]
  zeros = lambda size: jnp.zeros((size, K), jnp.float32)

  def queries_at(rows):
    q, first = qkv_ref[rows, 0, :], _of(first_ref, rows)
    return q, grad_ref[rows, :], total_ref[rows], own_ref[rows], first

  of_queries = _reader(L, queries_at)
  of_keys = _keys(L, qkv_ref)

  def queries(start, size, i, total_dq):
    q, grad, total, own, first = of_queries(start, size)
    rows = start + jnp.arange(size)

    def keys(start, size, dq):
      k, v = of_keys(start, size)
      s = _visible(_dot(q, k.T), L, start, rows, causal, True, first)
      ds = exp2(s, _scale(K), total[:, None]) * (_dot(grad, v.T) - own[:, None])
      return dq + _dot(ds.astype(k.dtype), k)

    dq = _over(L, keys, zeros(size), **_before(i, causal)) * K**-0.5
    dqkv_ref[pl.ds(start, size), 0, :] = dq.astype(dqkv_ref.dtype)
    if i is None:  # rows that the block before has had
      dq = jnp.where(_new(size, L - blocks(L)[0] * blocks(L)[1])[:, None], dq, 0)
    return total_dq + jnp.sum(dq, axis=0)

  def keys(start, size, i, _):
    k, v = of_keys(start, size)
    rows = start + jnp.arange(size)

    def queries(start, size, carry):
      dk, dv = carry
      q, grad, total, own, seen = of_queries(start, size)
      # Keys first: no result need be turned.
      s = _visible(_dot(k, q.T), L, start, rows, causal, False, seen)
      weights = exp2(s, _scale(K), total[None, :])
      ds = weights * (_dot(v, grad.T) - own[None, :])
      dv += _dot(weights.astype(grad.dtype), grad)
      return dk + _dot(ds.astype(q.dtype), q), dv

    # The tail's first rows are of the last whole block.
    begin = 0 if not causal else blocks(L)[1] - 1 if i is None else i
    dk, dv = _over(L, queries, (zeros(size), zeros(size)), first=begin)
    dqkv_ref[pl.ds(start, size), 1, :] = (dk * K**-0.5).astype(dqkv_ref.dtype)
    dqkv_ref[pl.ds(start, size), 2, :] = dv.astype(dqkv_ref.dtype)

  sum_ref[...] = _each(L, queries, jnp.zeros(K, jnp.float32))
  _each(L, keys)


def _parts(L):
  """(first row, rows, which of them no part before has) of each block, the tail's last."""
  size, count, rest = blocks(L)
  whole = [(i * size, size, None) for i in range(count)]
  return [*whole, (L - rest, rest, L - count * size)] if rest else whole


def _backward_short(
  qkv_ref, grad_ref, total_ref, own_ref, dqkv_ref, sum_ref, first_ref, *, L, causal, exp2
):
  """As `_backward`, with all gradients of all queries at hand, so that logits are computed once."""
  K = qkv_ref.shape[-1]
  zeros = lambda size: jnp.zeros((size, K), jnp.float32)
  parts = _parts(L)
  dqs = [zeros(size) for _, size, _ in parts]
  for j, (k_start, k_size, k_new) in enumerate(parts):
    k, v = (qkv_ref[pl.ds(k_start, k_size), part, :] for part in (1, 2))
    key, dk, dv = (k_start + jnp.arange(k_size))[:, None], zeros(k_size), zeros(k_size)
    for i, (start, size, new) in enumerate(parts):
      if causal and i < j:
        continue
      mine = pl.ds(start, size)
      q, grad = qkv_ref[mine, 0, :], grad_ref[mine, :]
      visible = _new(k_size, k_new)[:, None] & _new(size, new)[None, :]
      if causal:
        visible &= key <= (start + jnp.arange(size))[None, :]
      if first_ref is not None:
        visible &= key >= first_ref[mine][None, :]
      s = jnp.where(visible, _dot(k, q.T), _NEVER)
      weights = exp2(s, _scale(K), total_ref[mine][None, :])
      ds = (weights * (_dot(v, grad.T) - own_ref[mine][None, :])).astype(q.dtype)
      dv += _dot(weights.astype(grad.dtype), grad)
      dk += _dot(ds, q)
      dqs[i] += _dot(ds.T, k)
    _store(dqkv_ref, parts[j], 1, dk * K**-0.5)
    _store(dqkv_ref, parts[j], 2, dv)
  dqs = [dq * K**-0.5 for dq in dqs]
  for part, dq in zip(parts, dqs, strict=True):
    _store(dqkv_ref, part, 0, dq)
  sum_ref[...] = sum(jnp.sum(dq, axis=0) for dq in dqs)  # where a part before has a row, it is 0


def _new(size, new):
  """Which rows of a part no part before it has."""
  return jnp.arange(size) >= size - (new or size)


def _store(ref, part, which, x):
  """Writes rows of a part that are its own."""
  start, size, new = part
  # An array for an index: masked stores, interpreted, take no number.
  ref = ref.at[pl.ds(start, size), jnp.asarray(which, jnp.int32), :]
  mask = jnp.broadcast_to(_new(size, new)[:, None], x.shape)
  plgpu.store(ref, x.astype(ref.dtype), mask=mask)


def _dot(a, b):
  return jnp.dot(a, b, preferred_element_type=jnp.float32)
