"""LeVLJEPA, LeVLJEPA+, CLIP and SigLIP on the shapes set: equal steps, several seeds, with floors.

python -m benchmarks.shapes --out DIR [--steps 500] [--seeds 0 1 2] [--train-only]

Prints a Markdown table; DIR/PRESET-seedN are the runs' working folders, so what was interrupted
goes on. Everything but the objective is equal (configs/presets.py); LeVLJEPA+ also sees six views
of each image. Each is read by its own reading: `avg` where there are predictions, else `embed`.
"""

import argparse

from benchmarks import objectives

FIGURES = {
  **{f"segmentation {s} miou": "raw_pixels" for s in ("iid", "pairs")},
  **{f"depth {s} rmse": "raw_pixels" for s in ("iid", "pairs")},
  **{
    f"compositional {s} {kind}/READING/accuracy": "bag_of_words"
    for s in ("iid", "pairs", "relations")
    for kind in ("colour", "relation")
  },
  **{f"retrieval {s} i2t/READING/R@10": "random" for s in ("iid", "pairs", "counts", "relations")},
  **{f"zeroshot_{label} {s} READING/top1": "majority" for label in ("shape", "colour")
     for s in ("iid", "pairs")},
  **{f"probe_{label} {s} cls/{label}": "raw_pixels" for label in ("shape", "colour", "count")
     for s in ("iid", "pairs")},
}  # fmt: skip


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  objectives.add_arguments(parser, steps=500)
  objectives.compare(parser.parse_args(), "configs/tiny_shapes.py", FIGURES)


if __name__ == "__main__":
  main()
