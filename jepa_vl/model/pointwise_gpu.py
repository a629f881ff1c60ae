"""LayerNorm and GELU's derivative as Pallas kernels for NVIDIA GPUs.

Each array is read or written once. XLA's programs read a row twice to norm it, and what a backward
pass wrote once more for the sums over all rows.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

ROWS = 8  # at once; a power of two
WARPS = 4
PROGRAMS = 512  # at least so many in a backward pass, where the rows allow it
SHORTEST, LONGEST = 64, 256  # numbers of a row that are loaded together; powers of two


def takes(x):
  """Whether the kernels are for such an array, (..., W)."""
  rows = x.size // x.shape[-1]
  return x.shape[-1] % SHORTEST == 0 and rows % ROWS == 0


def _call(kernel, grid, ins, outs, arrays, interpret, **how):
  """pallas_call; outs: pairs of a block and of shape and type of the whole."""
  return pl.pallas_call(
    functools.partial(kernel, **how), grid=grid, in_specs=ins,
    out_specs=[block for block, _ in outs],
    out_shape=[jax.ShapeDtypeStruct(*whole) for _, whole in outs],
    compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1), interpret=interpret,
    name=kernel.__name__.strip("_"),
  )(*arrays)  # fmt: skip


def norm(x, scale, bias, eps, *added, interpret=False):
  """x: (N, W); scale, bias: (W,) float32; added: nothing, or what to add to x first.

  Returns:
    x with what was added, if anything; its norm; mean and 1 / deviation of rows, (N,).
  """
  N, W = x.shape
  rows, each = pl.BlockSpec((ROWS, W), lambda i: (i, 0)), pl.BlockSpec((ROWS,), lambda i: (i,))
  row = pl.BlockSpec((W,), lambda i: (0,))
  numbers = each, ((N,), jnp.float32)
  outs = [(rows, (x.shape, x.dtype))] * (1 + len(added)) + [numbers, numbers]
  ins = [rows, row, row, *(rows for _ in added)]
  return _call(_norm, (N // ROWS,), ins, outs, (x, scale, bias, *added), interpret, eps=eps)


def norm_gradient(x, mean, share, scale, grad, around, with_branch, interpret=False):
  """Of what `norm` had and gave, of y's gradient, and of x's from elsewhere.

  Returns:
    x's gradient, all of it; sums over parts of the rows, (P, 2 or 3, W): the scale's gradient, the
    bias's, and with_branch those of x.
  """
  N, W = x.shape
  programs, steps = _split(N // ROWS, PROGRAMS)
  rows = pl.BlockSpec((ROWS * steps, W), lambda i: (i, 0))
  each, row = pl.BlockSpec((ROWS * steps,), lambda i: (i,)), pl.BlockSpec((W,), lambda i: (0,))
  count = 3 if with_branch else 2
  sums = pl.BlockSpec((None, count, W), lambda i: (i, 0, 0)), ((programs, count, W), jnp.float32)
  return _call(
    _norm_gradient, (programs,), [rows, each, each, row, rows, rows],
    [(rows, (x.shape, x.dtype)), sums], (x, mean, share, scale, grad, around), interpret,
    steps=steps,
  )  # fmt: skip


def gelu_gradient(x, grad, tanh, interpret=False):
  """x: (N, F), and GELU's gradient -> x's; sums of it over parts of the rows, (P, F) float32."""
  N, F = x.shape
  size = _piece(F)
  programs, steps = _split(N // ROWS, max(PROGRAMS * size // F, 1))
  block = pl.BlockSpec((ROWS * steps, size), lambda j, i: (i, j))
  sums = pl.BlockSpec((None, size), lambda j, i: (i, j)), ((programs, F), jnp.float32)
  return _call(
    _gelu_gradient, (F // size, programs), [block, block], [(block, (x.shape, x.dtype)), sums],
    (x, grad), interpret, tanh=tanh, steps=steps,
  )  # fmt: skip


def _split(count, least):
  """programs x steps = count, with as many steps, a power of two, as leave so many programs."""
  steps = 1
  while count % (2 * steps) == 0 and count // (2 * steps) >= least:
    steps *= 2
  return count // steps, steps


def _piece(W):
  return min(W & -W, LONGEST)


def _pieces(W):
  return [pl.ds(start, _piece(W)) for start in range(0, W, _piece(W))]


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
  x_ref, mean_ref, share_ref, scale_ref, grad_ref, around_ref, dx_ref, sums_ref, *, steps
):
  W = x_ref.shape[-1]
  pieces = _pieces(W)
  scale = [scale_ref[piece][None] for piece in pieces]
  count = sums_ref.shape[0]

  def some(i, sums):
    rows = pl.ds(i * ROWS, ROWS)
    mean, share = mean_ref[rows][:, None], share_ref[rows][:, None]
    unit = [(x_ref[rows, p].astype(jnp.float32) - mean) * share for p in pieces]
    grad = [grad_ref[rows, p].astype(jnp.float32) for p in pieces]
    scaled = [g * s for g, s in zip(grad, scale, strict=True)]
    own, along = _mean(scaled, W), _mean([s * u for s, u in zip(scaled, unit, strict=True)], W)
    new = []
    for p, s, u, g, old in zip(pieces, scaled, unit, grad, sums, strict=True):
      dx = share * (s - own - u * along) + around_ref[rows, p].astype(jnp.float32)
      dx_ref[rows, p] = dx.astype(dx_ref.dtype)
      new.append(tuple(a + b for a, b in zip(old, (g * u, g, dx)[:count], strict=True)))
    return new

  zeros = jnp.zeros((ROWS, pieces[0].size), jnp.float32)
  sums = jax.lax.fori_loop(0, steps, some, [(zeros,) * count] * len(pieces))
  for piece, found in zip(pieces, sums, strict=True):
    for i, x in enumerate(found):
      sums_ref[i, piece] = jnp.sum(x, axis=0)


def _gelu_gradient(x_ref, grad_ref, dx_ref, sums_ref, *, tanh, steps):
  def some(i, sums):
    rows = pl.ds(i * ROWS, ROWS)
    dx = _slope(x_ref[rows, :].astype(jnp.float32), tanh) * grad_ref[rows, :].astype(jnp.float32)
    dx_ref[rows, :] = dx.astype(dx_ref.dtype)
    return sums + dx

  sums = jax.lax.fori_loop(0, steps, some, jnp.zeros((ROWS, x_ref.shape[-1]), jnp.float32))
  sums_ref[...] = jnp.sum(sums, axis=0)


def _slope(x, tanh):
  """GELU's derivative with one exponential and one root, of a GPU's arithmetic the slowest."""
  reciprocal = lambda x: jax.lax.rsqrt(x) ** 2  # of what is at least 1
  if tanh:  # (1 + tanh u) / 2 = 1 / (1 + exp(-2 u))
    c = np.sqrt(8 / np.pi, dtype=np.float32)
    share = reciprocal(1 + jnp.exp(-c * x * (1 + 0.044715 * x * x)))
    return share + c * x * (1 + 3 * 0.044715 * x * x) * share * (1 - share)
  # Abramowitz and Stegun, 7.1.26: within 1.5e-7 of erf.
  bell = jnp.exp(-0.5 * x * x)
  t = reciprocal(1 + 0.3275911 * np.sqrt(0.5, dtype=np.float32) * jnp.abs(x))
  series = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
  tail = 0.5 * bell * t * functools.reduce(lambda total, a: total * t + a, series[::-1])
  return jnp.where(x < 0, tail, 1 - tail) + x * bell * np.sqrt(0.5 / np.pi, dtype=np.float32)
