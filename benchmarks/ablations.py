"""Short runs of configs/tiny.py that each take one thing away, by config keys alone.

python -m benchmarks.ablations --out DIR [--steps 600]    prints a Markdown table
"""

import argparse
import json
import os
import subprocess
import sys

RUNS = {
  "as configured": [],
  "lambda 0 (no SIGReg)": [
    "--config.objective.lambda_img=0.0",
    "--config.objective.lambda_txt=0.0",
  ],
  "no predictors": ["--config.model.predictor_depth=0"],
  "no stop-gradient": ["--config.objective.stop_gradient=False"],
  "no stop-gradient, lambda 0": [
    "--config.objective.stop_gradient=False",
    "--config.objective.lambda_img=0.0",
    "--config.objective.lambda_txt=0.0",
  ],
}
COLUMNS = {
  "R@10 val": ("retrieval", "val", "i2t/avg/R@10"),
  "R@10 val_style": ("retrieval", "val_style", "i2t/avg/R@10"),
  "probe val_style": ("probe", "val_style", "cls/group"),
  "rank img": ("rank", "val", "img"),
  "rank txt": ("rank", "val", "txt"),
}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", required=True)
  parser.add_argument("--steps", type=int, default=600)
  args = parser.parse_args()
  table(RUNS, args.out, args.steps)


def table(runs, out, steps):
  """Trains configs/tiny.py with each of `runs`, {name: flags}, and prints a row of each."""
  print("| run | " + " | ".join(COLUMNS) + " | matched / rolled cos | said |")
  print("|---|" + "---|" * (len(COLUMNS) + 2))
  splits = "('val','val_style')"
  for number, (name, flags) in enumerate(runs.items()):
    workdir = os.path.join(out, str(number))
    command = [
      sys.executable, "-m", "jepa_vl.main", "--config=configs/tiny.py", f"--workdir={workdir}",
      f"--config.steps={steps}", "--config.eval_every=0",
      *(f"--config.evals.{e}.splits={splits}" for e in ("retrieval", "zeroshot", "probe", "rank")),
      *flags,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
      sys.exit(f"{name}: exit code {done.returncode}\n{done.stderr}")
    print(row(name, workdir, done.stderr), flush=True)


def row(name, workdir, said):
  with open(os.path.join(workdir, "results.json")) as f:
    rows = json.load(f)["rows"]
  figures = {(r["evaluation"], r["split"], r["metric"]): r["value"] for r in rows}
  with open(os.path.join(workdir, "metrics.jsonl")) as f:
    last = json.loads(f.readlines()[-1])
  cells = [f"{figures[key]:.3f}" for key in COLUMNS.values()]
  cosines = f"{last['cos/matched']:.3f} / {last['cos/rolled']:.3f}"
  warning = "collapse" if "are collapsing" in said else ""
  return f"| {name} | " + " | ".join(cells) + f" | {cosines} | {warning} |"


if __name__ == "__main__":
  main()
