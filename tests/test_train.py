"""The loop in one process; what a user meets on the command line is in test_main.py."""

import math
import os
import re
import shutil
import signal
import threading
import time

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import presets
from jepa_vl import encoder, metrics, train
from jepa_vl.data import feed, pipeline
from jepa_vl.data.transforms import REASONS, DamagedRecord


@pytest.fixture
def config(config):
  config.mesh.data = -1
  config.steps = 6
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
  train.evaluate_checkpoint(config, str(tmp_path / "resumed" / "checkpoints" / "4"))
  rank = float(re.search(r"rank val img +([\d.]+)", capsys.readouterr().out)[1])
  logged = metrics.read_jsonl(tmp_path / "straight" / "evals.jsonl")
  assert [r["step"] for r in logged] == [2, 4]
  assert logged[1]["metrics"]["val/img"] == pytest.approx(rank, abs=1e-3)
  model = encoder.load(str(tmp_path / "resumed"))
  assert model.encode_image(np.zeros((20, 20, 3), np.uint8)).shape == (1, 16)


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
  assert waited[0.0] < 0.4 < waited[1.5] <= 1
  assert any("waiting for data" in text for text in said)


def test_the_device_is_not_idle_while_a_step_runs(config):
  class Running:
    def block_until_ready(self):
      done.wait()

  done, steps = threading.Event(), train.StepLog(config, None, None, None, 0, None)
  assert steps.idle_since() == 0.0
  steps.push(1, {"loss": Running()}, train.DataCounters(None, 0.01), 0.0)
  assert steps.idle_since() == math.inf
  done.set()
  while steps.idle_since() == math.inf:
    time.sleep(0.01)
  assert 0 < steps.idle_since() <= time.perf_counter()


# --- bad records


class Broken:
  """Every record is bad; its message names the record."""

  def __init__(self):
    self.asked = []

  def __getitem__(self, index):
    self.asked.append(index)
    raise DamagedRecord(f"message {index}", "unreadable")


def rows(bad, of):
  """A batch of `of` rows, the first of which stand in for `bad`: {index: reason}."""
  fill = lambda values: np.array([*values, *[-1] * (of - len(bad))])
  return {
    "bad": fill(bad), "reason": fill([REASONS.index(reason) for reason in bad.values()]),
    "truncated": np.zeros(of, bool),
  }  # fmt: skip


def test_bad_records_are_counted_by_reason():
  counters = train.DataCounters(Broken(), 0.5)
  for i in range(3):
    counters.add(rows({i: "no_caption", 50 + i: "unreadable", 90 + i: "no_caption"}, of=20))
  counters.add(rows({}, of=20))
  assert counters.read() == {
    "data/bad_records": 9, "data/bad/no_caption": 6, "data/bad/unreadable": 3,
    "data/truncated_captions": 0,
  }  # fmt: skip


def test_thousands_of_bad_records_are_a_few_lines_and_reads(caplog):
  source = Broken()
  counters = train.DataCounters(source, 1.0)
  for i in range(0, 20_000, 10):
    counters.add(rows({n: REASONS[n % 2] for n in range(i, i + 10)}, of=10))
  assert source.asked == [0, 1, 2, 3, 4, 5]
  assert len(caplog.messages) == 6 + 4  # at 10, 100, 1000, 10000
  assert "record 0 cannot be used" in caplog.messages[0] and "message 0" in caplog.messages[0]
  assert caplog.messages[-1].endswith("so far: 5000 unreadable, 5000 malformed")


def test_a_shard_that_vanishes_late_ends_the_run():
  """Two in a hundred from row 1,000,000 on: within 100,000 rows, whatever was good before."""
  counters = train.DataCounters(Broken(), 0.01)
  for i in range(1000):
    counters.add(rows({i: "duplicate_key"} if i < 100 else {}, of=1000))
  with pytest.raises(ValueError) as e:
    for batch in range(100):
      bad = {100 * batch + i: ("unreadable", "no_image")[i % 2] for i in range(20)}
      counters.add(rows(bad, of=1000))
  assert batch == 54  # three standard deviations of 1000 more
  said = str(e.value)
  assert said.startswith("1100 of the latest 100000 training records") and "=0.01" in said
  assert "550 unreadable (record 0: message 0, record 2: " in said and "550 no_image (rec" in said
  assert "duplicate_key" not in said


def test_bad_records_within_the_budget_never_end_the_run():
  """Nine in 1000 for ever, as chance has it; and ten of however few."""
  for seed in range(20):
    counters, rng = train.DataCounters(Broken(), 0.01), np.random.default_rng(seed)
    for i in range(600):
      counters.add(rows({1000 * i + j: "unreadable" for j in range(rng.binomial(256, 0.009))}, 256))
  counters = train.DataCounters(Broken(), 0.01)
  for i in range(10):
    counters.add(rows({i: "unreadable"}, of=2))
  with pytest.raises(ValueError, match="11 of the latest 22"):
    counters.add(rows({10: "unreadable"}, of=2))


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
