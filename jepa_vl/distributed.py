"""Several processes as one run: their start, that they agree, and that none is waited for in vain.

JAX's distributed service joins the processes and holds a small key-value store, which is all that
is used here. A process that fails, dies or hangs would leave the others in a collective for ever;
each therefore writes a sign of life to the store and watches those of the others.
"""

import ctypes
import glob
import hashlib
import importlib.util
import json
import os
import pickle
import signal
import socket
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.distributed import global_state  # the store's client, which jax gives in no other way
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

_BEAT = 2.0  # seconds between signs of life
_START = 300  # seconds in which all processes must have come
_PREFIX = "jepa_vl/"

# Variables that say how many processes a launcher has started.
_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def start(coordinator=None, num_processes=None, process_id=None, timeout=60.0):
  """Joins the processes of the run: those of the arguments, else those that the environment names.

  timeout: seconds without a sign of life from another process that end this one.

  Returns:
    the Watch, or None for a process alone.

  Raises:
    ValueError: some of the three are given and others are not, or they contradict each other.
  """
  given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
  missing = [f"--{k}" for k, v in given.items() if v is None]
  if missing and len(missing) < 3:
    raise ValueError(
      f"--coordinator, --num_processes and --process_id go together; {', '.join(missing)} not given"
    )
  if not missing:
    if not 0 <= process_id < num_processes:
      raise ValueError(
        f"--process_id={process_id} must be from 0 to --num_processes - 1 = {num_processes - 1}"
      )
    if ":" not in coordinator:
      raise ValueError(f"--coordinator={coordinator} must be HOST:PORT, a free port of process 0")
  elif not _launched_with_others():
    return None
  _LAST_WORDS.listen(coordinator or "process 0's host")
  # On a CPU, computations in flight together would mix up their collectives.
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  # Its handler would swallow SIGTERM: a stop is agreed by Consensus, for Ctrl-C as well.
  if "jax_enable_preemption_service" in jax.config.values:
    jax.config.update("jax_enable_preemption_service", False)
  jax.distributed.initialize(
    coordinator, num_processes, process_id, initialization_timeout=_START,
    # Ours comes first and names the host; this one is for a process whose Python stands still.
    heartbeat_timeout_seconds=round(timeout) + 40,
  )  # fmt: skip
  _LAST_WORDS.text = "ended from below, for the reason above"
  return Watch(timeout) if jax.process_count() > 1 else None


def _launched_with_others():
  if any(int(os.environ.get(name, 1)) > 1 for name in _COUNTS):
    return True
  installed = importlib.util.find_spec
  if "JOB_COMPLETION_INDEX" in os.environ and installed("kubernetes"):  # which jax asks there
    return True
  # A TPU host's metadata tells; a slice of one host is found to be alone.
  chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
  return bool(chips and installed("libtpu"))


class _LastWords:
  """Says in words why the distributed service ends the process.

  It does so by abort(), from a thread of its own, which Python's signal handlers never see.
  """

  def listen(self, coordinator):
    """From here on; the text is that of the first connection."""
    self.text = (
      f"the processes did not all find each other within {_START} s: start every one, with a "
      f"--process_id of its own and the same --num_processes and --coordinator ({coordinator}), "
      "which every host must reach"
    )
    self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._say)
    ctypes.CDLL(None).signal(signal.SIGABRT, self._handler)

  def _say(self, _):
    os.write(2, f"error: {self.text}\n".encode())
    os._exit(1)


_LAST_WORDS = _LastWords()  # must outlive every thread


class Watch:
  """This process's sign of life, and an eye on the others'.

  `fail` tells them that this one ends. Where one has failed, died or stopped, every other process
  says which, and on what host, and ends with exit code 1.
  """

  def __init__(self, timeout):
    self._client, self._timeout = global_state.client, timeout
    self.process = jax.process_index()
    self._count = jax.process_count()
    self._set("host", socket.gethostname())
    hosts = self._gather("host", "has not come")
    self._names = [f"process {p} on {host}" for p, host in enumerate(hosts)]
    _LAST_WORDS.text = (
      "ended from below, for the reason above; if that is the distributed service, "
      f"{self._names[0]}, which coordinates the run, has died or lost its network. The same "
      "command goes on from the last checkpoint"
    )
    self._ended = threading.Event()
    self._round = time.monotonic()  # when the store last answered
    for work in (self._beat, self._check):
      threading.Thread(target=work, daemon=True).start()

  def _set(self, what, value):
    self._client.key_value_set(f"{_PREFIX}{what}/{self.process}", value, allow_overwrite=True)

  def _read(self, what):
    """{process: value} of those that have set it."""
    found = self._client.key_value_dir_get(f"{_PREFIX}{what}/")
    return {int(key.rpartition("/")[2]): value for key, value in found}

  def _gather(self, what, otherwise):
    """Every process's value, in order; waits for all of them."""
    deadline = time.monotonic() + _START
    values = {}
    while len(values) < self._count:
      if time.monotonic() > deadline:
        missing = [str(p) for p in range(self._count) if p not in values]
        raise ValueError(f"process {', '.join(missing)} {otherwise} within {_START} s")
      time.sleep(0.1)
      values = self._read(what)
    return [values[p] for p in range(self._count)]

  def _beat(self):
    count, seen = 0, dict.fromkeys(range(self._count), ("", time.monotonic()))
    while not self._ended.is_set():
      count += 1
      self._set("alive", str(count))
      for value in self._read("failed").values():
        self._end(*json.loads(value))
      now = time.monotonic()
      for process, value in self._read("alive").items():
        if seen[process][0] != value:
          seen[process] = value, now
      silent = min(seen, key=lambda process: seen[process][1])
      if now - seen[silent][1] > self._timeout:
        self._end(self._silent(silent))
      self._round = now
      self._ended.wait(_BEAT)

  def _check(self):
    # The store is process 0's: if that one stands still, so does `_beat`.
    while not self._ended.wait(_BEAT):
      if time.monotonic() - self._round > self._timeout + 2 * _BEAT:
        self._end(self._silent(0))

  def _silent(self, process):
    return (
      f"{self._names[process]} has given no sign of life for {self._timeout:.0f} s "
      "(peer_timeout): it has died, stands still or lost its network. The same command goes on "
      "from the last checkpoint"
    )

  def _end(self, why, code=1):
    if self._ended.is_set():
      return
    print(f"error: {why}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if self.process == 0:  # the store goes with it: what is known now must reach the others first
      self._set("failed", json.dumps([why, code]))
      time.sleep(3 * _BEAT)
    os._exit(code)

  def check_same(self, name, what):
    """Raises ValueError with the differences if the processes were not started alike.

    name: of this comparison; what: {name: value}, JSON-like.
    """
    self._set(name, json.dumps(what))
    every = [json.loads(v) for v in self._gather(name, f"has not told its {name}")]
    for process, theirs in enumerate(every):
      different = [k for k in theirs | every[0] if theirs.get(k) != every[0].get(k)]
      if different:
        lines = [f"  {k}: {every[0].get(k)} there, {theirs.get(k)} here" for k in different[:10]]
        raise ValueError(
          f"{self._names[process]} was not started as {self._names[0]}:\n" + "\n".join(lines)
          + "\nGive every process the same command, code and data"
        )  # fmt: skip

  def fail(self, why, code=1):
    """Ends this process with the exit code, and tells the others why, which end with it too."""
    self._ended.set()
    sys.stdout.flush()
    try:
      self._set("failed", json.dumps([f"{self._names[self.process]} has failed: {why}", code]))
      if self.process == 0:
        time.sleep(3 * _BEAT)
    finally:  # process 0 may be gone, and the store with it
      os._exit(code)

  def explain(self):
    """Waits for the reason of a failed collective: most often another's end, which ends us too."""
    time.sleep(self._timeout + 4 * _BEAT)

  def finish(self):
    """Leaves when all others do too. A process alone would be missed."""
    self._client.wait_at_barrier(f"{_PREFIX}finish", 24 * 3600 * 1000)
    self._ended.set()
    jax.distributed.shutdown()


class Consensus:
  """Whether any process wants something: one answer for all at the same step.

  A bit beside each step, combined by the devices; what is wanted at one call is answered at the
  next, when it is known for long, so that nothing waits. A process alone is answered at once.
  """

  def __init__(self, mesh):
    self._alone, self._asked = jax.process_count() == 1, None
    self._each = NamedSharding(mesh, P(mesh.axis_names))
    self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))
    self._size = mesh.size

  def __call__(self, wanted):
    if self._alone:
      return wanted
    answer = self._asked is not None and bool(self._asked)
    bits = jax.make_array_from_callback(
      (self._size,), self._each, lambda index: np.full(self._size, wanted)[index]
    )
    self._asked = self._any(bits)
    return answer


def exchange(value):
  """Every process's `value` (what pickles), in the order of processes. All have to call it."""
  if jax.process_count() == 1:
    return [value]
  data = np.frombuffer(pickle.dumps(value), np.uint8)
  sizes = multihost_utils.process_allgather(np.array(len(data)))
  padded = np.pad(data, (0, int(sizes.max()) - len(data)))
  every = multihost_utils.process_allgather(padded)
  return [pickle.loads(row[:size].tobytes()) for row, size in zip(every, sizes, strict=True)]


def versions():
  """What must be the same in every process beside config and data: this code, and JAX."""
  root = os.path.dirname(os.path.abspath(__file__))
  digest = hashlib.sha256()
  for path in sorted(glob.glob(os.path.join(root, "**", "*.py"), recursive=True)):
    with open(path, "rb") as f:
      digest.update(f.read())
  return {"code of jepa_vl": digest.hexdigest()[:12], "jax": jax.__version__}
