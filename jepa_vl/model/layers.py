"""The pre-norm transformer block that both towers stack, scanned or unrolled."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jepa_vl import sharding
from jepa_vl.model import attention
from jepa_vl.sharding import constrain

REMAT = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  # What products and attention gave, and nothing that follows from it element by element.
  "names": jax.checkpoint_policies.save_only_these_names("qkv", "attention", "residual", "up"),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gelu(x, tanh):
  """GELU by erf or by tanh, computed in float32; keeps x alone for the backward pass."""
  return _gelu(x.astype(jnp.float32), tanh).astype(x.dtype)


def _gelu(x, tanh):
  # By erf, as PyTorch computes it; nn.gelu's erfc is exact far in the tail too, and three times
  # the time of a pass through memory on an H200.
  return nn.gelu(x) if tanh else x * (0.5 + 0.5 * jax.lax.erf(x * np.sqrt(0.5, dtype=np.float32)))


def _gelu_forward(x, tanh):
  return gelu(x, tanh), x


def _gelu_backward(tanh, x, grad):
  # Else the compiler takes what is computed again for what the forward pass had, and keeps that.
  x, grad = jax.lax.optimization_barrier((x, grad))
  y, pull = jax.vjp(lambda x: _gelu(x, tanh), x.astype(jnp.float32))
  return (pull(grad.astype(y.dtype))[0].astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x, scale, bias, eps):
  """Over the last axis, computed in float32; keeps x and two numbers a row for the backward."""
  return _layer_norm_forward(x, scale, bias, eps)[0]


def _layer_norm_forward(x, scale, bias, eps):
  x32 = x.astype(jnp.float32)
  mean = jnp.mean(x32, axis=-1, keepdims=True)
  variance = jnp.maximum(jnp.mean(x32**2, axis=-1, keepdims=True) - mean**2, 0)
  share = jax.lax.rsqrt(variance + eps)
  y = (x32 - mean) * (share * scale) + bias
  return y.astype(x.dtype), (x, scale, mean, share)


def _layer_norm_backward(eps, kept, grad):
  x, scale, mean, share = kept
  x, mean, share, grad = jax.lax.optimization_barrier((x, mean, share, grad))
  unit, grad = (x.astype(jnp.float32) - mean) * share, grad.astype(jnp.float32)
  rows = tuple(range(x.ndim - 1))
  own = lambda v: jnp.mean(v, axis=-1, keepdims=True)
  scaled = grad * scale
  dx = share * (scaled - own(scaled) - unit * own(scaled * unit))
  return dx.astype(x.dtype), jnp.sum(grad * unit, axis=rows), jnp.sum(grad, axis=rows)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(nn.Module):
  """`nn.LayerNorm` with less kept between forward and backward pass."""

  eps: float

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
    bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
    return layer_norm(x, scale, bias, self.eps)


class Qkv(nn.Module):
  """`nn.DenseGeneral` from W to (3, H, K); apart: its three parts as arrays of their own.

  Three products then: cut out of one product's result, each part would be copied once more.
  """

  heads: int
  apart: bool
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
  """Multi-head self-attention; mask: (B, 1, 1 or L, L) bool over keys or None.

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
  def __call__(self, x, mask):
    W = x.shape[-1]
    apart = self.implementation in attention.APART
    qkv = Qkv(self.heads, apart, self.kernel_init, self.dtype, name="qkv")(x)
    qkv = checkpoint_name(qkv, "qkv")
    x = attention.attend(
      qkv, mask, causal=self.causal, implementation=self.implementation, length=self.length
    )  # (B, L, H, K)
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
    x = gelu(x, self.gelu_tanh)
    return nn.Dense(W, kernel_init=self.out_init, dtype=self.dtype, name="down")(x)


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)); x: (B, L, W), `length` as of Attention."""

  heads: int
  causal: bool
  length: int
  attention: str
  gelu_tanh: bool
  norm_eps: float
  kernel_init: Any
  out_init: Any
  dtype: Any

  @nn.compact
  def __call__(self, x, mask):
    norm = lambda name: LayerNorm(self.norm_eps, name=name)
    attn = Attention(
      self.heads, self.causal, self.length, self.attention, self.kernel_init, self.out_init,
      self.dtype, name="attn",
    )  # fmt: skip
    mlp = Mlp(self.gelu_tanh, self.kernel_init, self.out_init, self.dtype, name="mlp")
    x = attention.settle(constrain(x, "batch", None, None))
    x = attention.settle(x + attn(norm("attn_norm")(x), mask))
    x = checkpoint_name(x, "residual")
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
    length = x.shape[1]
    x, mask = attention.pad(x, mask, self.block["attention"])
    return blocks(**self.block, length=length, name="blocks")(x, mask)[0][:, :length]


def resample_positions(table, grid):
  """Bicubic, antialiased resampling of patch positions (h*w, W) from a square grid to `grid`."""
  side = round(table.shape[0] ** 0.5)
  if (side, side) == tuple(grid):
    return table
  square = table.reshape(side, side, -1)
  square = jax.image.resize(square, (*grid, table.shape[-1]), "cubic", antialias=True)
  return jnp.reshape(square, (grid[0] * grid[1], -1))
