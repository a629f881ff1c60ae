"""Both towers with their embedding heads and predictors: one module, one call."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jepa_vl.model.gpt import GPT
from jepa_vl.model.heads import Head
from jepa_vl.model.vit import STATISTICS, ViT, normalise

# width, depth, heads; the text tower copies the image tower (METHOD: "same width, layers, heads").
SIZES = {
  "nano": (128, 4, 2),
  "micro": (192, 6, 3),
  "tiny": (192, 12, 3),
  "small": (384, 12, 6),
  "base": (768, 12, 12),
  "large": (1024, 24, 16),
  "huge": (1280, 32, 16),
}


class TwoTower(nn.Module):
  """batch -> out: embeddings z_img, z_txt and predictions p_img, p_txt, (B, D) float32.

  A batch may hold images, captions or both; out then also has `cls` (B, W) and `patches`
  (B, N, W), the frozen-backbone features.
  """

  size: str
  image_size: int
  patch_size: int
  statistics: str
  embed_dim: int
  hidden_dim: int
  predictor_depth: int
  predictor_dropout: float
  vocab_size: int
  text_length: int
  readout: str
  scan: bool
  remat: str
  dtype: Any

  def setup(self):
    if self.size not in SIZES:
      raise ValueError(f"model.size must be one of {', '.join(SIZES)}, got {self.size!r}")
    if self.statistics not in STATISTICS:
      raise ValueError(
        f"model.statistics must be one of {', '.join(STATISTICS)}, got {self.statistics!r}"
      )
    width, depth, heads = SIZES[self.size]
    common = dict(
      width=width, depth=depth, heads=heads, scan=self.scan, remat=self.remat, dtype=self.dtype
    )
    self.image = ViT(patch_size=self.patch_size, image_size=self.image_size, **common)
    self.text = GPT(
      vocab_size=self.vocab_size, length=self.text_length, readout=self.readout, **common
    )
    head = lambda depth, dropout: Head(
      depth, self.hidden_dim, self.embed_dim, dropout, self.dtype
    )
    self.image_head, self.text_head = head(1, 0.0), head(1, 0.0)
    self.image_predictor = head(self.predictor_depth, self.predictor_dropout)
    self.text_predictor = head(self.predictor_depth, self.predictor_dropout)

  def __call__(self, batch, *, train):
    out = {}
    if "image" in batch:
      cls, patches = self.image(normalise(batch["image"], self.statistics))
      z = self.image_head(cls, train=train)
      out |= {"z_img": z, "p_img": self.image_predictor(z, train=train)}
      out |= {"cls": cls, "patches": patches}
    if "text" in batch:
      z = self.text_head(self.text(batch["text"], batch["mask"]), train=train)
      out |= {"z_txt": z, "p_txt": self.text_predictor(z, train=train)}
    return out


def from_config(model, text, *, vocab_size, dtype):
  """TwoTower from the config's `model` and `text` sub-trees.

  Raises:
    ValueError: the patch does not divide the image.
  """
  if model.image_size % model.patch_size:
    raise ValueError(
      f"model.patch_size={model.patch_size} does not divide model.image_size={model.image_size}; "
      f"use a multiple of {model.patch_size}, for example "
      f"{max(model.image_size // model.patch_size, 1) * model.patch_size}"
    )
  return TwoTower(
    size=model.size,
    image_size=model.image_size,
    patch_size=model.patch_size,
    statistics=model.statistics,
    embed_dim=model.embed_dim,
    hidden_dim=model.hidden_dim,
    predictor_depth=model.predictor_depth,
    predictor_dropout=model.predictor_dropout,
    vocab_size=vocab_size,
    text_length=text.length,
    readout=text.readout,
    scan=model.scan,
    remat=model.remat,
    dtype=dtype,
  )


def dummy_batch(model, rows):
  """The smallest batch that fixes every parameter's shape."""
  S, L = model.image_size, model.text_length
  return {
    "image": jnp.zeros((rows, S, S, 3), jnp.uint8),
    "text": jnp.zeros((rows, L), jnp.int32),
    "mask": jnp.ones((rows, L), bool),
  }


def forward_flops(model):
  """Analytic FLOPs of one image-caption pair forward: matrix products only, 2 per multiply-add.

  ViT-B/16 at 224 px with GPT-2-base at 77 tokens and D = 256: 48.5e9; a training step costs three
  times as much.
  """
  width, depth, _ = SIZES[model.size]
  N, L = (model.image_size // model.patch_size) ** 2, model.text_length
  D, hidden = model.embed_dim, model.hidden_dim
  tower = lambda n: depth * (24 * n * width**2 + 4 * n**2 * width)
  patches = 2 * N * width * 3 * model.patch_size**2
  inner = max(model.predictor_depth - 1, 0) * hidden**2
  predictor = 2 * (2 * D * hidden + inner) if model.predictor_depth else 0
  heads = 2 * (2 * (width * hidden + hidden * D) + predictor)
  return tower(N + 1) + patches + tower(L) + heads
