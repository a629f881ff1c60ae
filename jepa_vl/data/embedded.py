"""The `emoji` dataset that ships in the package: where it lies, how to read it and look at it.

Icons in three drawing styles, each with a human-written label and keywords. `emoji_build.py` made
the files. `python -m jepa_vl.data.embedded --split C --out C.png` draws a contact sheet.
"""

import argparse
import json
from pathlib import Path

import msgpack

from jepa_vl.data import transforms

DIRECTORY = Path(__file__).resolve().parent / "emoji"

# split -> what it holds
SPLITS = {
  "train": "two drawing styles, the training families",
  "val": "seen styles, unseen families; for choosing hyper-parameters",
  "val_style": "unseen style, the families of val; for choosing hyper-parameters",
  "A": "unseen style, seen concepts",
  "B": "seen styles, unseen families",
  "C": "unseen style, unseen families",
}


def split_path(split: str) -> str:
  """Path of a split's ArrayRecord file; raises ValueError for a split that does not exist."""
  if split not in SPLITS:
    raise ValueError(f"Unknown emoji split {split!r}; known splits are {', '.join(SPLITS)}.")
  return str(DIRECTORY / f"{split}.array_record")


def info() -> dict:
  """Parsed `dataset.json`: group and subgroup names, and counts and checksum of every split."""
  return json.loads((DIRECTORY / "dataset.json").read_text(encoding="utf-8"))


def read_records(split: str) -> list[dict]:
  """All records of a split, unpacked, in file order."""
  from array_record.python.array_record_data_source import ArrayRecordDataSource

  with ArrayRecordDataSource([split_path(split)]) as source:
    return [msgpack.unpackb(source[i]) for i in range(len(source))]


def contact_sheet(split: str, path: str, columns: int = 16, limit: int = 128) -> None:
  """Writes a PNG of a split's images, evenly sampled up to `limit`, each above its caption."""
  if columns < 1 or limit < 1:
    raise ValueError(f"A contact sheet needs at least 1 column and 1 image: {columns}, {limit}.")
  import textwrap

  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  records = read_records(split)
  if len(records) > limit:
    records = [records[i * len(records) // limit] for i in range(limit)]
  rows = -(-len(records) // columns)
  figure = Figure(figsize=(1.0 * columns, 1.35 * rows), dpi=100)
  FigureCanvasAgg(figure)
  axes = figure.subplots(rows, columns, squeeze=False).flat
  for axis in axes:
    axis.axis("off")
  for axis, record in zip(figure.axes, records, strict=False):
    axis.imshow(transforms.decode(record["image"]))
    caption = "\n".join(textwrap.wrap(record["caption"], 16)[:3])
    # Dollar signs would start mathematical notation.
    axis.set_title(caption, y=-0.03, pad=0, va="top", fontsize=6, parse_math=False)
  figure.subplots_adjust(0.005, 0.35 / (1.35 * rows), 0.995, 1, wspace=0.1, hspace=0.5)
  figure.savefig(path)


def main(argv: list[str] | None = None) -> None:
  """Command line: draws a split's images with their captions."""
  parser = argparse.ArgumentParser(prog="python -m jepa_vl.data.embedded", description=__doc__)
  parser.add_argument("--split", required=True, choices=list(SPLITS))
  parser.add_argument("--out", required=True, help="PNG file to write")
  parser.add_argument("--columns", type=int, default=16)
  parser.add_argument("--limit", type=int, default=128, help="most images to draw")
  arguments = parser.parse_args(argv)
  contact_sheet(arguments.split, arguments.out, arguments.columns, arguments.limit)


if __name__ == "__main__":
  main()
