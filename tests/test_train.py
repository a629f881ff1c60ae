"""The loop in one process; what a user meets on the command line is in test_main.py."""

import math
import os
import re
import shutil
import signal
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import presets
from jepa_vl import checkpoint, encoder, metrics, train
from jepa_vl import step as step_lib
from jepa_vl.data import array_record, feed, pipeline
from jepa_vl.data.counters import DataCounters


@pytest.fixture
def config(config):
  config.mesh.data = -1
  config.steps = 6
  return config


@pytest.fixture
def quick(config, monkeypatch):
  """A config whose steps only count themselves, with an evaluation that a test may replace."""
  one = jnp.float32(1)
  step = lambda state, rows: (
    state.replace(step=state.step + 1), {"loss": one, "grad_norm": one, "param_norm": one}
  )  # fmt: skip
  monkeypatch.setattr(step_lib, "jit_train_step", lambda *_: step)
  monkeypatch.setattr(train, "finish", lambda *_: None)
  config.steps, config.log_every, config.eval_every, config.checkpoint_every = 4, 100, 2, 2
  config.evals = ConfigDict({"rank": {"source": "emoji", "path": "", "splits": ("val",)}})
  return config


def failing_after(monkeypatch, count, before):
  """The real batches, of which the one after `count` raises once `before()` was called."""
  real = pipeline.batches

  def batches(*args, **kwargs):
    data = real(*args, **kwargs)
    for _ in range(count):
      yield next(data)
    before()
    raise RuntimeError("a worker was terminated")

  monkeypatch.setattr(pipeline, "batches", batches)


def test_a_worker_stopped_with_its_parent_does_not_take_the_save_along(
  config, tmp_path, monkeypatch
):
  """Schedulers signal the whole process group; the workers may be gone first."""
  failing_after(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
  assert train.train(config, str(tmp_path)) == train.PREEMPTED
  (saved,) = os.listdir(tmp_path / "checkpoints")
  assert 1 <= int(saved) <= 3  # batches are taken ahead of the step


def test_a_worker_that_dies_of_itself_is_an_error(config, tmp_path, monkeypatch):
  failing_after(monkeypatch, 3, lambda: None)
  with pytest.raises(RuntimeError, match="a worker was terminated"):
    train.train(config, str(tmp_path))
  assert os.listdir(tmp_path / "checkpoints") == ["3"]  # what was trained is not lost


def test_a_stop_in_the_final_evaluation_asks_to_be_started_again(config, tmp_path, monkeypatch):
  real = train.finish
  monkeypatch.setattr(train, "finish", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
  with pytest.raises(train.Stopped, match="SIGTERM; the same command goes on"):
    train.train(config, str(tmp_path))
  assert os.listdir(tmp_path / "checkpoints") == [str(config.steps)]
  monkeypatch.setattr(train, "finish", real)
  assert train.train(config, str(tmp_path)) == 0
  assert (tmp_path / "results.json").exists()


def test_an_evaluation_that_fails_does_not_take_the_due_save_along(quick, tmp_path, monkeypatch):
  def fails(*_):
    raise ValueError("no such figure")

  monkeypatch.setattr(train, "evaluate", fails)
  with pytest.raises(ValueError, match="no such figure"):
    train.train(quick, str(tmp_path))
  assert os.listdir(tmp_path / "checkpoints") == ["2"]


@pytest.mark.parametrize("stopped", [False, True])
def test_what_is_kept_by_an_evaluation_is_saved_after_it(quick, tmp_path, monkeypatch, stopped):
  """A run that is asked to stop saves and ends: there may be no time for more."""
  seen = []

  def evaluate(run, encode, variables, step, writer):
    checkpoints = tmp_path / "checkpoints"
    seen.append(any(name.startswith(str(step)) for name in os.listdir(checkpoints)))
    return {"rank": {"figures": {"val/img": 3.0}}}

  monkeypatch.setattr(train, "evaluate", evaluate)
  if stopped:  # in the first step
    quick.eval_every = 1
    monkeypatch.setattr(train, "take", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or {})
  quick.keep_best = "rank/val/img"
  assert train.train(quick, str(tmp_path)) == (train.PREEMPTED if stopped else 0)
  assert seen == ([] if stopped else [False])


def test_a_stop_in_the_last_save_comes_before_the_final_evaluation(quick, tmp_path, monkeypatch):
  real = checkpoint.Checkpoints.save

  def save(self, step, *args):
    if step == quick.steps:
      os.kill(os.getpid(), signal.SIGTERM)
    return real(self, step, *args)

  monkeypatch.setattr(checkpoint.Checkpoints, "save", save)
  monkeypatch.setattr(train, "finish", lambda *_: pytest.fail("evaluated"))
  quick.eval_every = 0
  assert train.train(quick, str(tmp_path)) == train.PREEMPTED
  assert (tmp_path / "checkpoints" / str(quick.steps)).is_dir()


def test_a_stop_within_what_cannot_raise_is_not_lost(capsys):
  """Where Python only prints "Exception ignored in", such as a callback of its collector."""

  class Short:
    def __del__(self):
      os.kill(os.getpid(), signal.SIGTERM)

  with pytest.raises(train.Stopped), train.StopSignal(at_once=True):
    Short()
    time.sleep(5)
  assert not capsys.readouterr().err


def test_a_stop_while_a_record_is_read_does_not_drop_the_record(tmp_path):
  """In the final evaluation, which would go on without it."""

  class Reader:
    def __getitem__(self, index):
      os.kill(os.getpid(), signal.SIGTERM)
      return b""

  with pytest.raises(train.Stopped), train.StopSignal(at_once=True):
    array_record._record(Reader(), 0)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["plus", "siglip"])
def test_the_other_objectives_train_resume_and_are_evaluated(config, tmp_path, preset, capsys):
  """In micro-batches, stopped and gone on with, evaluated on the way, alone and by the encoder."""
  presets.apply(config, preset)
  config.data.local_size, config.accumulate, config.log_every = 8, 2, 1
  config.evals = ConfigDict({"rank": {"source": "emoji", "path": "", "splits": ("val",)}})
  config.steps, config.checkpoint_every, config.eval_every = 4, 2, 2
  assert train.train(config, str(tmp_path / "straight")) == 0
  shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
  shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "4")
  assert train.train(config, str(tmp_path / "resumed")) == 0
  losses = [
    [r["loss"] for r in metrics.read_jsonl(tmp_path / name / "metrics.jsonl")]
    for name in ("straight", "resumed")
  ]
  assert losses[0] == losses[1] and len(losses[0]) == 4
  capsys.readouterr()
  train.evaluate_checkpoint(
    config, str(tmp_path / "resumed" / "checkpoints" / "4"), str(tmp_path / "eval")
  )
  rank = float(re.search(r"rank val img +([\d.]+)", capsys.readouterr().out)[1])
  logged = metrics.read_jsonl(tmp_path / "straight" / "evals.jsonl")
  assert [r["step"] for r in logged] == [2, 4]
  assert logged[1]["metrics"]["val/img"] == pytest.approx(rank, abs=1e-3)
  model = encoder.load(str(tmp_path / "resumed"))
  assert model.encode_image(np.zeros((20, 20, 3), np.uint8)).shape == (1, 16)


@pytest.mark.slow
def test_options_that_save_resume_exactly_across_the_change_of_size(config, tmp_path):
  """All of them, begun again after the small images: the same losses, and a model that opens."""
  config.update_from_flattened_dict({
    "model.image_size": 32, "model.patch_dropout": 0.5, "data.low_res": (16, 2), "accumulate": 2,
    "optim.name": "muon", "optim.mu_dtype": "bfloat16", "log_every": 1, "checkpoint_every": 2,
    "steps": 4,
  })  # fmt: skip
  assert train.train(config, str(tmp_path / "straight")) == 0
  shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
  shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "4")
  assert train.train(config, str(tmp_path / "resumed")) == 0
  losses = [
    [(r["loss"], r["grad_norm"]) for r in metrics.read_jsonl(tmp_path / name / "metrics.jsonl")]
    for name in ("straight", "resumed")
  ]
  assert losses[0] == losses[1] and len(losses[0]) == 4
  model = encoder.load(str(tmp_path / "resumed"))
  assert model.encode_image(np.zeros((20, 20, 3), np.uint8)).shape == (1, 16)


@pytest.mark.slow
def test_waiting_for_data_is_told(config, tmp_path, monkeypatch):
  """Batches that come late show as waiting, in the log and as a warning; prompt ones do not."""
  real, said = pipeline.batches, []
  monkeypatch.setattr(train.log, "warning", lambda text, *args: said.append(text % args))
  config.steps, config.log_every = 9, 1
  waited = {}
  for pause in (0.0, 1.5):  # a step takes a fraction of a second

    def batches(*args, pause=pause, **kwargs):
      for batch in real(*args, **kwargs):
        time.sleep(pause)
        yield batch

    monkeypatch.setattr(pipeline, "batches", batches)
    assert train.train(config, str(tmp_path / str(pause))) == 0
    logged = metrics.read_jsonl(tmp_path / str(pause) / "metrics.jsonl")
    waited[pause] = np.mean([r["data_wait"] for r in logged[5:]])  # beyond what was taken ahead
  # On a busy machine prompt batches are late, too: by less than those that sleep.
  assert waited[0.0] < waited[1.5] - 0.2 and 0.4 < waited[1.5] <= 1
  assert any("waiting for data" in text for text in said)


def test_the_device_is_not_idle_while_a_step_runs(config):
  class Running:
    def block_until_ready(self):
      done.wait()

  done, steps = threading.Event(), train.StepLog(config, None, None, None, 0, None)
  assert steps.idle_since() == 0.0
  steps.push(1, {"loss": Running()}, DataCounters(None, 0.01), 0.0)
  assert steps.idle_since() == math.inf
  done.set()
  while steps.idle_since() == math.inf:
    time.sleep(0.01)
  assert 0 < steps.idle_since() <= time.perf_counter()


@pytest.mark.parametrize(
  ("slow", "advice"), [(feed.READING, "the disk or network is slow"), (feed.DECODING, "smaller")]
)
def test_waiting_names_what_the_pipeline_spends_its_time_on(config, slow, advice):
  board = feed.Board()
  for stage in (feed.READING, feed.DECODING, feed.TOKENISING):
    board.enter(stage, 3)
    time.sleep(0.3 if stage == slow else 0.01)
  board.enter(feed.WAITING)
  said = train.StepLog(config, None, None, None, 0, board)._starved(0.25)
  board.close()
  assert "25% of the time is spent waiting for data" in said and advice in said
  assert re.search(rf"{feed.STAGES[slow]} (8|9)\d%", said)
