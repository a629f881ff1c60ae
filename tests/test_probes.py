"""The linear probe finds the optimum, and chooses its penalty on the selection split alone."""

import jax
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from made_up import make_encode, make_variables

from jepa_vl import sharding
from jepa_vl.evals import common, fit, head_probe, probes


def mesh_of(count):
  return sharding.make_mesh(data=count, fsdp=1, tensor=1, devices=jax.devices()[:count])


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


@pytest.mark.parametrize(
  ("l2", "block", "devices"), [(1e-3, 60, 1), (1e-1, 60, 8), (10.0, 60, 1), (1e-1, 16, 8)]
)
def test_fit_logistic_finds_the_optimum(l2, block, devices, monkeypatch):
  """Also in blocks, of which the last is ragged, on one device and on eight."""
  monkeypatch.setattr(probes, "BLOCK", block)
  x, y = problem()
  w = probes.fit_logistic(x, y, 3, l2, mesh_of(devices))
  assert w.shape == (6, 3)
  loss, grad = logistic_loss(w.astype(np.float64), x.astype(np.float64), y, l2)
  flat = lambda v: logistic_loss(v.reshape(6, 3), x.astype(np.float64), y, l2)[0]
  best = scipy.optimize.minimize(flat, np.zeros(18), tol=1e-10).fun
  # The loss is summed in float32, so that along a curvature of l2 its minimum is this flat.
  assert np.linalg.norm(grad) < 1e-3 * max(1, l2)
  assert loss == pytest.approx(best, abs=1e-5)
  assert best < np.log(3) - 1e-3  # better than knowing nothing


def test_fit_logistic_separates_what_is_separable():
  y = np.arange(40) % 4
  x = np.eye(4)[y].astype(np.float32) + np.random.default_rng(0).uniform(-0.2, 0.2, (40, 4))
  w = probes.fit_logistic(x.astype(np.float32), y, 4, 1e-3, mesh_of(1))
  assert (np.argmax(x @ w[:-1] + w[-1], axis=1) == y).all()


def test_penalty_is_chosen_on_the_selection_split_alone():
  """Train and test want a weak penalty; the selection split, of reversed labels, a strong one."""
  x, y = problem(rows=80, classes=2)
  splits = {"train": x, "select": x, "test": x}
  labels = {"train": y, "select": 1 - y, "test": y}
  chosen = {}
  for name, select in (("same", "test"), ("reversed", "select")):
    right = probes.fit_and_score(
      splits, labels, train="train", select=select, penalties=(1e-3, 1e4), mesh=mesh_of(1)
    )
    chosen[name] = {split: np.mean(hits) for split, hits in right.items()}
  majority = max(np.bincount(y)) / len(y)
  assert chosen["same"]["test"] > majority > chosen["same"]["select"]
  assert chosen["reversed"]["test"] == pytest.approx(majority, abs=0.03)


@pytest.mark.parametrize("penalties", [(1e-4, 1e3), (1e3, 1e-4)])
def test_without_a_selection_split_a_tenth_of_train_chooses(penalties):
  """Noise that one feature adds and another takes away: a strong penalty cannot use it."""
  rng = np.random.default_rng(0)
  y, noise = rng.integers(0, 2, 1000), rng.normal(size=1000) * 5
  x = np.stack([y + noise, noise], axis=1).astype(np.float32)
  x, y = {"train": x[:500], "test": x[500:]}, {"train": y[:500], "test": y[500:]}
  keys = {"train": "train", "select": "", "mesh": mesh_of(1)}
  accuracy = lambda *l2: np.mean(probes.fit_and_score(x, y, penalties=l2, **keys)["test"])
  assert accuracy(1e3) < 0.7 and accuracy(*penalties) == accuracy(1e-4) > 0.95


def test_few_shots_are_so_many_of_each_class_and_differ_between_draws():
  y = np.random.default_rng(0).integers(6, size=200)
  first, again, other = (probes.draw_few(y, 5, draw) for draw in (0, 0, 1))
  assert np.bincount(y[first]).tolist() == [5] * 6 and len(set(first)) == 30
  assert first.tolist() == again.tolist() != other.tolist()
  with pytest.raises(ValueError, match=r"class 0 has \d+ training images to draw from, shots=60"):
    probes.draw_few(y, 60, 0)


def test_few_shots_never_draw_what_chooses_their_penalty():
  """The tenth that chooses has features of its own: a probe that drew from it would be perfect."""
  rng = np.random.default_rng(0)
  y = {"train": rng.integers(3, size=300), "test": rng.integers(3, size=300)}
  held = fit.held_out(np.arange(300))
  x = {"train": rng.normal(size=(300, 3)).astype(np.float32), "test": np.eye(3)[y["test"]]}
  x["train"][held] = np.eye(3)[y["train"]][held]
  keys = {"train": "train", "select": "", "penalties": (1e-3,), "mesh": mesh_of(1)}
  assert np.mean(probes.fit_few(x, y, 5, 4, **keys)["test"]) < 0.75
  x["train"] = np.eye(3, dtype=np.float32)[y["train"]]
  assert np.mean(probes.fit_few(x, y, 1, 4, **keys)["test"]) == 1


def test_the_interval_over_draws_is_students():
  found = np.array([0.5, 0.6, 0.4, 0.55])
  figures = probes._over_draws("k", found)
  low, high = scipy.stats.t.interval(0.95, 3, found.mean(), found.std(ddof=1) / 2)
  assert figures == pytest.approx({"k": found.mean(), "k@low": low, "k@high": high})


# --- heads trained by AdamW

HOW = {"epochs": 30, "batch_size": 32, "lrs": (1e-6, 5e-3), "weight_decay": 0.01, "seed": 0}
KEYS = {"source": "", "path": "", "splits": ("test",), "label": "c", "train_split": "train",
        "select_split": ""}  # fmt: skip


def test_adamw_is_that_of_a_loop():
  """A bias-free linear head in float64 over the same batches, for two rates at once."""
  x, y = problem(rows=37, classes=3)
  how = fit.Fit(epochs=3, batch_size=8, lrs=(0.1, 0.01), weight_decay=0.05, seed=4)
  head = head_probe.make_head("linear", 3, 5)
  start = head.init(jax.random.key(0), x[:1])

  def loss(params, x, y):
    log_p = jax.nn.log_softmax(head.apply(params, x))
    return -log_p[np.arange(8), y].mean()

  found = fit.adamw(loss, start, lambda rows: (x[rows], y[rows]), np.arange(37), how, mesh_of(1))
  rng, steps = np.random.default_rng(4), 3 * 37 // 8
  order = np.concatenate([rng.permutation(37) for _ in range(4)])
  for k, lr in enumerate(how.lrs):
    w, m, v = np.zeros((5, 3)), 0, 0
    for t in range(steps):
      rows = order[8 * t : 8 * t + 8]
      p = np.exp(x[rows].astype(float) @ w)
      p /= p.sum(axis=1, keepdims=True)
      grad = x[rows].T.astype(float) @ (p - np.eye(3)[y[rows]]) / 8
      m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
      update = m / (1 - 0.9 ** (t + 1)) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8)
      w -= lr * 0.5 * (1 + np.cos(np.pi * t / steps)) * (update + 0.05 * w)
    np.testing.assert_allclose(found["params"]["Dense_0"]["kernel"][k], w, atol=2e-5)


def planted(monkeypatch, mesh, shuffle=False):
  """Encode whose features tell the class; of the patch tokens one does, anywhere among noise."""
  encode, rng = make_encode(mesh), np.random.default_rng(0)
  y = {"train": rng.integers(4, size=500), "test": rng.integers(4, size=203)}
  x = {s: {n: (np.eye(4, 8)[v] + rng.normal(0, 0.2, (len(v), 8))).astype(np.float32)
           for n in ("cls", "pooled")} for s, v in y.items()}  # fmt: skip
  tokens = {s: rng.normal(0, 0.3, (len(v), 3, 3, 8)).astype(np.float32) for s, v in y.items()}
  for s, v in y.items():
    rows, places = np.arange(len(v)), rng.integers(3, size=len(v))
    tokens[s][rows, places, 1, v] += 4
    tokens[s][rows, places, 1, 7] += 4  # by which to know it: the norm hides what is large
  if shuffle:
    y = {s: rng.permutation(v) for s, v in y.items()}

  class Split(str):
    def __len__(self):
      return len(y[str(self)])

    def images(self, rows):
      return tokens[str(self)][rows]

  monkeypatch.setattr(encode, "features", lambda variables, source, path, split: x[split])
  monkeypatch.setattr(encode, "split", lambda source, path, split: Split(split))
  monkeypatch.setattr(encode, "patches", lambda variables, images: images)
  monkeypatch.setattr(common, "labels", lambda split, label: y[str(split)])
  return encode


def run_head(encode, mesh, head, features, **changes):
  keys = {**KEYS, **HOW, "keep": 1.0, "head": head, "features": features, **changes}
  return head_probe.run(encode, make_variables(), mesh, **keys)


HEADS = [("linear", ("cls", "both")), ("mlp:32", ("cls",)), ("attentive:2", ())]


@pytest.mark.parametrize(("head", "features"), HEADS, ids=lambda v: str(v)[:4])
def test_every_head_finds_what_is_planted_and_nothing_else(head, features, monkeypatch):
  mesh = mesh_of(1)
  encode = planted(monkeypatch, mesh)
  result = run_head(encode, mesh, head, features)
  keys = [f"test/{name}/c" for name in features or ("tokens",)]
  assert all(result["figures"][key] > 0.93 for key in keys)
  key = keys[0]
  low, value, high = (result["figures"][k] for k in (f"{key}@low", key, f"{key}@high"))
  rates = set(result["sizes"]["train"]["lr"].values())
  assert head == "linear" or rates == {5e-3}  # the other learns nothing
  assert low <= value <= high and 0.2 < result["figures"][f"{key}@majority"] < 0.35
  shuffled = run_head(planted(monkeypatch, mesh, shuffle=True), mesh, head, features)
  assert shuffled["figures"][key] == pytest.approx(0.25, abs=0.1)


def test_tokens_beyond_the_memory_are_made_again(monkeypatch):
  mesh = mesh_of(1)
  encode = planted(monkeypatch, mesh)
  go = lambda **changes: run_head(encode, mesh, "attentive:2", (), epochs=4, **changes)["figures"]
  assert go() == go(keep=0.0)


def test_heads_are_the_same_on_eight_devices(monkeypatch):
  encode = planted(monkeypatch, mesh_of(1))
  one, eight = (
    run_head(encode, mesh_of(n), "linear", ("cls",), epochs=5)["figures"] for n in (1, 8)
  )
  assert one == pytest.approx(eight, abs=0.01)


def test_heads_that_are_none_are_said(monkeypatch):
  mesh = mesh_of(1)
  encode = planted(monkeypatch, mesh)
  for head in ("conv", "mlp", "mlp:0", "linear:3", "attentive:x"):
    with pytest.raises(ValueError, match=f"head must be one of linear, mlp:.*, got '{head}'"):
      run_head(encode, mesh, head, ("cls",))
  with pytest.raises(ValueError, match="attentive:3': 3 heads do not divide the width of 8"):
    run_head(encode, mesh, "attentive:3", ())
  with pytest.raises(ValueError, match=r"patch tokens: features must be \(\), got"):
    run_head(encode, mesh, "attentive:2", ("cls",))
  with pytest.raises(ValueError, match="features must be of cls, pooled, both, got .'all',."):
    run_head(encode, mesh, "linear", ("all",))
