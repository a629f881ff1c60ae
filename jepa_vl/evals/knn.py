"""k nearest neighbours among frozen features of the training images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jepa_vl import sharding
from jepa_vl.evals import common, probes

PROTOCOL = """
The training images with the highest cosine vote for their class, each with weight exp(cosine / T)
(DINO's protocol, arXiv 2104.14294; T is 0.07 there); nothing is fitted.
"""
QUERIES, NEIGHBOURS = 1024, 16384  # of one block of cosines


def run(encode, variables, mesh, *, source, path, splits, label, train_split, ks, temperature):
  """Top-1 "SPLIT/FEATURE/LABEL/kK" for every K of `ks` on CLS and on mean-pooled patches.

  "@majority" guesses the test split's largest class.

  Raises:
    ValueError: a k that is not from 1 to the number of training images.
  """
  parts = dict.fromkeys((train_split, *splits))
  found = {s: encode.features(variables, source, path, s) for s in parts}
  y = {s: common.labels(encode.split(source, path, s), label) for s in parts}
  _check(ks, len(y[train_split]), train_split)
  figures = {}
  for name in probes.FEATURES:
    bank = common.unit(found[train_split][name].astype(np.float32))
    for s in splits:
      queries = common.unit(found[s][name].astype(np.float32))
      cosines, places = nearest(queries, bank, max(ks), mesh)
      for k in ks:
        votes = y[train_split][places[:, :k]]
        key = f"{s}/{name}/{label}/k{k}"
        right = vote(cosines[:, :k], votes, temperature) == y[s]
        figures |= common.means({key: right})
        figures[f"{key}@majority"] = np.bincount(y[s]).max() / len(y[s])
  sizes = {s: {"images": len(labels)} for s, labels in y.items()}
  return common.result(figures, protocol=PROTOCOL, sizes=sizes)


def check(encode, keys):
  """Raises ValueError for `ks` that `run` would stop at, of a large split as far as that shows."""
  where = (keys.source, keys.path, keys.train_split)
  source = encode.source(*where)
  found = encode.split(*where) if encode.is_small(source) else source
  _check(keys.ks, len(found), keys.train_split)


def _check(ks, count, train_split):
  if not ks or min(ks) < 1 or max(ks) > count:
    raise ValueError(f"ks={tuple(ks)} must be from 1 to the {count} images of {train_split!r}")


def vote(cosines, classes, temperature):
  """The class with the most weight among neighbours, (Q, k) twice -> (Q,); of equals the lowest."""
  weights = np.exp((cosines.astype(np.float64) - cosines[:, :1]) / temperature)
  total = np.zeros((len(classes), classes.max() + 1))
  np.add.at(total, (np.arange(len(classes))[:, None], classes), weights)
  return total.argmax(axis=1)


def nearest(queries, bank, k, mesh):
  """The k rows of `bank` with the highest products: (Q, W), (N, W) -> (Q, k) products, places.

  In blocks of both, so that a million of either fits into memory; highest first.
  """
  Q, N = len(queries), len(bank)
  shards = sharding.batch_shards(mesh)
  rows, columns = -(-min(QUERIES, Q) // shards) * shards, max(min(NEIGHBOURS, N), k)
  split, whole = NamedSharding(mesh, P(sharding.BATCH)), NamedSharding(mesh, P())
  put = lambda x, how: jax.make_array_from_callback(x.shape, how, lambda index: x[index])
  best = []
  for start in range(0, Q, rows):
    some = put(_pad(queries[start : start + rows], rows), split)
    found = (
      put(np.full((rows, k), -np.inf, np.float32), split), put(np.zeros((rows, k), int), split)
    )  # fmt: skip
    for first in range(0, N, columns):
      block = put(_pad(bank[first : first + columns], columns), whole)
      found = _better(*found, some, block, np.int32(first), np.int32(N))
    best.append(found)
  best = multihost_utils.process_allgather(best, tiled=True)
  return tuple(np.concatenate([part[i] for part in best])[:Q] for i in range(2))


def _pad(x, rows):
  return np.pad(x, ((0, rows - len(x)), (0, 0)))


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _better(scores, places, queries, block, first, end):
  """The k best of those that were found so far and a block's."""
  here = jnp.matmul(queries, block.T, precision=jax.lax.Precision.HIGHEST)
  columns = first + jnp.arange(len(block))
  here = jnp.where(columns < end, here, -jnp.inf)
  all_scores = jnp.concatenate([scores, here], axis=1)
  all_places = jnp.concatenate(
    [places, jnp.broadcast_to(columns.astype(places.dtype), here.shape)], axis=1
  )
  top, where = jax.lax.top_k(all_scores, scores.shape[1])
  return top, jnp.take_along_axis(all_places, where, axis=1)
