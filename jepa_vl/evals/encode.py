"""What evaluations get of model and data: splits read once, and their features."""

import dataclasses
import functools
import hashlib
import logging
import multiprocessing.pool
import os
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import scipy.sparse
import tqdm
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jepa_vl import checkpoint, distributed, sharding
from jepa_vl.data import pipeline, sources, transforms
from jepa_vl.evals import common

log = logging.getLogger(__name__)

KEEP_BYTES = 1 << 30  # of decoded images, all splits together; others are read again
STRETCH_BYTES = 1 << 27  # of decoded images that pass through in one go
THUMBNAIL = 32  # pixels, the side of the raw-pixel floor's images


@dataclasses.dataclass
class Split:
  """One evaluation split: its readable records, and what they call right.

  source: the open source; indices (N,): the records' places in it; records: N dicts without their
  bytes; captions: C strings, equal ones once but where records have several; relevant: sparse
  (N, C) bool, True where a caption describes an image; thumbnails: (N, t, t, 3) uint8;
  left_out: indices of undecodable records.
  """

  source: Any
  indices: np.ndarray
  records: list
  captions: list
  relevant: Any
  thumbnails: np.ndarray
  left_out: list
  _read: Callable
  _kept: Any = None

  def __len__(self):
    return len(self.records)

  @property
  def identity(self):
    """The source's."""
    return self.source.identity

  def images(self, rows=None):
    """The images of `rows`, or all: (n, S, S, 3) uint8. Decoded again unless the split is small."""
    if self._kept is not None:
      return self._kept if rows is None else self._kept[rows]
    indices = self.indices if rows is None else self.indices[rows]
    return np.stack(self._read(self.source, indices)[1])


@dataclasses.dataclass
class Encode:
  """encode(variables, batch) -> out, with what evaluations need around it.

  apply: (variables, batch) -> out; tokenize: captions -> (ids, mask, truncated); readings:
  the names of common.READINGS that differ for this model, the one to look at last; keys: how
  records are read, as in training; model: what else than variables decides on features; cache: a
  folder for splits and features, "" for none; look_inside: (variables, batch) -> what
  two_tower.look_inside gives, for the report. Splits are kept, and so are the features of the last
  variables seen.
  """

  apply: Callable
  tokenize: Callable
  mesh: Any
  image_size: int
  resize_ratio: float
  batch_size: int
  readings: tuple
  keys: Any
  model: str = ""
  cache: str = ""
  look_inside: Callable = None
  _kept: dict = dataclasses.field(default_factory=dict)
  _features: dict = dataclasses.field(default_factory=dict)
  _of: Any = None
  _bytes: int = 0

  def __call__(self, variables, batch):
    return self.apply(variables, batch)

  def once(self, key, compute):
    """compute(), kept under `key`: for what does not change while the encoder trains."""
    if key not in self._kept:
      self._kept[key] = compute()
    return self._kept[key]

  def source(self, source, path, split):
    """The open source of a split. Raises ValueError as sources.open_source."""
    key = (source, path, split)
    return self.once(("source", *key), lambda: sources.open_source(*key, self.keys))

  def version(self, source):
    """What the cache knows a source by: its identity, and the sizes and times of its `paths`.

    The identity has but a sample of the records; of a table the paths are the table's own, so of
    the images that it names that sample is all.
    """
    if not self.cache:
      return source.identity
    # The first process's: copies on other hosts have other times, and all have to agree.
    look = lambda: None if jax.process_index() else _times(source)
    return self.once(
      ("version", source), lambda: (source.identity, distributed.exchange(look())[0])
    )

  def is_small(self, source):
    """Whether a source's images can be kept, so that reading all of it is cheap."""
    return len(source) * self.image_size**2 * 3 <= KEEP_BYTES

  def split(self, source, path, split):
    """The split, read once."""
    key = (source, path, split)
    return self.once(("split", *key), lambda: self._open_split(key)[0])

  def features(self, variables, source, path, split):
    """z_img, p_img, cls, pooled of the split's images (N, .), and z_txt, p_txt of its captions."""
    if self._of is not variables:
      self._features, self._of = {}, variables
    key = (source, path, split)
    if key not in self._features:
      self._features[key] = self._open_features(variables, key)
    return self._features[key]

  def images(self, variables, images):
    """uint8 (N, H, W, 3) -> dict of z_img, p_img, cls, pooled (mean of the patch tokens)."""
    return self._map(variables, {"image": images}, _image_features)

  def texts(self, variables, captions):
    """N strings -> dict of z_txt, p_txt (N, D)."""
    ids, mask, _ = self.tokenize(captions)
    return self._map(variables, {"text": ids, "mask": mask}, _text_features)

  def patches(self, variables, images):
    """uint8 (N, H, W, 3) -> patch tokens on their grid, (N, h, w, W) float32."""
    tokens = self._map(variables, {"image": images}, _patch_features)["patches"]
    N, H, W, _ = images.shape
    side = round((H * W / tokens.shape[1]) ** 0.5)
    return tokens.reshape(N, H // side, W // side, -1)

  def depths(self, variables, images):
    """uint8 (N, S, S, 3) -> patch tokens at about each quarter of the depth, and CLS attention.

    Returns:
      {block: (N, h, w, W)}, the last after the final norm; (N, h, w), the mean over heads.
    """
    found = self._map(variables, {"image": images}, _quarters, self.look_inside)
    last = self.patches(variables, images)
    grid = lambda x: x.reshape(*last.shape[:3], *x.shape[2:])
    blocks = {int(k): grid(x) for k, x in found.items() if k != "attention"}
    return blocks | {max(blocks): last}, grid(found["attention"])

  def _map(self, variables, rows, keep, apply=None):
    # Every process passes all rows and gets all results; the devices share the work.
    count, B = len(next(iter(rows.values()))), self._rows_at_once(rows)
    of_batch = apply or self.apply
    apply = self.once(("jit", keep), lambda: jax.jit(lambda v, b: keep(of_batch(v, b))))
    parts = []
    for start in range(0, count, B):
      batch = {k: self._put(_pad(v[start : start + B], B)) for k, v in rows.items()}
      with jax.set_mesh(self.mesh):
        parts.append(apply(variables, batch))
    parts = multihost_utils.process_allgather(parts, tiled=True)
    return {k: np.concatenate([p[k] for p in parts])[:count] for k in parts[0]}

  def _rows_at_once(self, rows):
    # As many pixels at once as a batch of the usual size has.
    if "image" not in rows:
      return self.batch_size
    shards, share = sharding.batch_shards(self.mesh), np.prod(rows["image"].shape[1:3])
    fitting = int(self.batch_size * min(self.image_size**2 / share, 1))
    return max(fitting // shards, 1) * shards

  def _put(self, x):
    split = NamedSharding(self.mesh, P(sharding.BATCH))
    return jax.make_array_from_callback(x.shape, split, lambda rows: x[rows])

  def _open_split(self, key, variables=None):
    """A Split, and the features of its images where `variables` are given."""
    source = self.source(*key)
    saved = None if variables is not None else self._load("split", self.version(source))
    if saved is None:
      found, features = self._read_all(key, source, variables)
    else:
      records = msgpack.unpackb(saved.pop("records").tobytes(), unicode_errors=_UNICODE)
      found, features = {**saved, "records": records, "images": None}, None
    captions, relevant = match_captions(found["records"], found["digests"])
    log.info(
      "evaluation split %s: %d images, %d captions (%d longer than text.length and cut), %d "
      "records left out as unreadable%s",
      key[-1], len(found["records"]), len(captions),
      self.tokenize(captions)[2].sum() if captions else 0, len(found["left_out"]),
      f": {list(found['left_out'][:10])}" if len(found["left_out"]) else "",
    )  # fmt: skip
    split = Split(
      source, found["indices"], found["records"], captions, relevant, found["thumbnails"],
      [int(i) for i in found["left_out"]], self._read_rows, found["images"],
    )  # fmt: skip
    return split, features

  def _open_features(self, variables, key):
    version = self.version(self.source(*key))
    which = checkpoint.fingerprint(variables) if self.cache else None
    found = self._load("features", version, which)
    if found is None:
      split = self._kept.get(("split", *key))
      if split is not None and split._kept is not None:
        found = self.images(variables, split._kept)
      else:
        split, found = self._open_split(key, variables)
        self.once(("split", *key), lambda: split)
      if split.captions:
        found |= self.texts(variables, split.captions)
      self._save(found, "features", version, which)
    return found

  def _read_all(self, key, source, variables):
    """One pass over a source: records, images if they can be kept, and features if asked for."""
    keep = self.is_small(source) and self._bytes < KEEP_BYTES
    parts = []
    for indices, (records, images, left_out) in self._stretches(key, source):
      part = {"indices": np.setdiff1d(indices, left_out), "left_out": np.array(left_out, int)}
      if images:
        images = np.stack(images)
        part |= {"digests": _digests(images), "thumbnails": _thumbnails(images)}
        part["images"] = images if keep else None
        part["features"] = self.images(variables, images) if variables is not None else {}
      parts.append((records, part))
    records = [r for some, _ in parts for r in some]
    if not records:
      raise ValueError(f"none of the {len(source)} records of the evaluation data can be read")
    join = lambda name: np.concatenate([p[name] for _, p in parts if name in p])
    found = {name: join(name) for name in ("indices", "left_out", "digests", "thumbnails")}
    raw = msgpack.packb(records, default=_plain, unicode_errors=_UNICODE)
    raw = np.frombuffer(raw, np.uint8)
    self._save({**found, "records": raw}, "split", self.version(source))
    found |= {"records": records, "images": join("images") if keep else None}
    self._bytes += found["images"].nbytes if keep else 0
    features = [p["features"] for _, p in parts if "features" in p]
    return found, {k: np.concatenate([f[k] for f in features]) for k in features[0]}

  def _stretches(self, key, source):
    """Rows of all readable records, a stretch at a time; every process decodes its share.

    Raises:
      ValueError: the processes have different records.
    """
    processes, count = jax.process_count(), len(source)
    if len(set(distributed.exchange((source.identity, count)))) > 1:
      raise ValueError(
        "an evaluation's records are not the same in every process; give all one copy"
      )
    rows = min(max(STRETCH_BYTES // (3 * self.image_size**2), 64), 1024)
    stretch = -(-rows // processes)
    starts = range(0, count, stretch * processes)
    silent = True if jax.process_index() or len(starts) < 4 else None
    for start in tqdm.tqdm(starts, key[-1] or key[1], disable=silent, leave=False):
      first = start + stretch * jax.process_index()
      indices = range(min(first, count), min(first + stretch, count))
      shares = distributed.exchange(self._read_rows(source, indices))
      joined = [[x for share in shares for x in share[column]] for column in range(3)]
      yield np.arange(start, min(start + stretch * processes, count)), joined

  def _read_rows(self, source, indices):
    return pipeline.evaluation_rows(
      source, [int(i) for i in indices], image_size=self.image_size, resize_ratio=self.resize_ratio
    )

  def _file(self, kind, version, which):
    what = (VERSION, kind, version, self.image_size, self.resize_ratio, self.keys)
    if kind == "features":
      what += (which, self.model, self.tokenize(["a probe of the tokenizer"])[0].tolist())
    name = hashlib.sha256(repr(what).encode()).hexdigest()[:20]
    return os.path.join(self.cache, f"{kind}-{name}.npz")

  def _load(self, kind, version, which=None):
    if not self.cache:
      return None
    path, found = self._file(kind, version, which), None
    try:
      if os.path.exists(path):
        with np.load(path) as file:
          found = dict(file)
    except (OSError, ValueError, zipfile.BadZipFile) as e:
      log.warning("%s cannot be read (%s) and is made again", path, e)
    # All processes take it, or none: what is computed instead needs all.
    return found if all(distributed.exchange(found is not None)) else None

  def _save(self, arrays, kind, version, which=None):
    if not self.cache or jax.process_index():
      return
    os.makedirs(self.cache, exist_ok=True)
    path = self._file(kind, version, which)
    with open(f"{path}.part", "wb") as f:
      np.savez(f, **{k: v for k, v in arrays.items() if v is not None})
    os.replace(f"{path}.part", path)  # whole, or not there


VERSION = 1  # of what the cache's files mean
_UNICODE = "surrogatepass"  # JSON's half pairs, and bytes of file names that are not UTF-8


def _times(source):
  """A digest of the sizes and times of a source's files, the `paths` of those that have some."""

  def of_file(path):
    try:
      found = os.stat(path)
    except (OSError, ValueError):  # it lies in a bucket, or is gone
      return None
    return found.st_size, found.st_mtime_ns

  digest = hashlib.sha256()
  with multiprocessing.pool.ThreadPool(32) as pool:  # which wait for the disk, or the network
    for found in pool.imap(of_file, getattr(source, "paths", ()), chunksize=256):
      digest.update(repr(found).encode())
  return digest.hexdigest()


def _image_features(out):
  pooled = jnp.mean(out["patches"].astype(jnp.float32), axis=1)
  cls = out["cls"].astype(jnp.float32)
  return {"z_img": out["z_img"], "p_img": out["p_img"], "cls": cls, "pooled": pooled}


def _text_features(out):
  return {"z_txt": out["z_txt"], "p_txt": out["p_txt"]}


def _patch_features(out):
  return {"patches": out["patches"].astype(jnp.float32)}


def _quarters(out):
  layers = out["layers"]
  depth = layers.shape[1]
  found = {str(-(-depth * k // 4)): layers[:, -(-depth * k // 4) - 1] for k in range(1, 5)}
  return found | {"attention": out["attention"].mean(axis=1)}


def _pad(x, rows):
  return np.concatenate([x, np.repeat(x[:1], rows - len(x), axis=0)]) if len(x) < rows else x


def _plain(value):
  return value.tolist() if hasattr(value, "tolist") else str(value)


def _digests(images):
  digest = functools.partial(hashlib.blake2b, digest_size=16)
  return np.array([np.frombuffer(digest(x.tobytes()).digest(), np.uint8) for x in images])


def _thumbnails(images):
  side = min(images.shape[1], THUMBNAIL)
  return np.stack([transforms.resize(x, side, side) for x in images])


def match_captions(records, digests):
  """Which captions there are, and which of them describe which image.

  Records of one `concept`, or of one caption, share a candidate: equal texts cannot be told apart.
  Of records with several `captions` (COCO) each is a candidate of its own, as its protocol has it.
  Pixel-identical images are one image: any of their captions is right, and so is any candidate of
  an equal text.

  Args:
    records: N dicts; digests: (N, 16) uint8, equal for equal images.

  Returns:
    C captions, sparse (N, C) bool.
  """
  captions, columns, names = [], {}, []
  for record in records:
    texts = named = several = common.several_captions(record)
    if not several:
      texts = [transforms.full_caption(record)] if "caption" in record else []
      named = [record["concept"]] if texts and "concept" in record else texts
    for name, text in zip(named, texts, strict=True):
      if name not in columns or several:
        columns.setdefault(name, []).append(len(captions))
        captions.append(text)
    names.append(named)
  same = {}
  for i, digest in enumerate(digests):
    same.setdefault(digest.tobytes(), []).append(i)
  rows = [None] * len(records)
  for members in same.values():
    right = sorted({c for i in members for name in names[i] for c in columns[name]})
    for i in members:
      rows[i] = right
  ends = np.cumsum([0, *map(len, rows)])
  indices = np.array([c for right in rows for c in right], np.int64)
  data = np.ones(len(indices), bool)
  return captions, scipy.sparse.csr_array((data, indices, ends), (len(records), len(captions)))
