"""The pre-norm transformer block that both towers stack, scanned or unrolled."""

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
  "names": jax.checkpoint_policies.save_only_these_names("qkv", "attention", "residual", "up"),
}


class Qkv(nn.Module):
  """`nn.DenseGeneral` from W to (3, H, K); apart: its three parts as arrays of their own.

  Three products then: cut out of one product's result, each part would be copied once more.
  bias_apart: the bias has no gradient from here, but from what takes it beside the result.
  """

  heads: int
  apart: bool
  bias_apart: bool
  kernel_init: Any
  dtype: Any

  @nn.compact
  def __call__(self, x):
    W = x.shape[-1]
    shape = (3, self.heads, W // self.heads)
    flat = lambda key, shape: self.kernel_init(key, (W, 3 * W)).reshape(shape)  # as DenseGeneral
    kernel = self.param("kernel", flat, (W, *shape))
    bias = self.param("bias", nn.initializers.zeros, shape)
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    if self.bias_apart:
      bias = jax.lax.stop_gradient(bias)
    # With the bias along one axis XLA for GPUs adds it within the product.
    dense = lambda kernel, bias: x @ kernel.reshape(W, -1) + bias.reshape(-1)
    if self.apart:
      parts = (dense(kernel[:, i], bias[i]) for i in range(3))
      return tuple(part.reshape(*x.shape[:-1], *shape[1:]) for part in parts)
    if sharding.axis_size("tensor") == 1:
      return dense(kernel, bias).reshape(*x.shape[:-1], *shape)
    # Heads stay with their devices.
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ()))) + bias


class Attention(nn.Module):
  """Multi-head self-attention; mask as of `attention.attend`, select as of Block.

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
    apart, ours = self.implementation in attention.APART, self.implementation == "pallas"
    project = Qkv(self.heads, apart, ours, self.kernel_init, self.dtype, name="qkv")
    qkv = checkpoint_name(project(x), "qkv")
    x = attention.attend(
      qkv, mask, causal=self.causal, implementation=self.implementation, length=self.length,
      bias=project.get_variable("params", "bias") if ours else None,
    )  # (B, L, H, K)  # fmt: skip
    x = checkpoint_name(x, "attention")
    if select:
      heads = x.shape[2:]
      x = select(x.reshape(*x.shape[:2], W))
      x = x.reshape(*x.shape[:2], *heads)
    return nn.DenseGeneral(
      W, axis=(-2, -1), kernel_init=self.out_init, dtype=self.dtype, name="out"
    )(x)


class Up(nn.Module):
  """`nn.Dense` whose bias has its gradient from what takes both results: x (..., F), bias (F,)."""

  features: int
  kernel_init: Any
  dtype: Any

  @nn.compact
  def __call__(self, x):
    kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    x, kernel, added = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    return x @ kernel + jax.lax.stop_gradient(added), bias


class Mlp(nn.Module):
  """Dense to 4W, GELU (erf or tanh), Dense to W."""

  gelu_tanh: bool
  pointwise: str
  kernel_init: Any
  out_init: Any
  dtype: Any

  @nn.compact
  def __call__(self, x):
    W = x.shape[-1]
    x, bias = Up(4 * W, self.kernel_init, self.dtype, name="up")(x)
    x = checkpoint_name(x, "up")
    x = gelu(x, bias, self.gelu_tanh, self.pointwise)
    return nn.Dense(W, kernel_init=self.out_init, dtype=self.dtype, name="down")(x)


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)); x: (B, L, W), `length` as of Attention.

  select: from (B, L, W) to the tokens that are wanted, (G, g, W); what comes after the attention,
  three quarters of the work, is then computed for these alone.
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

  @nn.compact
  def __call__(self, x, mask, select=None):
    norm = lambda name: LayerNorm(self.norm_eps, self.pointwise, name=name)
    attn = Attention(
      self.heads, self.causal, self.length, self.attention, self.kernel_init, self.out_init,
      self.dtype, name="attn",
    )  # fmt: skip
    mlp = Mlp(
      self.gelu_tanh, self.pointwise, self.kernel_init, self.out_init, self.dtype, name="mlp"
    )
    x = attention.settle(constrain(x, "batch", None, None))
    x, y = norm("attn_norm")(x)
    x = attention.settle((select(x) if select else x) + attn(y, mask, select))
    x = checkpoint_name(x, "residual")
    x, y = norm("mlp_norm")(x)
    x = x + mlp(y)
    return x, None  # the pair that nn.scan wants


class Blocks(nn.Module):
  """`depth` blocks whose parameters are stacked along a leading layer dimension.

  Scanned and unrolled share that one layout, so a checkpoint of either opens in the other:
  unrolling is `jax.lax.scan` with as many copies of the body as there are layers. `select` as of
  Block, for the last layer: unrolled it computes no other tokens after its attention; scanned, all
  are computed and then selected, since the layers' parameters would have to be copied.
  """

  depth: int
  scan: bool
  remat: str
  block: dict

  @nn.compact
  def __call__(self, x, mask=None, select=None):
    if self.remat not in REMAT:
      raise ValueError(f"model.remat must be one of {', '.join(REMAT)}, got {self.remat!r}")
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
    x = unpadded(blocks(**block, name="blocks")(x, mask)[0])
    return select(x) if select else x

  def _one_by_one(self, x, mask, block, select):
    block, params = Block(**block, parent=None), self.variables["params"]["blocks"]

    def layer(select):
      f = lambda x, params: block.apply({"params": params}, x, mask, select)
      return jax.checkpoint(f, policy=REMAT[self.remat]) if REMAT[self.remat] else f

    before, last = (jax.tree.map(lambda p, cut=cut: p[cut], params) for cut in (slice(-1), -1))
    with jax.named_scope("blocks"):
      x, _ = jax.lax.scan(layer(None), x, before, unroll=max(self.depth - 1, 1))
      return layer(select)(x, last)[0]


def resample_positions(table, grid):
  """Bicubic, antialiased resampling of patch positions (h*w, W) from a square grid to `grid`."""
  side = round(table.shape[0] ** 0.5)
  if (side, side) == tuple(grid):
    return table
  square = table.reshape(side, side, -1)
  square = jax.image.resize(square, (*grid, table.shape[-1]), "cubic", antialias=True)
  return jnp.reshape(square, (grid[0] * grid[1], -1))
