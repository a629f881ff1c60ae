"""Work that may be killed at any moment: for `prepare`.

A file gets its name once it is whole and on the disk, so what a kill or a full disk leaves behind
is never taken for data; a process that dies is noticed.
"""

import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
import signal
import socket
from concurrent.futures.process import BrokenProcessPool

import tqdm
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from jepa_vl.data import common


class Stopped(Exception):
  """The work is to be given up, since it has failed or been interrupted elsewhere."""


def write_records(path, records, work):
  """Writes records (bytes) as an ArrayRecord file. Raises OSError in words."""
  with common.whole(path, work) as temporary:
    with _as_os_error():
      writer = ArrayRecordWriter(temporary, "group_size:1")
    count = 0
    for data in records:
      writer.write(data)
      if not writer.ok():  # close() says why
        break
      count += 1
    with _as_os_error():
      writer.close()
    with contextlib.closing(open_records(temporary)) as reader:
      # Its index comes last, and a file without one reads as a file of no records.
      if reader.num_records() != count:
        raise OSError(f"{reader.num_records()} records can be read back of {count}")


@contextlib.contextmanager
def _as_os_error():
  try:
    yield
  except RuntimeError as e:  # "write() failed: No space left on device; writing ...; at byte ..."
    raise OSError(str(e).partition(";")[0].rpartition("failed: ")[2]) from e


def open_records(path):
  """Random access to an ArrayRecord file: num_records(), read([i, j, ...]), close()."""
  return ArrayRecordReader(path, "readahead_buffer_size:0")


def remove_left_over(work):
  """Removes what processes of this machine that are no more were writing -> the files' names."""
  names = []
  here = "." + socket.gethostname()
  for entry in os.scandir(work):
    if not entry.name.endswith(common.TEMPORARY):
      continue
    name, _, process = entry.name.removesuffix(common.TEMPORARY).rpartition(".")
    if name.endswith(here) and not _is_running(int(process)):
      os.remove(entry.path)
      names.append(name.removesuffix(here))
  return sorted(names)


def _is_running(process):
  try:
    os.kill(process, 0)
  except ProcessLookupError:
    return False
  except PermissionError:  # it is another user's
    pass
  return True


def run(maker, numbers, processes, records, verb, work):
  """maker.make(number) for all numbers, with a progress bar.

  Raises ChildProcessError if a process died, and whatever make() raises.
  """
  if not numbers:
    return
  with tqdm.tqdm(total=records, desc=verb, unit=" records", smoothing=0.1, delay=1) as bar:
    if processes == 1:
      for number in numbers:
        bar.update(maker.make(number, lambda: False))
      return
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold
    stop = context.Event()
    with concurrent.futures.ProcessPoolExecutor(
      min(processes, len(numbers)), context, _start_worker, (maker, stop)
    ) as pool:
      try:
        futures = [pool.submit(_make, number) for number in numbers]
        for future in concurrent.futures.as_completed(futures):
          bar.update(future.result())
      except BrokenProcessPool as e:
        pool.shutdown()  # the others have been ended; before this they may seem to be running
        raise _died(remove_left_over(work)) from e
      except BaseException:
        stop.set()
        pool.shutdown(cancel_futures=True)
        raise


def _died(files):
  return ChildProcessError(
    f"a worker process died while {', '.join(files) or 'nothing'} was being written: it was "
    "killed, most likely for want of memory (then give fewer --processes), or crashed in a "
    "library. What is whole is kept, and the same command goes on from there"
  )


_worker = None  # in a worker process: make(number), of the maker that it was started with


def _start_worker(maker, stop):
  global _worker
  _worker = functools.partial(maker.make, stopped=stop.is_set)
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
  common.end_with_parent()
  # Decoders remark on every odd image there. What has to be known is raised, and goes to a file.
  os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _make(number):
  return _worker(number)
