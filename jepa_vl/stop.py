"""SIGTERM and Ctrl-C: what is asked of a run that is to end."""

import os
import signal
import sys
import threading

PREEMPTED = 75  # exit code: saved, start me again


class Stopped(BaseException):
  """Asked to end where nothing can be saved that is not: to be started again.

  No Exception, as KeyboardInterrupt is none: raised in whatever runs when the signal comes, it must
  not pass for a damaged checkpoint or record there.
  """


class StopSignal:
  """Turns SIGTERM and the first Ctrl-C into a request; a second Ctrl-C interrupts at once.

  With `at_once`, SIGTERM raises Stopped, and Ctrl-C is left alone.
  """

  def __init__(self, at_once=False):
    self.requested, self.name, self._before, self._at_once = False, "", {}, at_once

  def __enter__(self):
    for number in (signal.SIGTERM, *([] if self._at_once else [signal.SIGINT])):
      self._before[number] = signal.signal(number, self._request)
    self._hook, sys.unraisablehook = sys.unraisablehook, self._ignored
    return self

  def __exit__(self, *_):
    sys.unraisablehook = self._hook
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _request(self, number, _):
    if self.requested and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.requested, self.name = True, signal.Signals(number).name
    if self._at_once:
      raise Stopped(f"stopped by {self.name}; the same command goes on from the last checkpoint")

  def _ignored(self, found):
    # Raised within what cannot raise, often JAX's callback of the garbage collector: once more.
    if found.exc_type is Stopped:
      threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    else:
      self._hook(found)
