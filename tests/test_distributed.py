"""Several processes as one run: what one of them meets ends or stops all, in words."""

import contextlib
import json
import os
import signal
import socket

import numpy as np
import processes
import pytest

from jepa_vl import distributed, metrics

SMALL = [
  "-m", "jepa_vl.main", "--config=configs/tiny.py", "--config.model.image_size=16",
  "--config.model.patch_size=8", "--config.model.scan=True", "--config.model.embed_dim=16",
  "--config.model.hidden_dim=32", "--config.text.length=12", "--config.batch_size=16",
  "--config.objective.num_slices=64", "--config.optim.warmup=5", "--config.log_every=1",
  "--config.peer_timeout=8",
]  # fmt: skip
NO_EVALS = "--config.evals={}"
HOST = socket.gethostname()


def steps(workdir):
  return {r["step"]: r for r in metrics.read_jsonl(workdir / "metrics.jsonl")}


def reached(workdir, step):
  return lambda: step in steps(workdir)


SILENT = "process {} on " + HOST + " has given no sign of life for 8 s"


@pytest.mark.parametrize(
  ("name", "victim", "words"),
  [
    ("SIGKILL", 2, SILENT.format(2)),
    # With it, all that the others could ask stands still.
    pytest.param("SIGSTOP", 0, SILENT.format(0), marks=pytest.mark.slow),
    pytest.param("SIGSTOP", 1, SILENT.format(1), marks=pytest.mark.slow),
    # The others' connection breaks at once.
    pytest.param(
      "SIGKILL", 0, f"process 0 on {HOST}, which coordinates the run, has died",
      marks=pytest.mark.slow,
    ),
  ],
)  # fmt: skip
def test_a_process_that_dies_or_stands_still_ends_all(tmp_path, name, victim, words):
  flags = [*SMALL, NO_EVALS, "--config.steps=100000", f"--workdir={tmp_path}"]
  with processes.start(4, flags) as started:
    started[0].wait_until(reached(tmp_path, 3))
    started[victim].signal(name)
    for process in started[:victim] + started[victim + 1 :]:
      result = process.wait(60)
      assert result.code == 1, result.output
      assert words in result.output
      assert "Traceback" not in result.output


@contextlib.contextmanager
def two(first, second):
  """Process 0 and 1 of one run, with different flags."""
  address = f"127.0.0.1:{processes.free_port()}"
  join = [f"--coordinator={address}", "--num_processes=2"]
  with (
    processes.start(1, [*SMALL, NO_EVALS, *join, "--process_id=0", *first]) as [a],
    processes.start(1, [*SMALL, NO_EVALS, *join, "--process_id=1", *second]) as [b],
  ):
    yield a, b


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--config.optim.lr=0.5"], [
      f"process 1 on {HOST} was not started as process 0 on {HOST}", "optim.lr: 0.001 there, 0.5"]),
    (["--workdir={other}"], ["--workdir=", "process 1 does not see what process 0 writes there"]),
  ],
)  # fmt: skip
def test_a_process_started_otherwise_ends_all(tmp_path, flags, words):
  here, there = tmp_path / "here", tmp_path / "there"
  flags = [f.format(other=there) for f in flags]
  with two([f"--workdir={here}"], [f"--workdir={here}", *flags]) as (first, second):
    for process in (first, second):
      result = process.wait(120)
      assert result.code == 1, result.output
      assert all(w in result.output for w in words), result.output
      assert "Traceback" not in result.output
    if "has failed" in first.output:
      assert f"process 1 on {HOST} has failed: " in first.output


def test_other_code_ends_all():
  """What no flag shows: the two processes run different versions."""
  program = """
import sys
from jepa_vl import distributed
address, count, me = (flag.split("=")[1] for flag in sys.argv[1:])
watch = distributed.start(address, int(count), int(me), timeout=8)
try:
  watch.check_same("config", distributed.versions() | {"code of jepa_vl": f"version {me}"})
except ValueError as e:
  print(e, flush=True)
  watch.fail(str(e))
"""
  for result in processes.run(2, ["-c", program], timeout=60):
    assert result.code == 1
    assert f"process 1 on {HOST} was not started as process 0 on {HOST}" in result.output
    assert "code of jepa_vl: version 0 there, version 1 here" in result.output


@pytest.mark.slow
def test_a_stop_of_one_process_saves_the_same_step_everywhere(tmp_path):
  """SIGTERM to one of 4; then 1 process, then 2: the losses of a run that nothing disturbed."""
  flags = [*SMALL, NO_EVALS, "--config.steps=40"]
  [straight] = processes.run(1, [*flags, f"--workdir={tmp_path / 'straight'}"])
  assert straight.code == 0, straight.output

  workdir = tmp_path / "moved"
  stopped = []
  for count in (4, 1):
    with processes.start(count, [*flags, f"--workdir={workdir}"]) as started:
      started[0].wait_until(reached(workdir, 5 if count == 4 else stopped[0] + 5))
      started[-1].signal("SIGTERM")
      results = [process.wait(60) for process in started]
    assert [r.code for r in results] == [75] * count, results[0].output
    stopped.append(max(steps(workdir)))
    assert (workdir / "checkpoints" / str(stopped[-1])).is_dir()
    assert "saved" in results[0].output
  results = processes.run(2, [*flags, f"--workdir={workdir}"])
  assert [r.code for r in results] == [0, 0], results[0].output

  expected, found = steps(tmp_path / "straight"), steps(workdir)
  assert sorted(found) == list(range(1, 41)) and stopped[0] < stopped[1] < 40
  for key in ("loss", "lr"):
    values = [[r[s][key] for s in sorted(r)] for r in (found, expected)]
    np.testing.assert_allclose(*values, rtol=2e-4)


def test_a_stop_that_takes_the_workers_along_asks_to_be_started_again(tmp_path):
  """SIGTERM to one process and all that it started, as a machine's shutdown sends it."""
  flags = [*SMALL, NO_EVALS, "--config.steps=100000", "--config.data.workers=1"]
  with processes.start(2, [*flags, f"--workdir={tmp_path}"]) as started:
    started[0].wait_until(reached(tmp_path, 3))
    os.killpg(started[1].pid, signal.SIGTERM)
    results = [process.wait(60) for process in started]
  assert [r.code for r in results] == [75, 75], results[1].output
  assert all("Traceback" not in r.output for r in results)


@pytest.mark.slow
def test_evaluation_is_shared_and_the_same(tmp_path):
  """On 2 processes of 2 devices each as on one: every figure, decoded in halves."""
  config = tmp_path / "few.py"
  config.write_text(
    "from configs import tiny\n"
    "def get_config():\n"
    "  c = tiny.get_config()\n"
    "  c.evals = type(c)({k: {**c.evals[k], 'splits': ('C',)} for k in ('retrieval', 'rank')})\n"
    "  return c\n"
  )
  flags = [f"--config={config}" if f.startswith("--config=") else f for f in SMALL]
  tables = []
  for count, devices in ((1, 1), (2, 2)):
    workdir = tmp_path / str(count)
    program = [*flags, "--config.steps=2", f"--workdir={workdir}"]
    for result in processes.run(count, program, devices=devices):
      assert result.code == 0, result.output
    tables.append(json.loads((workdir / "results.json").read_text())["rows"])
  assert len(tables[0]) == len(tables[1]) > 20
  for one, other in zip(*tables, strict=True):
    assert one["metric"] == other["metric"]
    # A figure counts right answers: round-off moves a few that were nearly tied.
    assert one["value"] == pytest.approx(other["value"], abs=0.02, rel=1e-3), one


@pytest.mark.parametrize(
  ("given", "words"),
  [
    (("host:1", None, 0), "--num_processes not given"),
    (("host:1", 2, 2), "--process_id=2 must be from 0 to --num_processes - 1 = 1"),
    (("host", 2, 0), "--coordinator=host must be HOST:PORT"),
  ],
)
def test_process_flags_that_make_no_sense(given, words):
  with pytest.raises(ValueError, match=words):
    distributed.start(*given)


def test_alone_without_a_launcher_starts_nothing(monkeypatch):
  for name in distributed._COUNTS:
    monkeypatch.delenv(name, raising=False)
  assert distributed.start() is None
