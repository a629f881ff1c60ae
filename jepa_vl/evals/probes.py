"""Linear probes on frozen features."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

FEATURES = ("cls", "pooled")


def run(encode, variables, mesh, *, source, path, splits, label, train_split, select_split, l2):
  """Top-1 of a logistic regression on CLS and on mean-pooled patches: "SPLIT/FEATURE/LABEL".

  Fitted on `train_split`; the penalty of `l2` that is best on `select_split` is used, so test
  splits choose nothing. "@majority" guesses the test split's largest class; "@raw_pixels" is the
  same probe, chosen in the same way, on the pixels.
  """
  y = {
    s: np.array([r[label] for r in encode.split(source, path, s).records])
    for s in dict.fromkeys((train_split, select_split, *splits))
  }
  features = lambda s, name: (
    _pixels(encode.split(source, path, s).images)
    if name == "raw_pixels"
    else encode.features(variables, source, path, s)[name]
  )
  fit = lambda name: _fit_and_score(
    {s: features(s, name) for s in y}, y, train_split, select_split, tuple(l2)
  )
  key = ("raw_pixels", source, path, tuple(y), label, train_split, select_split, tuple(l2))
  floor = encode.once(key, lambda: fit("raw_pixels"))
  metrics = {}
  for name in FEATURES:
    scores = fit(name)
    for split in splits:
      key = f"{split}/{name}/{label}"
      metrics[key] = scores[split]
      metrics[f"{key}@majority"] = float(np.bincount(y[split]).max() / len(y[split]))
      metrics[f"{key}@raw_pixels"] = floor[split]
  return metrics


def _pixels(images):
  return images.reshape(len(images), -1).astype(np.float32)


def _fit_and_score(x, y, train_split, select_split, penalties):
  """dicts of (N, W) features and (N,) labels by split -> {split: top-1}."""
  mean, std = x[train_split].mean(axis=0), x[train_split].std(axis=0) + 1e-6
  x = {s: (v - mean) / std for s, v in x.items()}
  classes = int(max(v.max() for v in y.values())) + 1
  accuracy = lambda w, s: float(np.mean(np.argmax(x[s] @ w[:-1] + w[-1], axis=1) == y[s]))
  fits = [fit_logistic(x[train_split], y[train_split], classes, l2) for l2 in penalties]
  best = max(fits, key=lambda w: accuracy(w, select_split))
  return {s: accuracy(best, s) for s in x}


def fit_logistic(x, y, classes, l2):
  """Multinomial logistic regression by L-BFGS: mean cross-entropy + l2/2 |W|^2 (bias free).

  x (N, W) float32, y (N,) int -> (W + 1, classes) float32, the bias in the last row.
  """
  x, y = jnp.asarray(x), jnp.asarray(y)
  start = np.zeros((x.shape[1] + 1) * classes)

  def value_and_grad(w):
    value, grad = _loss_and_grad(jnp.asarray(w, jnp.float32), x, y, classes, l2)
    return float(value), np.asarray(grad, np.float64)

  found = scipy.optimize.minimize(
    value_and_grad, start, jac=True, method="L-BFGS-B", options={"maxiter": 200}
  )
  return found.x.reshape(-1, classes).astype(np.float32)


@functools.partial(jax.jit, static_argnames="classes")
@functools.partial(jax.value_and_grad)
def _loss_and_grad(w, x, y, classes, l2):
  w = w.reshape(-1, classes)
  logits = jnp.matmul(x, w[:-1], precision=jax.lax.Precision.HIGHEST) + w[-1]
  log_p = jax.nn.log_softmax(logits)
  return -jnp.mean(jnp.take_along_axis(log_p, y[:, None], axis=1)) + l2 / 2 * jnp.sum(w[:-1] ** 2)
