"""Vision transformer as timm's vit_*_patch16_224: CLS token, pre-norm, learned positions."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jepa_vl.model.layers import Blocks, resample_positions
from jepa_vl.sharding import constrain

# Per-channel mean and standard deviation of images in [0, 1].
STATISTICS = {
  "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
  "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def normalise(images, statistics):
  """uint8 images (B, S, S, 3) -> float32, standardised per channel; floats pass unchanged."""
  if images.dtype != jnp.uint8:
    return images
  mean, std = (jnp.asarray(s, jnp.float32) for s in STATISTICS[statistics])
  return (images.astype(jnp.float32) / 255.0 - mean) / std


def kept_patches(count, dropout):
  """How many of an image's patches training looks at.

  Raises:
    ValueError: `dropout` is no share, or leaves none.
  """
  kept = round(count * (1 - dropout))
  if not 0 <= dropout < 1 or not kept:
    raise ValueError(
      f"model.patch_dropout={dropout:g} must be a share from 0 to below 1 that leaves some of the "
      f"{count} patches of an image or view"
    )
  return kept


class ViT(nn.Module):
  """Images (B, S, S, 3) -> CLS (B, W) and patch tokens (B, N, W), both after the final norm.

  Without `with_patches` there are none, (B, 0, W), which saves most of the last layer's work.

  `keep`, (B, N') int32: the patches of each image that are looked at; the others are not, and the
  tokens are of these, in this order (FLIP, arXiv 2212.00794).

  `image_size` fixes the grid of the position table; any other size that the patch divides is
  served by resampling it. Initialisation as timm: normal 0.02, zero biases.
  """

  width: int
  depth: int
  heads: int
  patch_size: int
  image_size: int
  scan: bool
  remat: str
  attention: str
  pointwise: str
  dtype: Any

  @nn.compact
  def __call__(self, images, keep=None, with_patches=True):
    B, H, W, _ = images.shape
    p = self.patch_size
    if H % p or W % p:
      raise ValueError(
        f"model.patch_size={p} does not divide the image size {H}x{W}; "
        f"use a multiple of {p}, for example {max(H // p, 1) * p}"
      )
    init = nn.initializers.normal(0.02)  # timm truncates at 100 standard deviations: not at all
    grid = (H // p, W // p)
    patches = images.reshape(B, grid[0], p, grid[1], p, 3).transpose(0, 1, 3, 2, 4, 5)
    patches = patches.reshape(B, grid[0] * grid[1], p * p * 3)  # (B, N, p p 3)
    if keep is not None:  # along an axis, so that no patch leaves its device
      patches = jnp.take_along_axis(patches, keep[..., None], axis=1)
    # timm leaves this convolution at PyTorch's default initialisation.
    fan_in_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    x = nn.Dense(self.width, kernel_init=fan_in_uniform, dtype=self.dtype, name="patch_embedding")(
      patches
    )

    cls = self.param("cls", nn.initializers.normal(1e-6), (1, 1, self.width))
    rows = 1 + (self.image_size // p) ** 2
    positions = self.param("position_embedding", init, (rows, self.width))
    cls = (cls + positions[:1]).astype(x.dtype)
    positions = resample_positions(positions[1:], grid)
    # Taken in float32, in which the gradients of a position's many patches are then added up.
    x = x + (positions if keep is None else positions[keep]).astype(x.dtype)
    x = jnp.concatenate([jnp.broadcast_to(cls, (B, 1, self.width)), x], axis=1)
    x = constrain(x, "batch", None, None)  # (B, 1 + N, W)

    block = dict(
      heads=self.heads, causal=False, attention=self.attention, pointwise=self.pointwise,
      gelu_tanh=False, norm_eps=1e-6, kernel_init=init, out_init=init, dtype=self.dtype,
    )  # fmt: skip
    with jax.named_scope("vit"):
      cls_alone = None if with_patches else lambda x: x[:, :1]
      x = Blocks(self.depth, self.scan, self.remat, block, name="tower")(x, select=cls_alone)
    x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="final_norm")(x)
    return x[:, 0], x[:, 1:]
