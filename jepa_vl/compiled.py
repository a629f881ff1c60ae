"""Compiled programs are kept on disk, so that the next start of a run need not compile again."""

import hashlib
import os
import platform
from pathlib import Path

import jax


def keep():
  """Turns JAX's persistent compilation cache on, in `folder()`.

  JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false leaves it off.
  An entry that is damaged or cannot be written costs a warning of JAX's, and the time to compile.
  """
  if jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", str(folder()))
  # Every program: a run has many small ones, and a CPU compiles each in a tenth of a second.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def folder():
  """One of the user's cache folder for each kind of CPU, for a CPU's programs are made for it alone
  and home folders are shared."""
  base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return Path(base).expanduser() / "jepa_vl" / "compiled" / _cpu()


def _cpu():
  about = platform.machine() + platform.processor()
  if os.path.exists("/proc/cpuinfo"):
    with open("/proc/cpuinfo") as f:
      about += "".join(sorted({x for x in f if x.startswith(("flags", "Features", "model name"))}))
  return hashlib.sha256(about.encode()).hexdigest()[:16]
