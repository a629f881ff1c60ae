"""LayerNorm and GELU as Pallas kernels for NVIDIA GPUs.

Each array is read or written once. XLA's programs read a row twice to norm it, and what a backward
pass wrote once more for the sums over all rows; its GELU, on an H200, waits for arithmetic.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jepa_vl.model import ptx

ROWS = 8  # that the number of all rows is a multiple of
PROGRAMS = 1056  # of the norms' backward pass: of one warp, 8 to each of 132 multiprocessors
PAIR = 2  # rows of a step of GELU's backward pass, which has four times as many programs
SHORTEST, LONGEST = 64, 256  # numbers of a row that are loaded together; powers of two
FLAT = 2048  # numbers of a program of GELU's forward pass, where rows do not matter


def takes(x):
  """Whether the kernels are for such an array, (..., W)."""
  rows = x.size // x.shape[-1]
  return x.shape[-1] % SHORTEST == 0 and rows % ROWS == 0


def _call(kernel, grid, ins, outs, arrays, warps, interpret, **how):
  """pallas_call; outs: pairs of a block and of shape and type of the whole."""
  return pl.pallas_call(
    functools.partial(kernel, **how), grid=grid, in_specs=ins,
    out_specs=[block for block, _ in outs],
    out_shape=[jax.ShapeDtypeStruct(*whole) for _, whole in outs],
    compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1), interpret=interpret,
    name=kernel.__name__.strip("_"),
  )(*arrays)  # fmt: skip


def norm(x, scale, bias, eps, *added, interpret=False):
  """x: (N, W); scale, bias: (W,) float32; added: nothing, or what to add to x first.

  Returns:
    x with what was added, if anything; its norm; mean and 1 / deviation of rows, (N,).
  """
  N, W = x.shape
  size, warps = _tile(W)
  rows, each = pl.BlockSpec((size, W), lambda i: (i, 0)), pl.BlockSpec((size,), lambda i: (i,))
  row = pl.BlockSpec((W,), lambda i: (0,))
  numbers = each, ((N,), jnp.float32)
  outs = [(rows, (x.shape, x.dtype))] * (1 + len(added)) + [numbers, numbers]
  ins = [rows, row, row, *(rows for _ in added)]
  arrays = x, scale, bias, *added
  return _call(_norm, (N // size,), ins, outs, arrays, warps, interpret, eps=eps)


def norm_gradient(x, mean, share, scale, grad, around, with_branch, interpret=False):
  """Of what `norm` had and gave, of y's gradient, and of x's from elsewhere.

  Returns:
    x's gradient, all of it; sums over parts of the rows, (P, 2 or 3, W): the scale's gradient, the
    bias's, and with_branch those of x.
  """
  N, W = x.shape
  size, warps = _tile(W)
  programs = min(PROGRAMS, N // size)
  whole = lambda x: pl.BlockSpec(x.shape, lambda i: (0,) * x.ndim)
  arrays = x, mean, share, scale, grad, around
  count = 3 if with_branch else 2
  sums = pl.BlockSpec((None, count, W), lambda i: (i, 0, 0)), ((programs, count, W), jnp.float32)
  return _call(
    _norm_gradient, (programs,), [whole(a) for a in arrays], [(whole(x), (x.shape, x.dtype)), sums],
    arrays, warps, interpret, size=size,
  )  # fmt: skip


def gelu(x, tanh, interpret=False):
  """x: (N, F) -> GELU of it."""
  size = min(FLAT, x.size & -x.size)
  # Parts as rows: where x has 2^32 numbers, their places in one dimension do not fit 32 bits.
  parts = x.reshape(-1, size)
  block = pl.BlockSpec((None, size), lambda i: (i, 0))
  return _call(
    _gelu, (len(parts),), [block], [(block, (parts.shape, x.dtype))], (parts,), 4, interpret,
    tanh=tanh, on_gpu=not interpret,
  )[0].reshape(x.shape)  # fmt: skip


def gelu_gradient(x, grad, tanh, interpret=False):
  """x: (N, F), and GELU's gradient -> x's; sums of it over parts of the rows, (P, F) float32."""
  N, F = x.shape
  size = _piece(F)
  programs = min(max(4 * PROGRAMS * size // F, 1), N // PAIR)
  column = pl.BlockSpec((N, size), lambda j, i: (0, j))
  sums = pl.BlockSpec((None, size), lambda j, i: (i, j)), ((programs, F), jnp.float32)
  return _call(
    _gelu_gradient, (F // size, programs), [column, column], [(column, (x.shape, x.dtype)), sums],
    (x, grad), 1, interpret, tanh=tanh, on_gpu=not interpret,
  )  # fmt: skip


def _piece(W):
  return min(W & -W, LONGEST)


def _pieces(W):
  return [pl.ds(start, _piece(W)) for start in range(0, W, _piece(W))]


def _tile(W):
  """Rows of W numbers that a program has at once, and its warps.

  A load of a warp is 256 numbers where factors of two in W allow it, and what a thread has fits
  its registers.
  """
  rows = min(LONGEST // _piece(W), max(768 // W, 1))
  return 1 << (rows.bit_length() - 1), 1 if W <= 1024 else 2


def _turns(axis, count):
  """This program's share of `count` steps along a grid's axis: its first, and the next one's."""
  i, programs = pl.program_id(axis), pl.num_programs(axis)
  # Without the product of i and count, which may not fit 32 bits.
  steps, rest = count // programs, count % programs
  first = i * steps + jnp.minimum(i, rest)
  return first, first + steps + (i < rest).astype(jnp.int32)


def _mean(pieces, W):
  return (sum(jnp.sum(p, axis=1) for p in pieces) / W)[:, None]


def _norm(x_ref, scale_ref, bias_ref, *refs, eps):
  *added, y_ref, mean_ref, share_ref = refs
  W = x_ref.shape[-1]
  x = [x_ref[:, piece].astype(jnp.float32) for piece in _pieces(W)]
  if added:
    branch_ref, new_ref = added
    for i, piece in enumerate(_pieces(W)):
      new = (x[i] + branch_ref[:, piece].astype(jnp.float32)).astype(new_ref.dtype)
      new_ref[:, piece] = new
      x[i] = new.astype(jnp.float32)  # as the backward pass finds it
  mean = _mean(x, W)
  x = [p - mean for p in x]
  share = jax.lax.rsqrt(_mean([p * p for p in x], W) + eps)
  for p, piece in zip(x, _pieces(W), strict=True):
    y = p * (share * scale_ref[piece][None]) + bias_ref[piece][None]
    y_ref[:, piece] = y.astype(y_ref.dtype)
  mean_ref[...], share_ref[...] = mean[:, 0], share[:, 0]


def _norm_gradient(
  x_ref, mean_ref, share_ref, scale_ref, grad_ref, around_ref, dx_ref, sums_ref, *, size
):
  """A step has `size` rows; their numbers are asked for a step before."""
  N, W = x_ref.shape
  pieces = _pieces(W)
  scale = [scale_ref[piece][None] for piece in pieces]
  count = sums_ref.shape[0]
  first, end = _turns(0, N // size)

  def load(i):
    rows = pl.ds(i * size, size)
    of_pieces = ([ref[rows, p] for p in pieces] for ref in (x_ref, grad_ref, around_ref))
    return *of_pieces, mean_ref[rows], share_ref[rows]

  def some(i, carry):
    sums, (x, grad, around, mean, share) = carry
    following = load(jnp.minimum(i + 1, end - 1))
    rows, mean, share = pl.ds(i * size, size), mean[:, None], share[:, None]
    unit = [(p.astype(jnp.float32) - mean) * share for p in x]
    grad = [g.astype(jnp.float32) for g in grad]
    scaled = [g * s for g, s in zip(grad, scale, strict=True)]
    own, along = _mean(scaled, W), _mean([s * u for s, u in zip(scaled, unit, strict=True)], W)
    new = []
    for p, s, u, g, r, old in zip(pieces, scaled, unit, grad, around, sums, strict=True):
      dx = share * (s - own - u * along) + r.astype(jnp.float32)
      dx_ref[rows, p] = dx.astype(dx_ref.dtype)
      new.append(tuple(a + b for a, b in zip(old, (g * u, g, dx)[:count], strict=True)))
    return new, following

  zeros = jnp.zeros((size, pieces[0].size), jnp.float32)
  start = [(zeros,) * count] * len(pieces), load(first)
  sums, _ = jax.lax.fori_loop(first, end, some, start)
  for piece, found in zip(pieces, sums, strict=True):
    for i, x in enumerate(found):
      sums_ref[i, piece] = jnp.sum(x, axis=0)


def _gelu(x_ref, y_ref, *, tanh, on_gpu):
  x = x_ref[...].astype(jnp.float32)
  y_ref[...] = (x * _gate(x, tanh, on_gpu)).astype(y_ref.dtype)


def _gelu_gradient(x_ref, grad_ref, dx_ref, sums_ref, *, tanh, on_gpu):
  """A step has PAIR rows of some columns; their numbers are asked for a step before."""
  N, size = x_ref.shape
  first, end = _turns(1, N // PAIR)

  def load(i):
    rows = pl.ds(i * PAIR, PAIR)
    return x_ref[rows, :], grad_ref[rows, :]

  def some(i, carry):
    sums, (x, grad) = carry
    following = load(jnp.minimum(i + 1, end - 1))
    dx = _slope(x.astype(jnp.float32), tanh, on_gpu) * grad.astype(jnp.float32)
    dx_ref[pl.ds(i * PAIR, PAIR), :] = dx.astype(dx_ref.dtype)
    return sums + dx, following

  start = jnp.zeros((PAIR, size), jnp.float32), load(first)
  sums_ref[...] = jnp.sum(jax.lax.fori_loop(first, end, some, start)[0], axis=0)


# GELU is x times a gate; here is log2(gate / (1 - gate)) over x, as a polynomial of x^2. By tanh:
# its definition. By erf, of the normal distribution: the minimax fit up to 5.5^2, weighted so that
# it is one of GELU. But for rounding GELU is within 8e-8, and within 3e-4 of itself down to -4; the
# gate is within 1.1e-7.
_TANH = (2.30220810, 0.102943240)
_NORMAL = (
  2.30220723, 0.104838692, -9.56754229e-5, -1.59362869e-4, 1.1448471e-5, -3.84776655e-7,
  5.20330268e-9,
)  # fmt: skip


def _gate(x, tanh, on_gpu):
  """(1 + tanh(.)) / 2, or the normal distribution's Phi(x)."""
  odds = ptx.polynomial(x * x, _TANH if tanh else _NORMAL, on_gpu)
  return ptx.sigmoid2(x * odds, on_gpu)


def _slope(x, tanh, on_gpu):
  """GELU's derivative."""
  gate = _gate(x, tanh, on_gpu)
  if tanh:
    a, b = (math.log(2) * c for c in _TANH)
    return gate + x * ptx.polynomial(x * x, (a, 3 * b), on_gpu) * gate * (1 - gate)
  bell = ptx.exp2(x * x, -0.5 * math.log2(math.e), jnp.zeros_like(x), on_gpu)
  return gate + x * bell * math.sqrt(0.5 / math.pi)
