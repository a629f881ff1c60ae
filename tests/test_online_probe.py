"""The online probe learns what is there, resumes exactly, and leaves the encoder alone."""

import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from configs import presets
from jepa_vl import checkpoint, metrics, online_probe, sharding, train
from jepa_vl import state as state_lib
from jepa_vl.build import build
from jepa_vl.data import pipeline


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  make = sharding.make_mesh
  monkeypatch.setattr(
    sharding, "make_mesh", lambda **sizes: make(**sizes, devices=jax.devices()[:1])
  )


@pytest.fixture
def config(config):
  config.probe.label, config.probe.classes, config.probe.lr = "group", 10, 1e-2
  return config


def test_loss_and_gradient_are_those_of_a_loop():
  """float64, with rows that have no label."""
  rng = np.random.default_rng(0)
  probe = online_probe.OnlineProbe(width=6, classes=4, lr=1e-3)
  x, w = rng.normal(1, 3, (9, 6)), rng.normal(size=(7, 4))
  y = np.array([0, 3, -1, 2, 2, -1, 1, 0, 3])
  loss, grad, right = 0.0, np.zeros_like(w), 0
  for features, label in zip(x, y, strict=True):
    if label < 0:
      continue
    features = (features - features.mean()) / math.sqrt(features.var() + 1e-6)
    logits = features @ w[:-1] + w[-1]
    p = np.exp(logits) / np.exp(logits).sum()
    loss -= math.log(p[label]) / 7
    right += int(np.argmax(logits) == label)
    grad += np.outer([*features, 1], p - np.eye(4)[label]) / 7
  f = jax.grad(probe.loss, has_aux=True)
  found, terms = f(jnp.float32(w), jnp.float32(x), jnp.array(y))
  np.testing.assert_allclose(found, grad, atol=1e-6)
  expected = {"probe/loss": loss, "probe/top1": right / 7, "probe/labelled": 7 / 9}
  assert terms == pytest.approx(expected, abs=1e-6)
  nothing, terms = f(jnp.float32(w), jnp.float32(x), jnp.full(9, -1))
  assert not nothing.any() and set(map(float, terms.values())) == {0.0}


def learned(x, y, steps=300):
  """Mean top-1 of the last 50 of so many batches of 32."""
  probe = online_probe.OnlineProbe(x.shape[1], int(y.max()) + 1, 1e-2)
  step = jax.jit(jax.grad(probe.loss, has_aux=True))
  state, found = probe.init(), []
  for i in range(steps):
    rows = np.random.default_rng(i).integers(len(x), size=32)
    grads, terms = step(state["weights"], x[rows], y[rows])
    state = probe.update(state, grads)
    found.append(float(terms["probe/top1"]))
  return np.mean(found[-50:])


def test_planted_classes_are_learned_and_permuted_ones_are_chance():
  rng = np.random.default_rng(0)
  y = rng.integers(5, size=4000)
  x = (np.eye(5, 16)[y] * 3 + rng.normal(0, 0.3, (4000, 16))).astype(np.float32)
  assert learned(x, y) > 0.99
  assert learned(x, rng.permutation(y)) == pytest.approx(0.2, abs=0.05)


def steps_of(config, count=3):
  """The state and metrics after so many steps of real batches."""
  run = build(config)
  state = state_lib.init_state(run.model, run.tx, run.mesh, config.seed, run.probe)
  parts, pieces = sharding.row_parts(run.mesh)
  batches = pipeline.batches(
    run.source, run.tokenizer, run.data_config, batch_size=config.batch_size, seed=0, start_step=0,
    parts=parts, count=pieces,
  )  # fmt: skip
  for _ in range(count):
    with jax.set_mesh(run.mesh):
      state, values = run.train_step(state, train.put_rows(next(batches), run.mesh))
  return jax.device_get(state), jax.device_get(values)


@pytest.mark.parametrize("preset", ["", pytest.param("plus", marks=pytest.mark.slow)])
def test_the_encoder_is_the_same_without_it(config, preset):
  """To the bit, parameters, statistics and moments, in micro-batches."""
  presets.apply(config, preset)
  config.data.local_size, config.accumulate = 8, 2
  with_it, values = steps_of(config)
  assert np.abs(with_it.probe["weights"]).max() > 0 and values["probe/labelled"] == 1
  config.probe.label = ""
  without, fewer = steps_of(config)
  assert not without.probe and set(values) - set(fewer) == {
    "probe/loss", "probe/top1", "probe/labelled"
  }  # fmt: skip
  for part in ("step", "params", "batch_stats", "opt"):
    jax.tree.map(np.testing.assert_array_equal, getattr(with_it, part), getattr(without, part))
  assert all(values[k] == v for k, v in fewer.items())


def test_rows_may_lie_on_eight_devices():
  rng = np.random.default_rng(0)
  probe = online_probe.OnlineProbe(width=6, classes=4, lr=1e-3)
  w = jnp.float32(rng.normal(size=(7, 4)))
  x, y = np.float32(rng.normal(size=(16, 6))), np.repeat([0, 1, 2, -1], 4)
  f = jax.jit(jax.grad(probe.loss, has_aux=True))
  rows = NamedSharding(Mesh(np.array(jax.devices()), "rows"), P("rows"))
  one, eight = f(w, x, y), f(w, jax.device_put(x, rows), jax.device_put(y, rows))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, eight)
  assert len(eight[0].sharding.device_set) == 8


@pytest.mark.slow
def test_a_resumed_run_goes_on_as_if_never_stopped(config, tmp_path):
  config.log_every, config.steps, config.checkpoint_every = 1, 4, 2
  assert train.train(config, str(tmp_path / "straight")) == 0
  shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
  shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "4")
  assert train.train(config, str(tmp_path / "resumed")) == 0
  logged = [metrics.read_jsonl(tmp_path / n / "metrics.jsonl") for n in ("straight", "resumed")]
  keys = ("probe/loss", "probe/top1", "loss")
  assert [[r[k] for k in keys] for r in logged[0]] == [[r[k] for k in keys] for r in logged[1]]
  run = build(config)
  ends = [
    checkpoint.Checkpoints(str(tmp_path / n / "checkpoints"), keep=2).restore(
      run.abstract_state, check=lambda meta: None
    )
    for n in ("straight", "resumed")
  ]
  jax.tree.map(np.testing.assert_array_equal, *[jax.device_get(s.probe) for _, s in ends])
  assert np.abs(ends[0][1].probe["weights"]).max() > 0
  config.probe.label = ""
  with pytest.raises(ValueError, match="array probe/weights"):
    train.train(config, str(tmp_path / "resumed"))


def test_batches_have_the_records_labels(config):
  run = build(config)
  cfg = run.data_config
  batch = next(pipeline.batches(
    run.source, run.tokenizer, cfg, batch_size=16, seed=0, start_step=0
  ))  # fmt: skip
  expected = [run.source[int(i)]["group"] for i in batch["index"]]
  assert batch["label"].tolist() == expected and len(set(expected)) > 3
  cfg.label = "absent"
  batch = next(pipeline.batches(
    run.source, run.tokenizer, cfg, batch_size=16, seed=0, start_step=0
  ))  # fmt: skip
  assert set(batch["label"].tolist()) == {-1}


def test_bad_labels_are_named(config):
  config.probe.classes = 1
  with pytest.raises(ValueError, match="probe.classes=1: a probe of 'group' needs at least 2"):
    build(config)
  config.probe.classes = 3
  run = build(config)
  with pytest.raises(ValueError, match=r"'group' must be .* below probe.classes=3, .* got \d"):
    for batch in pipeline.batches(
      run.source, run.tokenizer, run.data_config, batch_size=16, seed=0, start_step=0
    ):
      assert batch["label"].max() < 3
  config.probe.label = "grp"
  with pytest.raises(ValueError, match="probe.label='grp': none of 32 records .* have are group"):
    build(config)


