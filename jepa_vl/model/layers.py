"""The pre-norm transformer block that both towers stack, scanned or unrolled."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jepa_vl import sharding
from jepa_vl.model import attention
from jepa_vl.model.pointwise import LayerNorm, gelu
from jepa_vl.sharding import constrain

REMAT = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  # What products and attention gave, and nothing that follows from it element by element.
  "names": jax.checkpoint_policies.save_only_these_names("qkv", "attention", "out", "up"),
}


class Qkv(nn.Module):
  """`nn.DenseGeneral` from W to (3, H, K), and its bias; apart: its three parts as arrays of their
  own.

  Three products then: cut out of one product's result, each part would be copied once more.
  Only the queries' bias is in the result, and has its gradient from what takes both. That of the
  keys adds the same number to all logits of a query, which changes no weight; that of the values
  comes out of the attention as it is, weights adding up to one, and is left to what follows.
  select: as of Block; queries are then of the selected tokens, (G, g, H, K), and all three apart.
  """

  heads: int
  apart: bool
  kernel_init: Any
  dtype: Any

  @nn.compact
  def __call__(self, x, select=None):
    W = x.shape[-1]
    shape = (3, self.heads, W // self.heads)
    flat = lambda key, shape: self.kernel_init(key, (W, 3 * W)).reshape(shape)  # as DenseGeneral
    kernel = self.param("kernel", flat, (W, *shape))
    bias = self.param("bias", nn.initializers.zeros, shape)
    x, kernel, added = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    added = jax.lax.stop_gradient(added)
    if self.apart or select:
      q = _project(select(x) if select else x, kernel[:, 0], added[0])
      return (q, *(_project(x, kernel[:, i]) for i in (1, 2))), bias
    return _project(x, kernel, added.at[1:].set(0)), bias


def _project(x, kernel, bias=0):
  """x (B, L, W), kernel (W, ..., H, K) and bias (..., H, K) or 0 -> (B, L, ..., H, K)."""
  if kernel.ndim > 3 and sharding.axis_size("tensor") > 1:  # heads stay with their devices
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ()))) + bias
  # With the bias along one axis XLA for GPUs adds it within the product.
  y = x @ kernel.reshape(len(kernel), -1) + jnp.ravel(bias)
  return y.reshape(*x.shape[:-1], *kernel.shape[1:])


class Attention(nn.Module):
  """Multi-head self-attention -> its branch, as of Dense; mask as of `attention.attend`, select as
  of Block.

  length: tokens of a row; what lies behind them is padding that none of them sees.
  """

  heads: int
  causal: bool
  length: int
  implementation: str
  kernel_init: Any
  out_init: Any
  dtype: Any

  @nn.compact
  def __call__(self, x, mask, select=None):
    W = x.shape[-1]
    project = Qkv(
      self.heads, self.implementation in attention.APART, self.kernel_init, self.dtype, name="qkv"
    )
    packed = mask is not None and mask.ndim == 2
    if select and not packed:  # packed, a selected token may lie in any row of its group
      (q, k, v), bias = checkpoint_name(project(x, select), "qkv")
      visible = attention.visible(x.shape[:2], mask, self.causal, self.length, select)
      x = attention.read(attention.with_bias(q, bias[0]), k, v, visible)
    else:
      qkv, bias = checkpoint_name(project(x), "qkv")
      x = attention.attend(
        qkv, mask, causal=self.causal, implementation=self.implementation, length=self.length,
        bias=bias[0],
      )  # (B, L, H, K)  # fmt: skip
      if select:
        heads = x.shape[2:]
        x = select(x.reshape(*x.shape[:2], W))
        x = x.reshape(*x.shape[:2], *heads)
    x = checkpoint_name(x, "attention")
    return Dense(W, 2, self.out_init, self.dtype, name="out")(x, bias[2])


class Dense(nn.Module):
  """`nn.DenseGeneral` over the last `axes` axes -> (..., F) and the bias in it, (F,).

  The bias has its gradient from what takes both, where what that is the sum of is at hand.
  left_out: a bias of x that is not in it yet; what the kernel makes of it is part of the bias.
  """

  features: int
  axes: int
  kernel_init: Any
  dtype: Any

  @nn.compact
  def __call__(self, x, left_out=None):
    shape = (*x.shape[x.ndim - self.axes :], self.features)
    flat = (math.prod(shape[:-1]), self.features)  # as DenseGeneral
    kernel = self.param(
      "kernel", lambda key, shape: self.kernel_init(key, flat).reshape(shape), shape
    )
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    if left_out is not None:
      bias = bias + jnp.tensordot(left_out, kernel, self.axes)
    x, kernel, added = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    last = tuple(range(x.ndim - self.axes, x.ndim))
    y = jax.lax.dot_general(x, kernel, ((last, tuple(range(self.axes))), ((), ())))
    return y + jax.lax.stop_gradient(added), bias


class Mlp(nn.Module):
  """Dense to 4W, GELU (erf or tanh), Dense to W, a branch."""

  gelu_tanh: bool
  pointwise: str
  kernel_init: Any
  out_init: Any
  dtype: Any

  @nn.compact
  def __call__(self, x):
    W = x.shape[-1]
    x, bias = Dense(4 * W, 1, self.kernel_init, self.dtype, name="up")(x)
    x = checkpoint_name(x, "up")
    x = gelu(x, bias, self.gelu_tanh, self.pointwise)
    return Dense(W, 1, self.out_init, self.dtype, name="down")(x)


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)); x: (B, L, W), `length` as of Attention.

  Takes and returns a pair, x and the branch that is to be added to it yet, as of Dense, or None;
  it returns one only if `deferred`: the next block's norm then adds it in passing.
  select: from (B, L, W) to the tokens that are wanted, (G, g, W); what comes after the attention,
  three quarters of the work, is then computed for these alone, and unless packed their queries too.
  """

  heads: int
  causal: bool
  length: int
  attention: str
  pointwise: str
  gelu_tanh: bool
  norm_eps: float
  kernel_init: Any
  out_init: Any
  dtype: Any
  deferred: bool = False

  @nn.compact
  def __call__(self, carry, mask, select=None):
    attn = Attention(
      self.heads, self.causal, self.length, self.attention, self.kernel_init, self.out_init,
      self.dtype, name="attn",
    )  # fmt: skip
    mlp = Mlp(
      self.gelu_tanh, self.pointwise, self.kernel_init, self.out_init, self.dtype, name="mlp"
    )
    x, y = self._norm("attn_norm", *carry)
    y, bias = attn(y, mask, select)
    # Not the sum that the norm gives: the norm itself would want the product again.
    branch = checkpoint_name(y, "out"), bias
    x, y = self._norm("mlp_norm", select(x) if select else x, branch)
    branch = mlp(y)
    carry = (x, branch) if self.deferred else (add(x, branch), None)
    return carry, None  # the pair that nn.scan wants

  def _norm(self, name, x, branch):
    settled = lambda x: attention.settle(constrain(x, "batch", None, None))
    branch = branch and (settled(branch[0]), branch[1])
    return LayerNorm(self.norm_eps, self.pointwise, name=name)(settled(x), branch)


def add(x, branch):
  """x with a branch added, as of Dense."""
  return x + attention.with_bias(*branch)


class Blocks(nn.Module):
  """`depth` blocks whose parameters are stacked along a leading layer dimension.

  Scanned and unrolled share that one layout, so a checkpoint of either opens in the other:
  unrolling is `jax.lax.scan` with as many copies of the body as there are layers. `select` as of
  Block, for the last layer: unrolled it computes no more than these need; scanned, all tokens
  are computed and then selected, since the layers' parameters would have to be copied.
  """

  depth: int
  scan: bool
  remat: str
  block: dict

  @nn.compact
  def __call__(self, x, mask=None, select=None):
    if self.remat not in REMAT:
      raise ValueError(f"model.remat must be one of auto, {', '.join(REMAT)}, got {self.remat!r}")
    length = x.shape[1]
    x, mask = attention.pad(x, mask, self.block["attention"])
    block = dict(**self.block, length=length)
    unpadded = lambda x: x[:, :length]
    if select and not self.scan and not self.is_initializing():
      return self._one_by_one(x, mask, block, lambda x: select(unpadded(x)))
    layer = Block
    if REMAT[self.remat]:
      # Inside a loop the compiler cannot merge the recomputation with the forward pass anyway.
      layer = nn.remat(Block, policy=REMAT[self.remat], prevent_cse=not self.scan)
    blocks = nn.scan(
      layer,
      variable_axes={"params": 0, "intermediates": 0},  # the latter only for two_tower.look_inside
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=self.depth,
      unroll=1 if self.scan else self.depth,
    )
    (x, _), _ = blocks(**block, name="blocks")((x, None), mask)
    x = unpadded(x)
    return select(x) if select else x

  def _one_by_one(self, x, mask, block, select):
    params, policy = self.variables["params"]["blocks"], REMAT[self.remat]
    # Deferred, both of the pair would have to be kept to compute a layer again.
    deferred = not policy

    def layer(deferred, select=None):
      body = Block(**block, deferred=deferred, parent=None)
      f = lambda carry, params: body.apply({"params": params}, carry, mask, select)
      return jax.checkpoint(f, policy=policy) if policy else f

    before, last = (jax.tree.map(lambda p, cut=cut: p[cut], params) for cut in (slice(-1), -1))
    # All layers then are one traced function; for the first it is one array's traffic for nothing.
    nothing = jnp.zeros_like(x), jnp.zeros_like(last["mlp"]["down"]["bias"])
    carry = x, (nothing if deferred else None)
    with jax.named_scope("blocks"):
      carry, _ = jax.lax.scan(layer(deferred), carry, before, unroll=max(self.depth - 1, 1))
      (x, _), _ = layer(False, select)(carry, last)
    return x


def resample_positions(table, grid):
  """Bicubic, antialiased resampling of patch positions (h*w, W) from a square grid to `grid`."""
  side = round(table.shape[0] ** 0.5)
  if (side, side) == tuple(grid):
    return table
  square = table.reshape(side, side, -1)
  square = jax.image.resize(square, (*grid, table.shape[-1]), "cubic", antialias=True)
  return jnp.reshape(square, (grid[0] * grid[1], -1))
