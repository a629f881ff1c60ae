"""The linear probe finds the optimum, and chooses its penalty on the selection split alone."""

import numpy as np
import pytest
import scipy.optimize

from jepa_vl.evals import probes


def problem(rows=60, width=5, classes=3):
  rng = np.random.default_rng(0)
  y = rng.integers(classes, size=rows)
  return (rng.normal(size=(rows, width)) + np.eye(classes, width)[y]).astype(np.float32), y


def logistic_loss(w, x, y, l2):
  """Plain float64 mean cross-entropy + l2/2 |W|^2 and its gradient; w (W + 1, classes)."""
  logits = x @ w[:-1] + w[-1]
  p = np.exp(logits - logits.max(axis=1, keepdims=True))
  p /= p.sum(axis=1, keepdims=True)
  loss = -np.mean(np.log(p[np.arange(len(y)), y])) + l2 / 2 * np.sum(w[:-1] ** 2)
  error = (p - np.eye(w.shape[1])[y]) / len(y)
  return loss, np.concatenate([x.T @ error + l2 * w[:-1], error.sum(axis=0, keepdims=True)])


@pytest.mark.parametrize("l2", [1e-3, 1e-1, 10.0])
def test_fit_logistic_finds_the_optimum(l2):
  x, y = problem()
  w = probes.fit_logistic(x, y, 3, l2)
  assert w.shape == (6, 3)
  loss, grad = logistic_loss(w.astype(np.float64), x.astype(np.float64), y, l2)
  flat = lambda v: logistic_loss(v.reshape(6, 3), x.astype(np.float64), y, l2)[0]
  best = scipy.optimize.minimize(flat, np.zeros(18), tol=1e-10).fun
  assert np.linalg.norm(grad) < 1e-3
  assert loss == pytest.approx(best, abs=1e-5)
  assert best < np.log(3) - 1e-3  # better than knowing nothing


def test_fit_logistic_separates_what_is_separable():
  y = np.arange(40) % 4
  x = np.eye(4)[y].astype(np.float32) + np.random.default_rng(0).uniform(-0.2, 0.2, (40, 4))
  w = probes.fit_logistic(x.astype(np.float32), y, 4, 1e-3)
  assert (np.argmax(x @ w[:-1] + w[-1], axis=1) == y).all()


def test_penalty_is_chosen_on_the_selection_split_alone():
  """Train and test want a weak penalty; the selection split, of reversed labels, a strong one."""
  x, y = problem(rows=80, classes=2)
  splits = {"train": x, "select": x, "test": x}
  labels = {"train": y, "select": 1 - y, "test": y}
  chosen = {}
  for name, select in (("same", "test"), ("reversed", "select")):
    chosen[name] = probes._fit_and_score(splits, labels, "train", select, (1e-3, 1e4))
  majority = max(np.bincount(y)) / len(y)
  assert chosen["same"]["test"] > majority > chosen["same"]["select"]
  assert chosen["reversed"]["test"] == pytest.approx(majority, abs=0.03)
