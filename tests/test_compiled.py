"""What is kept between steps (memory) and between runs (compiled programs)."""

import os
import subprocess
import sys

PROGRAM = """
import jax, jax.numpy as jnp
from jepa_vl import compiled
compiled.keep()
print(float(jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x).T)(jnp.ones((3, 3)))[0, 0]))
"""


def run(code, tmp_path, **env):
  names = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
  kept = {k: v for k, v in os.environ.items() if k not in names}
  env = {**kept, "XDG_CACHE_HOME": str(tmp_path), **env}
  done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done.stdout


def entries(tmp_path):
  return {p: p.read_bytes() for p in sorted(tmp_path.rglob("*-cache"))}


def test_programs_are_kept_and_damage_costs_no_more_than_time(tmp_path):
  first = run(PROGRAM, tmp_path)
  kept = entries(tmp_path)
  assert kept and all("jepa_vl/compiled" in str(p) for p in kept)
  assert run(PROGRAM, tmp_path) == first
  assert entries(tmp_path).keys() == kept.keys()  # nothing was compiled anew
  for path, content in kept.items():
    path.write_bytes(content[: len(content) // 2])
  assert run(PROGRAM, tmp_path) == first


def test_the_user_says_where_and_whether(tmp_path):
  run(PROGRAM, tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))
  assert entries(tmp_path / "mine") and not (tmp_path / "jepa_vl").exists()
  run(PROGRAM, tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")
  assert not entries(tmp_path / "jepa_vl")


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path):
  (tmp_path / "jepa_vl").write_text("a file in the way")
  assert run(PROGRAM, tmp_path)


def test_freed_memory_is_kept(tmp_path):
  """What a step frees the next one gets without the kernel's clearing it: no page faults."""
  code = """
import resource
from jepa_vl import allocator
{keep}
import numpy as np
def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  np.ones(64 << 20, np.uint8)
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
  pages = (64 << 20) // 4096
  with_it = int(run(code.format(keep="allocator.keep_freed_memory()"), tmp_path))
  without = int(run(code.format(keep=""), tmp_path))
  assert with_it < pages / 100
  assert without > with_it
