"""What evaluations share: encoding a split, readings of similarity, ranks, and chance levels."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jepa_vl import distributed, sharding
from jepa_vl.data import pipeline, sources, transforms

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Split:
  """One evaluation split, decoded: labels, images and one caption per concept.

  identity: the source's; records: N dicts; images (N, S, S, 3) uint8; captions: C strings;
  relevant (N, C) bool, True where a caption describes an image; left_out: indices of undecodable
  records.
  """

  identity: str
  records: list
  images: np.ndarray
  captions: list
  relevant: np.ndarray
  left_out: list


@dataclasses.dataclass
class Encode:
  """encode(variables, batch) -> out, with what evaluations need around it.

  apply: jitted (variables, batch) -> out; tokenize: captions -> (ids, mask, truncated); readings:
  the names of READINGS that differ for this model, the one to look at last; keys: how records are
  read, as in training.
  Decoded splits are kept, and so are the features of the last variables seen.
  """

  apply: Callable
  tokenize: Callable
  mesh: Any
  image_size: int
  resize_ratio: float
  batch_size: int
  readings: tuple
  keys: Any
  _kept: dict = dataclasses.field(default_factory=dict)
  _features: dict = dataclasses.field(default_factory=dict)
  _of: Any = None

  def __call__(self, variables, batch):
    return self.apply(variables, batch)

  def once(self, key, compute):
    """compute(), kept under `key`: for what does not change while the encoder trains."""
    if key not in self._kept:
      self._kept[key] = compute()
    return self._kept[key]

  def split(self, source, path, split):
    """The decoded split, read once."""
    key = (source, path, split)
    return self.once(key, lambda: _read_split(self, sources.open_source(*key, self.keys), split))

  def features(self, variables, source, path, split):
    """z_img, p_img, cls, pooled of the split's images (N, .) and z_txt, p_txt of its captions."""
    if self._of is not variables:
      self._features, self._of = {}, variables
    key = (source, path, split)
    if key not in self._features:
      data = self.split(*key)
      self._features[key] = self.images(variables, data.images) | self.texts(
        variables, data.captions
      )
    return self._features[key]

  def images(self, variables, images):
    """uint8 (N, S, S, 3) -> dict of z_img, p_img, cls, pooled (mean of the patch tokens)."""
    return self._map(variables, {"image": images}, _image_features)

  def texts(self, variables, captions):
    """N strings -> dict of z_txt, p_txt (N, D)."""
    ids, mask, _ = self.tokenize(captions)
    return self._map(variables, {"text": ids, "mask": mask}, _text_features)

  def patches(self, variables, images):
    """uint8 (N, S, S, 3) -> patch tokens on their grid, (N, h, w, W) float32."""
    tokens = self._map(variables, {"image": images}, lambda out: {"patches": out["patches"]})
    tokens = tokens["patches"].astype(np.float32)
    side = round(tokens.shape[1] ** 0.5)
    return tokens.reshape(len(images), side, side, -1)

  def _map(self, variables, rows, keep):
    # Every process passes all rows and gets all results; the devices share the work.
    count, B = len(next(iter(rows.values()))), self.batch_size
    parts = []
    for start in range(0, count, B):
      batch = {k: self._put(_pad(v[start : start + B], B)) for k, v in rows.items()}
      with jax.set_mesh(self.mesh):
        parts.append(keep(self.apply(variables, batch)))
    parts = multihost_utils.process_allgather(parts, tiled=True)
    return {k: np.concatenate([p[k] for p in parts])[:count] for k in parts[0]}

  def _put(self, x):
    split = NamedSharding(self.mesh, P(sharding.BATCH))
    return jax.make_array_from_callback(x.shape, split, lambda rows: x[rows])


def _image_features(out):
  pooled = jnp.mean(out["patches"].astype(jnp.float32), axis=1)
  cls = out["cls"].astype(jnp.float32)
  return {"z_img": out["z_img"], "p_img": out["p_img"], "cls": cls, "pooled": pooled}


def _text_features(out):
  return {"z_txt": out["z_txt"], "p_txt": out["p_txt"]}


def _pad(x, rows):
  return np.concatenate([x, np.repeat(x[:1], rows - len(x), axis=0)]) if len(x) < rows else x


def _read_split(encode, source, split):
  records, images, left_out = read_rows(source, encode.image_size, encode.resize_ratio)
  # Without a concept, records of one caption share it: equal texts cannot be told apart.
  names = [record.get("concept", transforms.full_caption(record)) for record in records]
  concepts = {}
  for name, record in zip(names, records, strict=True):
    concepts.setdefault(name, transforms.full_caption(record))
  columns = {concept: c for c, concept in enumerate(concepts)}
  relevant = np.zeros((len(records), len(concepts)), bool)
  # Pixel-identical images are one image with several captions: any of them is a hit.
  same = {}
  for i, image in enumerate(images):
    same.setdefault(image.tobytes(), []).append(i)
  for members in same.values():
    relevant[np.ix_(members, [columns[names[i]] for i in members])] = True
  captions = list(concepts.values())
  log.info(
    "evaluation split %s: %d images, %d captions (%d longer than text.length and cut), %d "
    "records left out as unreadable%s",
    split, len(images), len(captions), encode.tokenize(captions)[2].sum(), len(left_out),
    f": {left_out[:10]}" if left_out else "",
  )  # fmt: skip
  return Split(source.identity, records, images, captions, relevant, left_out)


def read_rows(source, image_size, resize_ratio):
  """All readable records in order; every process decodes its share and gets all.

  Returns:
    records without their `image` bytes (list of dict), images (N, S, S, 3) uint8, the indices that
    were left out.

  Raises:
    ValueError: none can be read.
  """
  processes, count = jax.process_count(), len(source)
  if len(set(distributed.exchange((source.identity, count)))) > 1:
    raise ValueError("an evaluation's records are not the same in every process; give all one copy")
  stretch = -(-_AT_ONCE // processes)
  records, images, left_out = [], [], []
  for start in range(0, count, stretch * processes):
    first = start + stretch * jax.process_index()
    indices = range(min(first, count), min(first + stretch, count))
    mine = pipeline.evaluation_rows(
      source, indices, image_size=image_size, resize_ratio=resize_ratio
    )
    for part in distributed.exchange(mine):
      for every, some in zip((records, images, left_out), part, strict=True):
        every.extend(some)
  if not images:
    raise ValueError(f"none of the {count} records of the evaluation data can be read")
  return records, np.stack(images), left_out


_AT_ONCE = 1024  # rows that the processes exchange in one go


# reading -> pairs of (image side, text side) whose cosines are averaged
READINGS = {
  "embed": (("z_img", "z_txt"),),
  "image_to_text": (("p_img", "z_txt"),),
  "text_to_image": (("z_img", "p_txt"),),
  "predictions": (("p_img", "p_txt"),),
  "avg": (("p_img", "z_txt"), ("z_img", "p_txt")),
}


# Floors that an evaluation may give beside a figure, as the figure's key and "@" and the name.
FLOORS = ("random", "majority", "raw_pixels")


def is_floor(key):
  """Whether a figure is the floor of another."""
  return key.rpartition("@")[2] in FLOORS


def headline_reading(metrics):
  """The reading to be read: `avg`, or `embed` where nothing is predicted (CLIP, SigLIP)."""
  return "avg" if any("avg" in metric.split("/") for metric in metrics) else "embed"


def is_headline(metric, reading):
  """Whether a metric is in the given reading, or in none."""
  return all(part == reading for part in metric.split("/") if part in READINGS)


def similarity(images, texts, reading):
  """Mean cosine of a reading's pairs. dicts of (N, D) and (C, D) arrays -> (N, C)."""
  pairs = READINGS[reading]
  return sum(unit(images[a]) @ unit(texts[b]).T for a, b in pairs) / len(pairs)


def unit(x):
  """Rows of unit length; a zero row stays zero."""
  return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def first_hit(scores, relevant):
  """How many wrong candidates are ranked before the best right one, per query; (Q, C) -> (Q,).

  Ties and NaN count against the model, so that constant embeddings do not score.
  """
  scores = np.where(np.isnan(scores), np.where(relevant, -np.inf, np.inf), scores)
  best = np.max(np.where(relevant, scores, -np.inf), axis=1, keepdims=True)
  return np.sum((scores >= best) & ~relevant, axis=1)


def recall_at(ranks, k):
  """Share of queries whose first hit is among the top k."""
  return float(np.mean(ranks < k))


def random_recall(relevant, k):
  """Expected recall@k of a random ranking: 1 - C(n - r, k) / C(n, k), averaged over queries."""
  n = relevant.shape[1]
  r = relevant.sum(axis=1)[:, None]
  i = np.arange(min(k, n))
  return float(np.mean(1 - np.prod(np.clip((n - r - i) / (n - i), 0, 1), axis=1)))
