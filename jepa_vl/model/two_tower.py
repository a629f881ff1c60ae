"""Both towers with their embedding heads and predictors: one module, one call."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jepa_vl.model import attention, pointwise
from jepa_vl.model.gpt import GPT
from jepa_vl.model.heads import Head
from jepa_vl.model.vit import STATISTICS, ViT, kept_patches, normalise
from jepa_vl.sharding import constrain

# What predicts the caption where an image has several views.
PREDICT_FROM = ("views", "mean")

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

  A batch may hold images, captions or both; captions one to a row (`text`, `mask`) or several
  (`packed_text`, `packed_position`, `packed_readout`, as GPT takes them). Of images (`image`), out
  also has the frozen-backbone features, `cls` (B, W) and, but for training, which has no use for
  them, `patches` (B, N, W). Of several views of each image (`global` (B, Vg, S, S, 3) and, if any,
  `local` (B, Vl, S', S', 3): LeVLJEPA+), out has the views' embeddings, `views` (V, B, D), global
  ones first, and the first one's `cls`; z_img is then the mean of the global ones, and p_img is
  predicted from every view, (V, B, D), or from that mean (`predict_from`).
  In training the image tower sees all but a share `patch_dropout` of the patches of every image or
  view, drawn for each from the stream "dropout".
  Each of `scalars`, pairs of name and initial value, is a learned scalar of that name in out.
  """

  size: str
  image_size: int
  patch_size: int
  statistics: str
  embed_dim: int
  hidden_dim: int
  predictor_depth: int
  predictor_dropout: float
  predict_from: str
  patch_dropout: float
  scalars: tuple
  vocab_size: int
  text_length: int
  readout: str
  scan: bool
  remat: str
  attention: str
  pointwise: str
  dtype: Any

  def setup(self):
    if self.statistics not in STATISTICS:
      raise ValueError(
        f"model.statistics must be one of {', '.join(STATISTICS)}, got {self.statistics!r}"
      )
    if self.predict_from not in PREDICT_FROM:
      raise ValueError(
        f"model.predict_from must be one of {', '.join(PREDICT_FROM)}, got {self.predict_from!r}"
      )
    _, depth, heads = SIZES[self.size]
    common = dict(
      width=width(self.size), depth=depth, heads=heads, scan=self.scan, remat=self.remat,
      attention=self.attention, pointwise=self.pointwise, dtype=self.dtype,
    )  # fmt: skip
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
    self.learned = {
      name: self.param(name, nn.initializers.constant(value), ()) for name, value in self.scalars
    }

  def __call__(self, batch, *, train):
    out = dict(self.learned)
    if "image" in batch:
      cls, patches = self._look(batch["image"], train)
      z = self.image_head(cls, train=train)
      out |= {"z_img": z, "p_img": self.image_predictor(z, train=train)}
      out |= {"cls": cls} if train else {"cls": cls, "patches": patches}
    if "global" in batch:
      out |= self._embed_views(batch, train)
    if "text" in batch or "packed_text" in batch:
      z = self.text_head(self._read(batch), train=train)
      out |= {"z_txt": z, "p_txt": self.text_predictor(z, train=train)}
    return out

  def _look(self, images, train):
    B, H, W, _ = images.shape
    count, keep = (H // self.patch_size) * (W // self.patch_size), None
    if train and self.patch_dropout:
      draw = jax.random.uniform(self.make_rng("dropout"), (B, count))
      order = jnp.argsort(constrain(draw, "batch", None), axis=1)
      keep = order[:, : kept_patches(count, self.patch_dropout)]
    return self.image(normalise(images, self.statistics), keep, with_patches=not train)

  def _read(self, batch):
    if "text" in batch:
      return self.text(batch["text"], batch["mask"])
    return self.text(
      batch["packed_text"], position=batch["packed_position"], readout=batch["packed_readout"]
    )

  def _embed_views(self, batch, train):
    # One tower call per size, and one pass of each BatchNorm over all views. The views of an image
    # are neighbours in the rows, so that no row leaves its device.
    groups = [batch[k] for k in ("global", "local") if k in batch]
    B = groups[0].shape[0]
    rows = lambda x: x.reshape(-1, *x.shape[2:])  # (B, V, ...) -> (B V, ...)
    by_view = lambda x: x.reshape(B, -1, x.shape[-1]).swapaxes(0, 1)  # (B V, D) -> (V, B, D)
    cls = [self._look(rows(x), train)[0] for x in groups]
    cls = jnp.concatenate([x.reshape(B, -1, x.shape[-1]) for x in cls], axis=1)  # (B, V, W)
    z = self.image_head(rows(cls), train=train)
    views = by_view(z)
    mean = views[: groups[0].shape[1]].mean(axis=0)
    if self.predict_from == "views":
      p = by_view(self.image_predictor(z, train=train))
    else:
      p = self.image_predictor(mean, train=train)
    return {"views": views, "z_img": mean, "p_img": p, "cls": cls[:, 0]}


def from_config(model, text, *, vocab_size, dtype, scalars, device=None):
  """TwoTower from the config's `model` and `text` sub-trees.

  scalars: {name: initial value} of what `objectives.learned_scalars` asks for. device: one of those
  that compute, for what `model.attention` and `model.pointwise` leave to it.

  Raises:
    ValueError: the patch does not divide the image.
  """
  if model.image_size % model.patch_size:
    raise ValueError(
      f"model.patch_size={model.patch_size} does not divide model.image_size={model.image_size}; "
      f"use a multiple of {model.patch_size}, for example "
      f"{max(model.image_size // model.patch_size, 1) * model.patch_size}"
    )
  lengths = 1 + (model.image_size // model.patch_size) ** 2, text.length
  size = width(model.size) // SIZES[model.size][2]  # of a head
  return TwoTower(
    size=model.size,
    image_size=model.image_size,
    patch_size=model.patch_size,
    statistics=model.statistics,
    embed_dim=model.embed_dim,
    hidden_dim=model.hidden_dim,
    predictor_depth=model.predictor_depth,
    predictor_dropout=model.predictor_dropout,
    predict_from=model.predict_from,
    patch_dropout=model.patch_dropout,
    scalars=tuple(scalars.items()),
    vocab_size=vocab_size,
    text_length=text.length,
    readout=text.readout,
    scan=model.scan,
    remat="none" if model.remat == "auto" else model.remat,  # `build` knows what the memory allows
    attention=attention.choose(
      model.attention, dtype, device, lengths, size, masked=text.readout != "eot"
    ),
    pointwise=pointwise.choose(model.pointwise, dtype, device),
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


def width(size):
  """Of the towers of that size, and so of the CLS feature. Raises ValueError."""
  if size not in SIZES:
    raise ValueError(f"model.size must be one of {', '.join(SIZES)}, got {size!r}")
  return SIZES[size][0]


def look_inside(model, variables, images):
  """What happens between an image and its features, to be shown.

  Returns `layers` (B, depth, N, W), the patch tokens after every block, before the final norm, and
  `attention` (B, heads, N), how the last block's CLS weighs the patches (its own share left out).
  """
  _, found = model.apply(
    variables, {"image": images}, train=False, mutable=["intermediates"],
    capture_intermediates=lambda module, _: module.name in ("blocks", "qkv"),
  )  # fmt: skip
  found = found["intermediates"]["image"]["tower"]["blocks"]
  (((tokens, _), _),) = found["__call__"]  # (depth, B, 1 + N, W), of padding too
  ((qkv, _),) = found["attn"]["qkv"]["__call__"]
  _, H, W, _ = images.shape
  own = slice(1 + (H // model.patch_size) * (W // model.patch_size))
  q, k = (x[-1, :, own].astype(jnp.float32) for x in attention.parts(qkv)[:2])
  scores = jnp.einsum("bhk,blhk->bhl", q[:, 0], k) / q.shape[-1] ** 0.5
  weights = jax.nn.softmax(scores, axis=-1)[..., 1:]
  layers = tokens[:, :, own][:, :, 1:].swapaxes(0, 1).astype(jnp.float32)
  return {"layers": layers, "attention": weights}


def image_tokens(model, side):
  """Tokens of the image tower in training for an image or view of that side, CLS included.

  Raises:
    ValueError: `patch_dropout` leaves no patch.
  """
  return 1 + kept_patches((side // model.patch_size) ** 2, model.patch_dropout)


def forward_flops(model, sides=(), text_rows=1):
  """Analytic FLOPs of one pair forward in training: matrix products only, 2 per multiply-add.

  sides: the side in pixels of every view of the image; () for the one image of `image_size`.
  text_rows: rows of the text tower per caption, below 1 where captions share them. All of a row
  counts, padding too. It is what is computed, but for tokens of the last layer that nothing reads:
  unrolled, 7% of a ViT-B step's products are left out (6% of packed captions').

  ViT-B/16 at 224 px with GPT-2-base at 77 tokens and D = 256: 48.5e9; a training step costs three
  times as much.
  """
  width, depth, _ = SIZES[model.size]
  sides = sides or (model.image_size,)
  D, hidden = model.embed_dim, model.hidden_dim
  tower = lambda n: depth * (24 * n * width**2 + 4 * n**2 * width)
  tokens = [image_tokens(model, side) for side in sides]
  images = sum(tower(n) + 2 * (n - 1) * width * 3 * model.patch_size**2 for n in tokens)
  inner = max(model.predictor_depth - 1, 0) * hidden**2
  predictor = 2 * (2 * D * hidden + inner) if model.predictor_depth else 0
  embedding = 2 * (width * hidden + hidden * D)
  predictions = len(sides) if model.predict_from == "views" else 1
  heads = (len(sides) + 1) * embedding + (predictions + 1) * predictor
  return images + text_rows * tower(model.text_length) + heads
