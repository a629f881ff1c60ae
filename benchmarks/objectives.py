"""LeVLJEPA, LeVLJEPA+, CLIP and SigLIP on the embedded dataset: equal steps, several seeds.

python -m benchmarks.objectives --out DIR [--steps 600] [--seeds 0 1 2]    prints a Markdown table;
DIR/PRESET-seedN are the runs' working folders, so what was interrupted goes on

Everything but the objective is equal (configs/presets.py); LeVLJEPA+ also sees six views of each
image. Each is read by its own reading: `avg` where there are predictions, else `embed`.
"""

import argparse
import os

import numpy as np

from benchmarks import seeds

PRESETS = {"LeVLJEPA": "", "LeVLJEPA+": "plus", "CLIP": "clip", "SigLIP": "siglip"}
FIGURES = {
  **{f"retrieval {s} {w}/READING/R@10": "random" for s in "ABC" for w in ("i2t", "t2i")},
  **{f"probe {s} {f}/group": "raw_pixels" for s in "ABC" for f in ("cls", "pooled")},
  **{f"zeroshot {s} READING/top1": "majority" for s in "ABC"},
  **{f"rank C {m}": None for m in ("img", "txt")},
}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add_arguments(parser, steps=600)
  compare(parser.parse_args(), "configs/tiny.py", FIGURES)


def add_arguments(parser, steps):
  """Adds --out, --steps, --seeds and --train-only."""
  parser.add_argument("--out", required=True)
  parser.add_argument("--steps", type=int, default=steps)
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
  parser.add_argument(
    "--train-only", action="store_true", help="leaves evaluations and the table to the next time"
  )


def compare(args, config, figures):
  """Trains what is not yet trained, evaluates all, and prints `figures`: {name: its floor}."""
  runs = {name: [] for name in PRESETS}
  for seed in args.seeds:  # all objectives of a seed before the next seed
    for name, preset in PRESETS.items():
      workdir = os.path.join(args.out, f"{preset or 'levljepa'}-seed{seed}")
      flags = [f"--config.steps={args.steps}", "--config.eval_every=0"]
      flags += ["--config.evals={}"] if args.train_only else []
      runs[name].append(seeds.results(workdir, seed, f"{config}:{preset}", flags))
  if args.train_only:
    return
  print(f"{args.steps} steps, seeds {args.seeds}; mean (lowest - highest)\n")
  print("| figure | " + " | ".join(PRESETS) + " | untrained | floor |")
  print("|---" * (len(PRESETS) + 3) + "|")
  for figure, floor in figures.items():
    rows = {name: [_row(run, figure) for run in found] for name, found in runs.items()}
    cells = [spread([row["value"] for row in found]) for found in rows.values()]
    cells.append(f"{np.mean([row['untrained'] for row in rows['LeVLJEPA']]):.3f}")
    first = rows["LeVLJEPA"][0]
    cells.append(f"{first[floor]:.3f} {floor}".replace("_", " ") if floor else "-")
    print(f"| {figure.replace('/READING', '').replace('READING/', '')} | {' | '.join(cells)} |")


def _row(run, figure):
  """The figure's row in the run's own reading: `avg` if it has one, else `embed`."""
  return run.get(figure.replace("READING", "avg")) or run[figure.replace("READING", "embed")]


def spread(values):
  """Mean and range as a cell of a table."""
  return f"{np.mean(values):.3f} ({min(values):.3f} - {max(values):.3f})"


if __name__ == "__main__":
  main()
