"""The C library's allocator, told to keep the memory that a step on a CPU frees."""

import ctypes
import glob
import sys

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory():
  """Has glibc keep freed memory for the next time. Before JAX is imported, which starts threads.

  XLA asks for all of a step's temporaries, gigabytes, at every step. glibc would give them back to
  the kernel each time, and the kernel clears every page of them again: a quarter of the time of a
  ViT-Ti step (`python -m benchmarks.step`). The process so keeps what it once needed. Nothing is
  done on another C library, or beside a GPU or TPU, whose memory is not the C library's.
  """
  if sys.platform != "linux" or _has_accelerator():
    return
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if mallopt is None:
    return
  # No block of its own for what is large; no end given back; and one arena, since those of threads
  # have blocks of their own for what is large.
  for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1)):
    mallopt(option, value)


def _has_accelerator():
  names = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*")  # as launch/setup.sh
  return any(glob.glob(name) for name in names)
