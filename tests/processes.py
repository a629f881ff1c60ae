"""Several Python processes that form one JAX program on this machine, none left behind.

  [first, second] = run(2, "print(jax.process_index())", devices=2)
  assert first.code == 0 and "0" in first.output
"""

import contextlib
import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass
class Result:
  """How a process ended: exit code (-9: by that signal) and all that it printed."""

  code: int
  output: str


class Process:
  """One started process; what it prints goes to a file, so that it never waits for a reader."""

  def __init__(self, argv, env):
    self._file = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115, closed in end()
    # A session of its own, so that its workers can be ended with it.
    self._popen = subprocess.Popen(
      [sys.executable, *argv], cwd=ROOT, env=env, stdout=self._file, stderr=subprocess.STDOUT,
      start_new_session=True,
    )  # fmt: skip
    self.pid = self._popen.pid

  @property
  def output(self):
    """What it has printed so far."""
    return pathlib.Path(self._file.name).read_text(errors="replace")

  @property
  def code(self):
    """The exit code, None while it runs."""
    return self._popen.poll()

  def signal(self, name):
    """Sends "SIGTERM", "SIGKILL", "SIGSTOP", ... to this process alone."""
    os.kill(self.pid, signal.Signals[name])

  def wait(self, timeout):
    """Its Result; AssertionError with the output if it has not ended within `timeout` seconds."""
    try:
      return Result(self._popen.wait(timeout), self.output)
    except subprocess.TimeoutExpired:
      raise AssertionError(f"still running after {timeout} s:\n{self.output}") from None

  def wait_until(self, condition, timeout=200):
    """Returns once `condition()` holds; AssertionError if the process ends or time runs out."""
    deadline = time.monotonic() + timeout
    while not condition():
      assert self.code is None and time.monotonic() < deadline, self.output
      time.sleep(0.02)

  def end(self):
    """Kills it and all that it started."""
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self.pid, signal.SIGKILL)
    self._popen.wait()
    self._file.close()


@contextlib.contextmanager
def start(n, program, *, devices=1, env=None):
  """`n` processes with `devices` CPU devices each -> list of Process; all are killed at the end.

  `program` is Python text, run where `jax` is imported and, for more than one process,
  `jax.distributed` initialised; or a list of arguments for Python, such as
  ["-m", "jepa_vl.main", ...], to which --coordinator, --num_processes and --process_id are added.
  """
  address = f"127.0.0.1:{free_port()}"
  environment = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
  environment |= {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(devices),
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    **(env or {}),
  }
  with contextlib.ExitStack() as stack:
    started = []
    for i in range(n):
      started.append(Process(_arguments(program, address, n, i), environment))
      stack.callback(started[-1].end)
    yield started


def run(n, program, *, devices=1, timeout=300, env=None):
  """As `start`, to the end: [Result], in the order of process ids."""
  with start(n, program, devices=devices, env=env) as started:
    deadline = time.monotonic() + timeout
    return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in started]


def free_port():
  """A port of the loopback interface that nothing listens on."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def _arguments(program, address, n, i):
  if isinstance(program, str):
    join = f"jax.distributed.initialize({address!r}, {n}, {i})\n" if n > 1 else ""
    return ["-c", f"import jax\n{join}{program}"]
  if n == 1:
    return program
  flags = [f"--coordinator={address}", f"--num_processes={n}", f"--process_id={i}"]
  return [*program, *flags]
