"""The loop in one process; what a user meets on the command line is in test_main.py."""

import os
import signal

import jax.numpy as jnp
import pytest

from jepa_vl import train
from jepa_vl.data import pipeline


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
  assert (tmp_path / "checkpoints" / "3").is_dir()


def test_a_worker_that_dies_of_itself_is_an_error(config, tmp_path, monkeypatch):
  failing_after(monkeypatch, 3, lambda: None)
  with pytest.raises(RuntimeError, match="a worker was terminated"):
    train.train(config, str(tmp_path))
  assert not (tmp_path / "checkpoints" / "3").exists()


def test_the_device_is_idle_since_its_last_step_was_done(config):
  steps = train.StepLog(config, None, None, None, 0)
  assert steps.idle_since() == 0.0
  steps.push(1, {"loss": jnp.ones(())}, train.DataCounters(0.01), 0.0)
  steps._finished.result()
  done = steps.idle_since()
  assert 0 < done <= train.time.perf_counter() and steps.idle_since() == done
