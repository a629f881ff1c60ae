"""The feed runs one batch ahead and names a worker that died, hangs or reads slowly."""

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from records import pair, record, write

from jepa_vl.data import feed, pipeline, sources
from jepa_vl.data.feed import DECODING, READING, STAGES, TOKENISING, WAITING


@pytest.fixture
def board():
  with_files = feed.Board()
  yield with_files
  with_files.close()


@pytest.fixture
def warnings(monkeypatch):
  said = []
  monkeypatch.setattr(feed.log, "warning", lambda text, *args: said.append(text % args))
  return said


def make(batches, board=None, *, where=str, stopping=lambda: False, timeout=0, put=lambda b: -b):
  found = feed.Feed(
    batches, put, board=board or feed.Board(), where=where, stopping=stopping, timeout=timeout
  )
  found.start(workers=0)
  return found


# --- order, ends


def test_batches_come_in_order_with_what_put_made_of_them():
  with make(iter(range(1, 5))) as f:
    assert [f.next() for _ in range(4)] == [(1, -1), (2, -2), (3, -3), (4, -4)]
    with pytest.raises(StopIteration):
      f.next()


def test_one_batch_is_put_ahead_and_no_more():
  put = []
  with make(itertools.count(), put=put.append) as f:
    for taken in range(5):
      f.next()
      deadline = time.monotonic() + 10
      while len(put) < taken + 2 and time.monotonic() < deadline:
        time.sleep(0.01)
      time.sleep(0.05)
      assert put == list(range(taken + 2))


def test_an_error_comes_after_the_batches_before_it():
  def batches():
    yield 1
    raise ValueError("no further record")

  with make(batches()) as f:
    assert f.next() == (1, -1)
    with pytest.raises(ValueError, match="no further record"):
      f.next()


def test_a_stop_request_does_not_wait_for_a_batch():
  stop, answered = threading.Event(), threading.Event()

  def batches():
    answered.wait()
    yield 1

  with make(batches(), stopping=stop.is_set) as f:
    threading.Timer(0.5, stop.set).start()
    assert f.next() is None
  answered.set()


def test_a_read_that_never_returns_is_known_at_the_end():
  answered = threading.Event()

  def batches():
    answered.wait()
    yield 1

  with make(batches()):
    pass
  assert feed.is_stuck(0.2)
  answered.set()
  assert not feed.is_stuck()


# --- what the processes are at


def test_the_board_tells_what_every_process_is_at(board):
  assert board.read() == [] and board.shares() == {}
  for stage, pause in ((READING, 0.2), (DECODING, 0.1), (TOKENISING, 0.0), (WAITING, 0.3)):
    board.enter(stage, 7)
    time.sleep(pause)
  board.enter(DECODING, 8)
  ((process, stage, index, since, spent),) = board.read()
  assert (process, STAGES[stage], index) == (os.getpid(), "decoding", 8)
  assert 0 <= time.monotonic() - since < 5
  assert spent[READING] >= 0.2 and spent[DECODING] >= 0.1 and spent[WAITING] >= 0.3
  shares = board.shares()
  assert sum(shares.values()) == pytest.approx(1) and shares["reading"] > shares["decoding"]


@pytest.fixture
def hanging(tmp_path):
  """A folder of pairs of which number 3's image is a pipe that nobody writes to."""
  for i in range(6):
    for name, data in pair(i):
      (tmp_path / name).write_bytes(data)
  source = sources.open_source("folder", str(tmp_path), "")
  image = tmp_path / "000003.png"
  image.rename(tmp_path / "image")
  os.mkfifo(image)
  yield source
  image.rename(tmp_path / "pipe")
  (tmp_path / "image").rename(image)
  os.close(os.open(tmp_path / "pipe", os.O_WRONLY | os.O_NONBLOCK))  # whoever reads it may end


@pytest.mark.parametrize("workers", [0, 2])
def test_a_read_that_hangs_is_named_and_ends_the_run(
  hanging, tok, cfg, monkeypatch, warnings, workers, board
):
  monkeypatch.setattr(feed, "_WARN_AFTER", 1.0)
  cfg.workers = workers
  seed = next(s for s in range(99) if pipeline.Order(hanging, s)[5][1] == 3)  # in the third batch
  batches = pipeline.batches(
    hanging, tok, cfg, batch_size=2, seed=seed, start_step=0, board=board
  )
  with make(batches, board, where=hanging.where, put=len, timeout=200) as f:
    f.next()  # the workers have begun
    f._timeout = 4
    with pytest.raises(TimeoutError, match="data.timeout=4") as e:
      for _ in range(100):
        f.next()
    for text in (warnings[-1], str(e.value)):
      assert re.search(r"process \d+ has been reading \S*000003 for \d+ s", text)


def test_a_worker_that_was_killed_is_an_error_at_once(tmp_path, tok, cfg, board):
  cfg.workers = 2
  path = write(tmp_path / "x.array_record", [record(i) for i in range(20)])
  source = sources.open_source("array_record", path, "")
  batches = pipeline.batches(source, tok, cfg, batch_size=4, seed=0, start_step=0, board=board)
  with make(batches, board, where=source.where, put=len) as f:
    f.next()
    os.kill(board.read()[0][0], signal.SIGKILL)
    begun = time.monotonic()
    with pytest.raises(ChildProcessError, match=r"exit code -9\): process \d+ has been "):
      for _ in range(1000):
        f.next()
    assert time.monotonic() - begun < 60


def test_an_error_in_a_worker_is_told_as_it_is(tmp_path, tok, cfg, board):
  cfg.workers = 2
  source = sources.ArrayRecord(write(tmp_path / "x.array_record", [b"no record"] * 20))
  batches = pipeline.batches(source, tok, cfg, batch_size=4, seed=0, start_step=0, board=board)
  with make(batches, board, where=source.where, put=len) as f, pytest.raises(Exception) as e:
    f.next()
  assert "records in a row" in str(e.value) and not isinstance(e.value, ChildProcessError)


def test_files_that_were_cleared_away_end_nothing(board):
  board.enter(READING, 1)
  board.close()
  board.enter(DECODING, 1)
  assert board.read() == [] and board.shares() == {}


def test_workers_end_with_the_process_that_started_them(tmp_path):
  """Also where it was killed and could not tell them."""
  path = write(tmp_path / "x.array_record", [record(i) for i in range(20)])
  environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
  process = subprocess.Popen(
    [sys.executable, __file__, path], stdout=subprocess.PIPE, text=True, env=environment
  )
  workers = [int(pid) for pid in process.stdout.readline().split()]
  assert len(workers) == 2 and all(os.path.exists(f"/proc/{pid}") for pid in workers)
  process.kill()
  process.communicate()
  deadline = time.monotonic() + 60
  while any(map(_alive, workers)):
    assert time.monotonic() < deadline, "a worker is still there"
    time.sleep(0.5)


def _alive(pid):
  try:
    with open(f"/proc/{pid}/stat") as f:
      return f.read().rsplit(")", 1)[1].split()[0] != "Z"
  except FileNotFoundError:
    return False


def main(path):
  """Takes batches from two workers, prints their process ids and waits."""
  from absl import flags

  from configs import tiny
  from jepa_vl.data import tokenizer

  flags.FLAGS.mark_as_parsed()
  c = tiny.get_config().unlock().data
  c.update({"workers": 2, "image_size": 16, "text_length": 12, "readout": "eot", "label": "",
            "classes": 0})  # fmt: skip
  board = feed.Board()
  data = pipeline.batches(
    sources.open_source("array_record", path, ""), tokenizer.load("emoji"), c, batch_size=4,
    seed=0, start_step=0, board=board,
  )  # fmt: skip
  while len(board.read()) < 2:
    next(data)
  print(*(process[0] for process in board.read()), flush=True)
  time.sleep(600)


if __name__ == "__main__":
  main(sys.argv[1])
