"""Memory and time of a linear probe at ImageNet's size: 1M x 768 features, 1000 classes.

python -m benchmarks.probes [--rows=1000000] [--iterations=2]

Logistic regression for a few iterations of L-BFGS, then the paper's bias-free head for a share of
an epoch, on features that are made here. Peak memory is this process's, features included.
"""

import argparse
import resource
import time

import numpy as np

from jepa_vl import sharding
from jepa_vl.evals import fit, head_probe, probes


def peak():
  """Peak resident memory of this process, GiB."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main():
  """Prints a line per probe."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--rows", type=int, default=1_000_000)
  parser.add_argument("--width", type=int, default=768)
  parser.add_argument("--classes", type=int, default=1000)
  parser.add_argument("--iterations", type=int, default=2, help="of L-BFGS; a real fit has 200")
  parser.add_argument("--steps", type=int, default=20, help="of AdamW, of 4096 rows each")
  args = parser.parse_args()
  rng = np.random.default_rng(0)
  x = rng.standard_normal((args.rows, args.width), np.float32)
  y = rng.integers(args.classes, size=args.rows)
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  print(f"features: {x.nbytes / 2**30:.2f} GiB, peak {peak():.2f} GiB", flush=True)

  start = time.perf_counter()
  probes.fit_logistic(x, y, args.classes, 1e-4, mesh, iterations=args.iterations)
  took = time.perf_counter() - start
  print(f"logistic: {args.iterations} iterations, {took:.0f} s, peak {peak():.2f} GiB", flush=True)

  few = np.arange(min(4096 * args.steps, args.rows))
  how = fit.Fit(epochs=1, batch_size=4096, lrs=(0.1,), weight_decay=0.0, seed=0)
  features = {"train": x[few], "test": x[:4096]}
  labels = {"train": y[few], "test": y[:4096]}
  start = time.perf_counter()
  head_probe.fit_head(features, labels, "linear", how, "train", "", ("test",), mesh)
  took = (time.perf_counter() - start) / (len(few) / 4096)
  print(f"AdamW: {took:.2f} s per step of 4096 rows, peak {peak():.2f} GiB")


if __name__ == "__main__":
  main()
