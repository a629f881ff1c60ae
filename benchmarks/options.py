"""Options that change the training and save: what a step takes, and what the figures say of it.

python -m benchmarks.options [--size tiny --side 224 --batch 16]     prints a Markdown table
python -m benchmarks.options --train DIR [--steps 600]    trains configs/tiny.py with each
"""

import argparse
import statistics
import time

import jax
import numpy as np

from benchmarks import ablations
from configs import base
from jepa_vl import memory, optim, sharding
from jepa_vl import state as state_lib
from jepa_vl.build import build


def options(side, steps):
  """{name: config keys}; the small images have half of the side, in so many first steps."""
  return {
    "as configured": {},
    "patch_dropout 0.5": {"model.patch_dropout": 0.5},
    f"low_res {side // 2}": {"data.low_res": (side // 2, steps)},
    "muon": {"optim.name": "muon"},
    "mu_dtype bfloat16": {"optim.mu_dtype": "bfloat16"},
  }


def configured(args, changes):
  c = base.get_config()
  c.model.size, c.model.image_size, c.batch_size = args.size, args.side, args.batch
  c.objective.group_size, c.log_every, c.model.remat = 0, 10**6, "none"
  c.mesh.data, c.data.source, c.text.tokenizer = 1, "emoji", "emoji"
  c.update_from_flattened_dict(changes)
  return c


def program(args, changes):
  """A Run of the option, and its compiled first step with the state and batch that it takes."""
  run = build(configured(args, changes))
  side = run.config.data.low_res[0] if run.config.data.low_res else args.side
  rng, L = np.random.default_rng(0), run.model.text_length
  batch = {
    "image": rng.integers(0, 256, (args.batch, side, side, 3), dtype=np.uint8),
    "text": rng.integers(0, run.model.vocab_size, (args.batch, L)).astype(np.int32),
    "mask": np.ones((args.batch, L), bool),
  }
  state = state_lib.init_state(run.model, run.tx, run.mesh, 0)
  batch = sharding.put_batch(batch, run.mesh)
  with jax.set_mesh(run.mesh):
    return run, [run.train_step.lower(state, batch).compile(), state, batch]


def step_table(args):
  programs = {name: program(args, keys) for name, keys in options(args.side, 1).items()}
  seconds = {name: [] for name in programs}
  for repeat in range(args.repeats + 1):  # in turn, so that all meet the same machine
    for name, (_, parts) in programs.items():
      step, state, batch = parts
      begun = time.perf_counter()
      parts[1], _ = jax.block_until_ready(step(state, batch))
      if repeat:
        seconds[name].append(time.perf_counter() - begun)
  print(f"{args.size}, {args.side} px, {args.batch} pairs, {jax.devices()[0].device_kind}\n")
  print("| option | ms a step | of the first | GFLOP per pair | optimizer's GFLOP a step | state |")
  print("|---|---|---|---|---|---|")
  first = statistics.median(next(iter(seconds.values())))
  for name, (run, _) in programs.items():
    params, ms = run.abstract_state.params, 1e3 * statistics.median(seconds[name])
    own = optim.muon_flops(params) / 1e9 if run.config.optim.name == "muon" else 0
    state = sum(memory.state_bytes(run.abstract_state).values()) / 2**20
    print(
      f"| {name} | {ms:.0f} | {ms / (1e3 * first):.2f} | {run.flops_at(0) / 1e9:.2f} | {own:.1f} | "
      f"{state:.0f} MiB |"
    )


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--size", default="tiny")
  parser.add_argument("--side", type=int, default=224)
  parser.add_argument("--batch", type=int, default=16)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--train", default="", help="folder of the runs")
  parser.add_argument("--steps", type=int, default=600, help="of each run")
  args = parser.parse_args()
  if not args.train:
    return step_table(args)
  runs = options(32, args.steps // 2)  # configs/tiny.py has images of 32 pixels
  flags = {name: [f"--config.{k}={v}" for k, v in keys.items()] for name, keys in runs.items()}
  ablations.table(flags, args.train, args.steps)


if __name__ == "__main__":
  main()
