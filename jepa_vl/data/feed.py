"""Batches, one ahead of the training loop, and who keeps it waiting when none comes.

Every process that makes rows writes to a small file of its own, the `Board`, what it is at and how
long it has spent on what. A file, because the workers are grain's: nothing else of ours reaches
them. The `Feed` reads those files while it waits.
"""

import logging
import mmap
import multiprocessing
import os
import queue
import shutil
import signal
import struct
import tempfile
import threading
import time

from jepa_vl.data import common

log = logging.getLogger(__name__)

_WARN_AFTER = 20.0  # seconds without a batch, and again after as many more
_START = 60.0  # seconds in which workers start
_THREAD = "feed"

# What a process is at; the times spent on the last three tell what limits the pipeline.
STAGES = ("waiting", "reading", "decoding", "tokenising")
WAITING, READING, DECODING, TOKENISING = range(len(STAGES))
# stage, record, since when (monotonic clock, one for the machine), seconds spent in each stage
_FORMAT = struct.Struct(f"2q{1 + len(STAGES)}d")


class Board:
  """Where processes write what they are at; pickled into workers, it opens a file in each."""

  def __init__(self):
    self._folder = tempfile.mkdtemp(prefix="jepa_vl-")
    self._file = None

  def __getstate__(self):
    return {"_folder": self._folder, "_file": None}

  def enter(self, stage, index=-1):
    """This process now begins `stage` on the record `index`."""
    now = time.monotonic()
    if self._file is None:
      self._open(now)
    self._spent[self._stage] += now - self._since
    self._stage, self._since = stage, now
    _FORMAT.pack_into(self._file, 0, stage, index, now, *self._spent)

  def _open(self, now):
    with open(os.path.join(self._folder, str(os.getpid())), "wb+") as f:
      f.truncate(_FORMAT.size)
      self._file = mmap.mmap(f.fileno(), _FORMAT.size)
    self._stage, self._since, self._spent = WAITING, now, [0.0] * len(STAGES)
    if multiprocessing.parent_process():
      common.end_with_parent()

  def read(self):
    """(process id, stage, record, since, seconds spent by stage) of every process."""
    found = []
    try:
      for name in sorted(os.listdir(self._folder), key=int):
        with open(os.path.join(self._folder, name), "rb") as f:
          data = f.read()
        if len(data) == _FORMAT.size:
          stage, index, since, *spent = _FORMAT.unpack(data)
          found.append((int(name), stage, index, since, spent))
    except FileNotFoundError:  # cleared away with what else is old in /tmp: no reason to end a run
      pass
    return found

  def shares(self):
    """{stage: share of the working time so far} over all processes; {} before any has worked."""
    spent = [sum(times) for times in zip(*(p[4] for p in self.read()), strict=True)][1:]
    return {s: t / sum(spent) for s, t in zip(STAGES[1:], spent, strict=True)} if any(spent) else {}

  def close(self):
    """Removes the files."""
    shutil.rmtree(self._folder, ignore_errors=True)


class _NoBoard:
  def enter(self, stage, index=-1):
    pass


NO_BOARD = _NoBoard()


def is_stuck(patience=5.0):
  """Whether a closed Feed still waits for a batch, whose read Python would wait for at its end."""
  threads = [t for t in threading.enumerate() if t.name == _THREAD]
  for thread in threads:
    thread.join(patience)
  return any(thread.is_alive() for thread in threads)


class Feed:
  """Takes batches in a thread, one ahead of the loop, and hands their rows to the device there.

  put: function of a batch -> its arrays on the device. where: function of a record's number ->
  what names its file. stopping: function that says whether the loop was asked to stop.
  timeout: seconds without a batch that end the run; 0 for never.
  """

  def __init__(self, batches, put, *, board, where, stopping, timeout):
    self._batches, self._put, self._board, self._where = batches, put, board, where
    self._stopping, self._timeout = stopping, timeout
    self._ready, self._free = queue.Queue(), threading.Semaphore(1)
    self._closed = False

  def start(self, workers):
    """Begins to take batches, and ignores Ctrl-C until so many worker processes have started.

    A terminal sends Ctrl-C to every process. Workers inherit that it is ignored, so that they still
    serve the loop, which alone answers it.
    """
    begun, before = time.monotonic(), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
      threading.Thread(target=self._fill, daemon=True, name=_THREAD).start()
      while len(self._board.read()) < workers and self._ready.empty():
        if self._stopping() or time.monotonic() - begun > _START:
          break
        time.sleep(0.05)
    finally:
      signal.signal(signal.SIGINT, before)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def _fill(self):
    try:
      while not self._closed:
        batch = next(self._batches)
        self._free.acquire()  # one batch ahead on the device, no more
        self._ready.put((batch, self._put(batch)))
    except BaseException as e:  # it is the loop's to handle
      self._ready.put(e)

  def next(self):
    """(batch, what `put` made of it), or None if a stop was asked for while none came.

    Raises:
      TimeoutError: none came for `timeout` seconds; names what each process is at.
      ChildProcessError: a worker died; names what each was at. Whatever the pipeline raises.
    """
    asked, warnings = time.monotonic(), 0
    while True:
      try:
        found = self._ready.get(timeout=1.0)
        break
      except queue.Empty:
        waited = time.monotonic() - asked
      if self._stopping():
        return None
      if self._timeout and waited > self._timeout:
        raise TimeoutError(
          f"no batch for {waited:.0f} s, more than data.timeout={self._timeout:g}: {self._at()}. "
          "Look at the disk or network that holds the data; the same command goes on from the last "
          "checkpoint"
        )
      if waited > _WARN_AFTER * (warnings + 1):
        warnings += 1
        log.warning("no batch for %.0f s: %s", waited, self._at())
    if isinstance(found, BaseException):
      if self._stopping():  # whoever stopped this process stopped its workers too
        log.info("no further batch beside the stop request (%s)", found)
        return None
      if isinstance(found, RuntimeError) and "terminated unexpectedly" in str(found):  # grain's
        raise ChildProcessError(
          f"a worker process of the data pipeline died ({found.args[0].partition('.')[0]}): "
          f"{self._at()}. Exit code -9 is most often the machine's memory at its end: lower "
          "data.workers or batch_size, and the same command goes on"
        ) from found
      raise found
    self._free.release()
    return found

  def _at(self):
    now, found = time.monotonic(), []
    for process, stage, index, since, _ in self._board.read():
      what = f"{STAGES[stage]} {self._where(index)}" if stage else "waiting for its turn"
      found.append(f"process {process} has been {what} for {now - since:.0f} s")
    return "; ".join(found) or "the workers have not begun yet"

  def close(self):
    """Lets the thread end and the workers' files go."""
    self._closed = True
    self._free.release()
    self._board.close()
