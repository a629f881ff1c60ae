"""What evaluating many images costs: host memory at its highest, seconds by evaluation.

python -m benchmarks.evaluation [--images 50000] [--side 224] [--size nano] [--evals retrieval,rank]

Made images (noise around a colour, encoded as JPEG) with made captions go through the whole path:
read, decoded, encoded, scored. Every image is its own.
"""

import argparse
import resource
import time

import cv2
import jax
import numpy as np
from ml_collections import ConfigDict

from configs import base
from jepa_vl import build as build_lib
from jepa_vl import evals
from jepa_vl import state as state_lib
from jepa_vl.data import sources

CLASSES = 100
WHERE = {"source": "made", "path": "", "splits": ("test",)}
LABEL = {**WHERE, "label": "class"}
EVALS = {
  "retrieval": {**WHERE, "ranks": (1, 5, 10), "folds": 0},
  "rank": WHERE,
}


class Made:
  """`count` records, each a function of its index."""

  def __init__(self, split, count, side):
    self._count, self._side = count, side
    self.identity = f"made {split} {count} {side}"
    self._texture = np.random.default_rng(0).normal(0, 12, (side, side, 3))

  def __len__(self):
    return self._count

  def __getitem__(self, index):
    colour = np.random.default_rng(index).uniform(40, 215, 3)
    image = np.clip(np.roll(self._texture, index, axis=1) + colour, 0, 255).astype(np.uint8)
    data = cv2.imencode(".jpg", image)[1].tobytes()
    red, green, blue = colour.astype(int)
    caption = f"{index}: red {red} green {green} blue {blue}"
    return {"image": data, "caption": caption, "class": index % CLASSES}

  def where(self, index):
    """What names the record."""
    return f"made record {index}"


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--images", type=int, default=50_000)
  parser.add_argument("--side", type=int, default=224)
  parser.add_argument("--size", default="nano", help="of the model")
  parser.add_argument("--evals", default=",".join(EVALS))
  args = parser.parse_args()
  sources.SOURCES["made"] = lambda path, split, keys: Made(split, args.images, args.side)
  c = base.get_config()
  c.model.size, c.model.image_size = args.size, args.side
  c.text.tokenizer, c.text.length = "emoji", 24
  c.evals = ConfigDict({name: EVALS[name] for name in args.evals.split(",")})
  run = build_lib.build(c, training=False)
  variables = state_lib.init_variables(run.model, run.mesh, 0)
  encode = build_lib.make_encode(run)
  peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  print(f"{args.images} images of {args.side} px, {args.size}, {jax.default_backend()}\n")
  print("| | seconds | GiB of the process at most |\n|---|---|---|", flush=True)
  print(f"| start | - | {peak():.2f} |")
  steps = {"features": lambda: encode.features(variables, "made", "", "test")}
  for name in c.evals:
    cfg = ConfigDict({name: c.evals[name]})
    steps[name] = lambda cfg=cfg: evals.run_all(encode, variables, run.mesh, cfg)
  for name, step in steps.items():
    start = time.perf_counter()
    step()
    print(f"| {name} | {time.perf_counter() - start:.0f} | {peak():.2f} |", flush=True)


if __name__ == "__main__":
  main()
