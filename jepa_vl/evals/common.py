"""What evaluations share: readings of similarity, ranks, intervals, chance levels, the result."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jepa_vl import sharding

# reading -> pairs of (image side, text side) whose cosines are averaged
READINGS = {
  "embed": (("z_img", "z_txt"),),
  "image_to_text": (("p_img", "z_txt"),),
  "text_to_image": (("z_img", "p_txt"),),
  "predictions": (("p_img", "p_txt"),),
  "avg": (("p_img", "z_txt"), ("z_img", "p_txt")),
}

# Floors that an evaluation may give beside a figure, as the figure's key and "@" and the name:
# guessing; always the commonest class; the same on pixels; one answer for all inputs (all
# background, the mean depth map); a threshold on colour; a text model without word order; the same
# on zeroed features.
FLOORS = ("random", "majority", "raw_pixels", "constant", "colour", "bag_of_words", "no_vision")
# The ends of a figure's 95% interval, in the same way.
INTERVAL = ("low", "high")


def is_beside(key):
  """Whether a figure stands beside another: its floor, or an end of its interval."""
  return key.rpartition("@")[2] in FLOORS + INTERVAL


def result(figures, *, protocol, sizes, details=()):
  """What an evaluation's `run` returns.

  Args:
    figures: {"SPLIT/...": float}, with "KEY@low", "KEY@high" and "KEY@FLOOR" beside a KEY.
    protocol: sentences that say what was fitted on what, chosen where, and which score it is.
    sizes: {split: {what: number}}, and the seeds.
    details: dicts that the report draws: `kind`, `title`, `hint` and what evals/report says of the
      kind.
  """
  return {
    "figures": {k: float(v) for k, v in figures.items()},
    "protocol": " ".join(protocol.split()),
    "sizes": sizes,
    "details": list(details),
  }


def lower_is_better(metric):
  """Whether a metric counts what is wrong, as errors and drops do."""
  return metric.rpartition("/")[2] in ("rmse", "abs_rel", "drop_points")


def headline_reading(metrics):
  """The reading to be read: `avg`, or `embed` where nothing is predicted (CLIP, SigLIP)."""
  return "avg" if any("avg" in metric.split("/") for metric in metrics) else "embed"


def is_headline(metric, reading):
  """Whether a metric is in the given reading, or in none."""
  return all(part == reading for part in metric.split("/") if part in READINGS)


def labels(split, field):
  """The classes of a split's records, (N,) int. Raises ValueError for one without."""
  found = [record.get(field) for record in split.records]
  bad = [i for i, y in enumerate(found) if type(y) is not int or y < 0]
  if bad:
    raise ValueError(
      f"{split.source.where(int(split.indices[bad[0]]))}: {field!r} must be a class counted from "
      f"0, got {found[bad[0]]!r}; its fields are {', '.join(split.records[bad[0]])}"
    )
  return np.array(found)


def several_captions(record):
  """The record's `captions`, [] where it has none; a text of that name is some other field."""
  found = record.get("captions")
  texts = isinstance(found, (list, tuple)) and all(isinstance(text, str) for text in found)
  return list(found) if texts else []


def similarity(images, texts, reading):
  """Mean cosine of a reading's pairs. dicts of (N, D) and (C, D) arrays -> (N, C)."""
  pairs = READINGS[reading]
  # In float64, and then rounded: a BLAS may sum the products of equal rows in different orders, and
  # what is equal (collapsed embeddings) must tie to the last bit.
  double = lambda x: unit(np.asarray(x, np.float64))
  total = sum(double(images[a]) @ double(texts[b]).T for a, b in pairs)
  return (total / len(pairs)).astype(np.float32)


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


QUERIES, CANDIDATES = 1024, 8192  # of one block of similarities


def first_hits(queries, candidates, relevant, mesh):
  """`first_hit` of every query, in blocks: a million queries and candidates fit into memory.

  Args:
    queries, candidates: lists of (Q, D) and (C, D) arrays, whose pairs' mean cosine is the score.
    relevant: sparse (Q, C) bool.

  Returns:
    (Q,) int.
  """
  Q, C = relevant.shape
  shards = sharding.batch_shards(mesh)
  rows = -(-min(QUERIES, Q) // shards) * shards
  columns = min(CANDIDATES, C)
  queries, candidates = [
    [unit(x).astype(np.float32) for x in side] for side in (queries, candidates)
  ]
  relevant = relevant.tocsr()
  split, whole = NamedSharding(mesh, P(sharding.BATCH)), NamedSharding(mesh, P())
  put = lambda x, how: jax.make_array_from_callback(x.shape, how, lambda index: x[index])
  blocks = [
    ([put(_pad_rows(c[i : i + columns], columns), whole) for c in candidates], i)
    for i in range(0, C, columns)
  ]
  counts = []
  for start in range(0, Q, rows):
    some = [put(_pad_rows(q[start : start + rows], rows), split) for q in queries]
    right = put(_pad_rows(right_columns(relevant[start : start + rows]), rows, -1), split)
    best = put(np.full(rows, -np.inf, np.float32), split)
    count = put(np.zeros(rows, np.int32), split)
    # A candidate's score must be the same number both times, so both take whole blocks.
    for block, first in blocks:
      if relevant[start : start + rows, first : first + columns].nnz:
        best = _best(some, block, right, np.int32(first), best)
    for block, first in blocks:
      count = _count(some, block, right, np.int32(first), best, np.int32(C), count)
    counts.append(count)
  return np.concatenate(multihost_utils.process_allgather(counts, tiled=True))[:Q]


def right_columns(relevant):
  """Sparse (Q, C) -> (Q, R) int32: each row's columns, filled up with -1."""
  lengths = np.diff(relevant.indptr)
  # Few widths, so that few are compiled.
  width = 1 << int(max(lengths.max(initial=1), 1) - 1).bit_length()
  found = np.full((relevant.shape[0], width), -1, np.int32)
  found[np.arange(width) < lengths[:, None]] = relevant.indices
  return found


def _pad_rows(x, rows, value=0):
  return np.pad(x, [(0, rows - len(x))] + [(0, 0)] * (x.ndim - 1), constant_values=value)


def _scores(queries, candidates, right, first):
  """(q, c) scores of a block and which are right; NaN ranks a right one last, a wrong one first."""
  product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  scores = sum(product(q, c.T) for q, c in zip(queries, candidates, strict=True)) / len(queries)
  columns = jnp.where(right < first, scores.shape[1], right - first)  # elsewhere: dropped
  hit = jnp.zeros(scores.shape, bool)
  hit = hit.at[jnp.arange(len(right))[:, None], columns].set(True, mode="drop")
  return jnp.where(jnp.isnan(scores), jnp.where(hit, -jnp.inf, jnp.inf), scores), hit


@jax.jit
def _best(queries, candidates, right, first, best):
  scores, hit = _scores(queries, candidates, right, first)
  return jnp.maximum(best, jnp.max(jnp.where(hit, scores, -jnp.inf), axis=1))


@jax.jit
def _count(queries, candidates, right, first, best, end, count):
  scores, hit = _scores(queries, candidates, right, first)
  real = first + jnp.arange(scores.shape[1]) < end
  return count + jnp.sum((scores >= best[:, None]) & ~hit & real, axis=1, dtype=jnp.int32)


def means(columns, seed=0):
  """{key: (N,) values of one set of rows} -> means and their intervals: key, key@low, key@high."""
  values = np.stack([np.asarray(v, np.float64) for v in columns.values()], axis=1)
  count = len(values)
  low, high = bootstrap([values], lambda total: total / count, seed)
  figures = {}
  for i, key in enumerate(columns):
    figures |= {key: values[:, i].mean(), f"{key}@low": low[i], f"{key}@high": high[i]}
  return figures


def bootstrap(columns, statistic, seed=0, draws=1000):
  """The 95% percentile interval of a statistic of sums over rows (images), resampled.

  Args:
    columns: list of (N, ...) arrays; statistic: their sums over a resample's N rows -> an array.

  Returns:
    low, high: arrays of the statistic's shape.
  """
  rng, count = np.random.default_rng(seed), len(columns[0])
  flat = [np.asarray(c, np.float64).reshape(count, -1) for c in columns]
  found = []
  at_once = int(np.clip(20_000_000 // max(count, 1), 1, draws))
  for start in range(0, draws, at_once):
    some = min(at_once, draws - start)
    picked = rng.integers(count, size=(some, count)) + count * np.arange(some)[:, None]
    weights = np.bincount(picked.ravel(), minlength=some * count).reshape(some, count)
    sums = [weights @ c for c in flat]
    for row in zip(*sums, strict=True):
      found.append(
        statistic(*(x.reshape(c.shape[1:]) for x, c in zip(row, columns, strict=True)))
      )
  return np.nanpercentile(np.array(found), (2.5, 97.5), axis=0)


def recall_at(ranks, k):
  """Share of queries whose first hit is among the top k."""
  return float(np.mean(ranks < k))


def random_recall(relevant, k):
  """Expected recall@k of a random ranking: 1 - C(n - r, k) / C(n, k), averaged over queries.

  relevant: (Q, n), sparse or dense.
  """
  n = relevant.shape[1]
  counts, queries = np.unique(np.asarray(relevant.sum(axis=1)).ravel(), return_counts=True)
  r, i = counts[:, None], np.arange(min(k, n))
  chance = 1 - np.prod(np.clip((n - r - i) / (n - i), 0, 1), axis=1)
  return float(np.average(chance, weights=queries))
