"""What a save costs the loop: times of the steps around an asynchronous and a blocking one.

python -m benchmarks.save [--config configs/vit_s.py] [--out DIR] [--steps 4]

The model of a config on the embedded dataset's images at 96 px, 8 to a batch; DIR, a temporary
folder if not given, is the disk that is measured.
"""

import argparse
import importlib.util
import os
import shutil
import statistics
import tempfile
import time

import jax

from jepa_vl import checkpoint
from jepa_vl import state as state_lib
from jepa_vl.build import build
from jepa_vl.data import pipeline
from jepa_vl.train import put_rows


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", default="configs/vit_s.py")
  parser.add_argument("--out")
  parser.add_argument("--steps", type=int, default=4, help="before the save and after it")
  args = parser.parse_args()
  run = build(settings(args.config))
  rows = first_batch(run)
  state = state_lib.init_state(run.model, run.tx, run.mesh, 0)
  size = sum(x.nbytes for x in jax.tree.leaves(state)) / 2**20
  print(f"{args.config}: {size:.0f} MiB of state, {jax.default_backend()}\n")
  print("| save | step s before | held s | step s while it writes | saved after s | step s after |")
  print("|---|---|---|---|---|---|")
  folder = tempfile.mkdtemp(dir=args.out)
  try:
    checkpoints = checkpoint.Checkpoints(folder, keep=1)
    step = take_steps(run, state, rows, 2)[0]  # compiled
    for number, kind in enumerate(("first", "asynchronous", "blocking")):
      step = trace(run, step, rows, checkpoints, args.steps, number, kind)
    checkpoints.close()
  finally:
    shutil.rmtree(folder)


def settings(path):
  """The config, small enough in data for a machine without accelerators."""
  spec = importlib.util.spec_from_file_location("config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  c = module.get_config()
  c.batch_size, c.objective.group_size, c.model.image_size = 8, 0, 96
  c.data.source, c.data.path, c.text.tokenizer = "emoji", "", "emoji"
  return c


def first_batch(run):
  batches = pipeline.batches(
    run.source, run.tokenizer, run.data_config, batch_size=run.config.batch_size, seed=0,
    start_step=0, process=0, processes=1,
  )  # fmt: skip
  return put_rows(next(iter(batches)), run.mesh)


def take_steps(run, state, rows, count):
  """(state, seconds of each step)."""
  times = []
  for _ in range(count):
    start = time.perf_counter()
    with jax.set_mesh(run.mesh):
      state, values = run.train_step(state, rows)
    jax.block_until_ready(values["loss"])
    times.append(time.perf_counter() - start)
  return state, times


def trace(run, state, rows, checkpoints, steps, number, kind):
  """Steps, a save, steps until it is on disk, steps; prints one row of the table."""
  state, before = take_steps(run, state, rows, steps)
  jax.block_until_ready(state)
  start = time.perf_counter()
  checkpoints.save(number, state, {})
  if kind == "blocking":
    checkpoints.wait()
  held = time.perf_counter() - start
  during = []
  while not os.path.exists(checkpoints.path(number)):
    state, (seconds,) = take_steps(run, state, rows, 1)
    during.append(seconds)
  saved = time.perf_counter() - start
  checkpoints.wait()
  state, after = take_steps(run, state, rows, steps)
  listed = lambda times: " ".join(f"{t:.2f}" for t in times) or "-"
  print(
    f"| {kind} | {statistics.median(before):.2f} ({listed(before)}) | {held:.2f} | "
    f"{listed(during)} | {saved:.2f} | {statistics.median(after):.2f} ({listed(after)}) |",
    flush=True,
  )
  return state


if __name__ == "__main__":
  main()
