"""configs/tiny.py with several seeds: mean and range of the figures that the README names.

python -m benchmarks.seeds --out DIR [--seeds 0 1 2]    prints a Markdown table; DIR/seedN are
the runs' working folders, so what was interrupted goes on
"""

import argparse
import json
import os
import subprocess
import sys

import numpy as np

ROWS = {
  **{f"retrieval {s} {w}/avg/R@10": "random" for s in "ABC" for w in ("i2t", "t2i")},
  **{f"probe {s} cls/group": "raw_pixels" for s in "ABC"},
  **{f"zeroshot {s} avg/top1": "majority" for s in "ABC"},
  **{f"rank C {m}": None for m in ("img", "txt")},
}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", required=True)
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
  args = parser.parse_args()
  runs = [results(os.path.join(args.out, f"seed{seed}"), seed) for seed in args.seeds]
  print(f"seeds {args.seeds}\n\n| figure | mean | lowest - highest | untrained | floor |")
  print("|---|---|---|---|---|")
  for name, floor in ROWS.items():
    rows = [run[name] for run in runs]
    values = [row["value"] for row in rows]
    untrained = np.mean([row["untrained"] for row in rows])
    print(
      f"| {name} | {np.mean(values):.3f} | {min(values):.3f} - {max(values):.3f} | {untrained:.3f} "
      f"| {f'{rows[0][floor]:.3f} {floor}'.replace('_', ' ') if floor else '-'} |"
    )


def results(workdir, seed, config="configs/tiny.py", flags=()):
  """Runs (or goes on with) one seed -> {"retrieval C i2t/avg/R@10": row of results.json}."""
  command = [sys.executable, "-m", "jepa_vl.main", f"--config={config}", f"--workdir={workdir}"]
  command += [f"--config.seed={seed}", *flags]
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    sys.exit(f"{config} seed {seed}: exit code {done.returncode}\n{done.stderr}")
  with open(os.path.join(workdir, "results.json")) as f:
    return {f"{r['evaluation']} {r['split']} {r['metric']}": r for r in json.load(f)["rows"]}


if __name__ == "__main__":
  main()
