"""The pre-norm transformer block that both towers stack, scanned or unrolled."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jepa_vl.model.attention import attend
from jepa_vl.sharding import constrain

REMAT = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  # What products and attention gave, and nothing that follows from it element by element.
  "names": jax.checkpoint_policies.save_only_these_names("qkv", "attention", "residual", "up"),
}


class Attention(nn.Module):
  """Multi-head self-attention; mask: (B, 1, 1 or L, L) bool over keys or None."""

  heads: int
  causal: bool
  implementation: str
  kernel_init: Any
  out_init: Any
  dtype: Any

  @nn.compact
  def __call__(self, x, mask):
    W = x.shape[-1]
    shape = (3, self.heads, W // self.heads)
    qkv = nn.DenseGeneral(shape, kernel_init=self.kernel_init, dtype=self.dtype, name="qkv")(x)
    qkv = checkpoint_name(qkv, "qkv")
    x = attend(qkv, mask, causal=self.causal, implementation=self.implementation)  # (B, L, H, K)
    x = checkpoint_name(x, "attention")
    return nn.DenseGeneral(
      W, axis=(-2, -1), kernel_init=self.out_init, dtype=self.dtype, name="out"
    )(x)


class Mlp(nn.Module):
  """Dense to 4W, GELU (erf or tanh), Dense to W."""

  gelu_tanh: bool
  kernel_init: Any
  out_init: Any
  dtype: Any

  @nn.compact
  def __call__(self, x):
    W = x.shape[-1]
    x = nn.Dense(4 * W, kernel_init=self.kernel_init, dtype=self.dtype, name="up")(x)
    x = checkpoint_name(x, "up")
    x = nn.gelu(x, approximate=self.gelu_tanh)
    return nn.Dense(W, kernel_init=self.out_init, dtype=self.dtype, name="down")(x)


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)); x: (B, L, W)."""

  heads: int
  causal: bool
  attention: str
  gelu_tanh: bool
  norm_eps: float
  kernel_init: Any
  out_init: Any
  dtype: Any

  @nn.compact
  def __call__(self, x, mask):
    norm = lambda name: nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name=name)
    attn = Attention(
      self.heads, self.causal, self.attention, self.kernel_init, self.out_init, self.dtype,
      name="attn",
    )  # fmt: skip
    mlp = Mlp(self.gelu_tanh, self.kernel_init, self.out_init, self.dtype, name="mlp")
    x = constrain(x, "batch", None, None)
    x = checkpoint_name(x + attn(norm("attn_norm")(x), mask), "residual")
    x = x + mlp(norm("mlp_norm")(x))
    return x, None  # the pair that nn.scan wants


class Blocks(nn.Module):
  """`depth` blocks whose parameters are stacked along a leading layer dimension.

  Scanned and unrolled share that one layout, so a checkpoint of either opens in the other:
  unrolling is `jax.lax.scan` with as many copies of the body as there are layers.
  """

  depth: int
  scan: bool
  remat: str
  block: dict

  @nn.compact
  def __call__(self, x, mask=None):
    block = Block
    if self.remat not in REMAT:
      raise ValueError(f"model.remat must be one of {', '.join(REMAT)}, got {self.remat!r}")
    if REMAT[self.remat]:
      # Inside a loop the compiler cannot merge the recomputation with the forward pass anyway.
      block = nn.remat(Block, policy=REMAT[self.remat], prevent_cse=not self.scan)
    blocks = nn.scan(
      block,
      variable_axes={"params": 0, "intermediates": 0},  # the latter only for two_tower.look_inside
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=self.depth,
      unroll=1 if self.scan else self.depth,
    )
    return blocks(**self.block, name="blocks")(x, mask)[0]


def resample_positions(table, grid):
  """Bicubic, antialiased resampling of patch positions (h*w, W) from a square grid to `grid`."""
  side = round(table.shape[0] ** 0.5)
  if (side, side) == tuple(grid):
    return table
  square = table.reshape(side, side, -1)
  square = jax.image.resize(square, (*grid, table.shape[-1]), "cubic", antialias=True)
  return jnp.reshape(square, (grid[0] * grid[1], -1))
