"""Linear probes on frozen features: logistic regression, also from few examples of each class."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.stats
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jepa_vl import sharding
from jepa_vl.evals import common, fit

FEATURES = ("cls", "pooled")  # CLS, mean of the patch tokens; "both" joins them
READOUTS = (*FEATURES, "both")
BLOCK = 16384  # rows whose logits are held at once
PROTOCOL = """
Logistic regression on standardised frozen features, fitted on one split; the penalty is chosen on
another or on every tenth row of the first, so that test splits choose nothing. shotK: on K images
of each class, mean over draws, with the t interval of the draws; their penalty is the best on
average.
"""


def run(
  encode, variables, mesh, *, source, path, splits, label, train_split, select_split, features, l2,
  shots, draws,
):  # fmt: skip
  """Top-1 "SPLIT/FEATURE/LABEL" of a logistic regression on each of `features` (READOUTS).

  Fitted on `train_split`; the penalty of `l2` that is best on `select_split` is used or, where that
  is "", on every tenth training image. "SPLIT/FEATURE/LABEL/shotK" for every K of `shots`: fitted
  on K images of each class, mean over `draws` of them. "@majority" guesses the test split's largest
  class; "@raw_pixels" is the same probe, chosen in the same way, on the pixels.

  Raises:
    ValueError: an unknown feature, or more shots than a class has images.
  """
  check_features(features)
  parts = dict.fromkeys((train_split, *([select_split] if select_split else []), *splits))
  found = {s: encode.features(variables, source, path, s) for s in parts}
  data = {s: encode.split(source, path, s) for s in parts}
  y = {s: common.labels(split, label) for s, split in data.items()}
  chosen = dict(train=train_split, select=select_split, penalties=tuple(l2), mesh=mesh)
  key = ("raw_pixels", source, path, tuple(y), label, *list(chosen.values())[:-1])
  floor = encode.once(
    key, lambda: fit_and_score({s: _pixels(data[s].thumbnails) for s in y}, y, **chosen)
  )
  figures = {}
  for name in features:
    x = {s: readout(found[s], name) for s in y}
    right = fit_and_score(x, y, **chosen)
    few = {k: fit_few(x, y, k, draws, **chosen) for k in shots}
    for split in splits:
      key = f"{split}/{name}/{label}"
      figures |= common.means({key: right[split]})
      figures[f"{key}@raw_pixels"] = np.mean(floor[split])
      for k in shots:
        figures |= _over_draws(f"{key}/shot{k}", few[k][split])
      for k in ("", *(f"/shot{k}" for k in shots)):
        figures[f"{key}{k}@majority"] = np.bincount(y[split]).max() / len(y[split])
  sizes = {s: {"images": len(labels)} for s, labels in y.items()}
  sizes[train_split]["draws"] = draws
  return common.result(figures, protocol=PROTOCOL, sizes=sizes)


def check(encode, keys):
  """Raises ValueError for features that `run` would stop at."""
  check_features(keys.features)


def check_features(features):
  """Raises ValueError for one that is not of READOUTS."""
  if not features or not set(features) <= set(READOUTS):
    raise ValueError(f"features must be of {', '.join(READOUTS)}, got {features!r}")


def readout(found, name):
  """A feature of READOUTS from what Encode.features gives, (N, W) or (N, 2 W)."""
  if name == "both":
    return np.concatenate([found[n] for n in FEATURES], axis=1)
  return found[name]


def _pixels(images):
  return images.reshape(len(images), -1).astype(np.float32)


def _over_draws(key, found):
  """The mean of (draws,) accuracies, with its t interval where there are several."""
  mean = np.mean(found)
  if len(found) < 2:
    return {key: mean}
  half = scipy.stats.t.ppf(0.975, len(found) - 1) * scipy.stats.sem(found)
  return {key: mean, f"{key}@low": max(mean - half, 0), f"{key}@high": min(mean + half, 1)}


def fit_and_score(x, y, *, train, select, penalties, mesh):
  """dicts of (N, W) features and (N,) labels by split -> {split: (N,) bool, which are right}."""
  classes = int(max(v.max() for v in y.values())) + 1
  probe_of = lambda x, y, l2: Probe(x, y, classes, l2, mesh)
  if select:
    probes = (probe_of(x[train], y[train], l2) for l2 in penalties)
    probe = max(probes, key=lambda p: np.mean(p(x[select]) == y[select]))
    return {s: probe(x[s]) == y[s] for s in x}
  best = penalties[0]
  if len(penalties) > 1:
    rows, held = fit.part(len(y[train]))
    apart, truth = x[train][held], y[train][held]
    score = lambda l2: np.mean(probe_of(x[train][rows], y[train][rows], l2)(apart) == truth)
    best = max(penalties, key=score)
  probe = probe_of(x[train], y[train], best)
  return {s: probe(x[s]) == y[s] for s in x}


def fit_few(x, y, shots, draws, *, train, select, penalties, mesh):
  """Accuracies {split: (draws,)} of probes on so many examples of each class.

  Raises ValueError if a class has fewer; without `select` every tenth row of `train` is not drawn
  from and chooses the penalty.
  """
  classes = int(max(v.max() for v in y.values())) + 1
  rows, held = (np.arange(len(y[train])), ()) if select else fit.part(len(y[train]))
  chooses = (x[select], y[select]) if select else (x[train][held], y[train][held])
  rights = {l2: [] for l2 in penalties}
  for draw in range(draws):
    some = rows[draw_few(y[train][rows], shots, draw)]
    for l2 in penalties:
      probe = Probe(x[train][some], y[train][some], classes, l2, mesh)
      rights[l2].append(
        (np.mean(probe(chooses[0]) == chooses[1]), {s: np.mean(probe(x[s]) == y[s]) for s in x})
      )
  best = max(penalties, key=lambda l2: np.mean([chosen for chosen, _ in rights[l2]]))
  return {s: np.array([right[s] for _, right in rights[best]]) for s in x}


def draw_few(labels, shots, draw):
  """Places of `shots` rows of every class that is there, at random."""
  rng, rows = np.random.default_rng((draw, shots)), []
  for c in np.unique(labels):
    there = np.flatnonzero(labels == c)
    if len(there) < shots:
      raise ValueError(f"class {c} has {len(there)} training images to draw from, shots={shots}")
    rows.append(rng.choice(there, shots, replace=False))
  return np.concatenate(rows)


class Probe:
  """A logistic regression on standardised features: Probe(...)(x) -> predicted classes."""

  def __init__(self, x, y, classes, l2, mesh):
    self._mean, self._std = x.mean(axis=0), x.std(axis=0) + 1e-6
    w = fit_logistic(x, y, classes, l2, mesh, mean=self._mean, std=self._std)
    self._weights, self._bias = w[:-1] / self._std[:, None], w[-1] - self._mean / self._std @ w[:-1]

  def __call__(self, x):
    found = [
      np.argmax(x[i : i + BLOCK] @ self._weights + self._bias, axis=1)
      for i in range(0, len(x), BLOCK)
    ]
    return np.concatenate(found)


def fit_logistic(x, y, classes, l2, mesh, *, mean=0.0, std=1.0, iterations=200):
  """Multinomial logistic regression by L-BFGS: mean cross-entropy + l2/2 |W|^2 (bias free).

  x (N, W) float32, y (N,) int -> (W + 1, classes) float32 for (x - mean) / std, the bias in the
  last row. The devices of the mesh share the rows. Logits are those of a block of rows at a time: a
  million rows of a thousand classes fit into memory.
  """
  shards = sharding.batch_shards(mesh)
  rows = -(-min(len(x), BLOCK) // shards) * shards
  count = -(-len(x) // rows)
  xs, ys = np.zeros((count * rows, x.shape[1]), np.float32), np.full(count * rows, -1, np.int32)
  for i in range(0, len(x), rows):  # a whole copy more would be another gigabytes
    xs[i : i + rows][: len(x) - i] = (x[i : i + rows] - mean) / std
  ys[: len(y)] = y
  split, whole = NamedSharding(mesh, P(None, sharding.BATCH)), NamedSharding(mesh, P())
  put = lambda v, how: jax.make_array_from_callback(v.shape, how, lambda index: v[index])
  xs, ys = (put(v.reshape(count, rows, *v.shape[1:]), split) for v in (xs, ys))
  start = np.zeros((x.shape[1] + 1) * classes)
  step = _loss_and_grad(classes, whole)

  def value_and_grad(w):
    value, grad = step(put(w.astype(np.float32), whole), xs, ys, len(x), l2)
    return float(value), np.asarray(grad, np.float64)

  found = scipy.optimize.minimize(
    value_and_grad, start, jac=True, method="L-BFGS-B", options={"maxiter": iterations}
  )
  return found.x.reshape(-1, classes).astype(np.float32)


@functools.cache
def _loss_and_grad(classes, replicated):
  """Compiled (w, x (n, rows, W), y (n, rows), count, l2) -> value, gradient; y is -1 for no row."""

  @jax.value_and_grad
  def of_block(w, x, y, count):
    w = w.reshape(-1, classes)
    logits = jnp.matmul(x, w[:-1], precision=jax.lax.Precision.HIGHEST) + w[-1]
    log_p = jax.nn.log_softmax(logits)
    found = jnp.take_along_axis(log_p, jnp.maximum(y, 0)[:, None], axis=1)[:, 0]
    return -jnp.sum(jnp.where(y >= 0, found, 0)) / count

  def loss_and_grad(w, x, y, count, l2):
    add = lambda total, block: (jax.tree.map(jnp.add, total, of_block(w, *block, count)), None)
    (value, grad), _ = jax.lax.scan(add, (jnp.float32(0), jnp.zeros_like(w)), (x, y))
    weights = w.reshape(-1, classes).at[-1].set(0).ravel()
    return value + l2 / 2 * jnp.sum(weights**2), grad + l2 * weights

  return jax.jit(loss_and_grad, out_shardings=replicated)
