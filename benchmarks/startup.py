"""Seconds from the command to the end of the first training step, compiling and not.

python -m benchmarks.startup [--config configs/tiny.py] [--rounds 3] [--config.KEY=VALUE ...]

`cold`: no compiled program is kept yet; `warm`: those of the cold start are. Every start is a
process of its own in an empty working folder; a round is one cold and one warm start.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time


def first_step(config, keys, cache):
  """Seconds until the program, with compiled programs kept in `cache`, has said its first step."""
  with tempfile.TemporaryDirectory() as folder:
    command = [
      sys.executable, "-m", "jepa_vl.main", f"--config={config}", f"--workdir={folder}/run",
      "--config.steps=1", "--config.log_every=1", "--config.evals={}", *keys,
    ]  # fmt: skip
    begun = time.perf_counter()
    process = subprocess.Popen(
      command, stdout=subprocess.PIPE, text=True, env={**os.environ, "XDG_CACHE_HOME": cache}
    )
    seconds = None
    for line in process.stdout:
      if seconds is None and line.startswith("step 1/"):
        seconds = time.perf_counter() - begun
    if process.wait() or seconds is None:
      raise SystemExit(f"{' '.join(command)} failed")
  return seconds


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", default="configs/tiny.py")
  parser.add_argument("--rounds", type=int, default=3)
  args, keys = parser.parse_known_args()
  found = {"cold": [], "warm": []}
  for _ in range(args.rounds):
    with tempfile.TemporaryDirectory() as cache:
      for name in found:
        found[name].append(first_step(args.config, keys, cache))
  print("| start | seconds to the end of the first step |\n|---|---|")
  for name, seconds in found.items():
    median = statistics.median(seconds)
    print(f"| {name} | {median:.1f} ({min(seconds):.1f} - {max(seconds):.1f}) |")


if __name__ == "__main__":
  main()
