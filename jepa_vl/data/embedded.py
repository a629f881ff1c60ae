"""The `emoji` dataset that ships in the package: where it lies, how to read it and look at it.

Icons in three drawing styles, each with a human-written label and keywords. `emoji_build.py` made
the files. `python -m jepa_vl.data.embedded --split C --out C.png` draws a contact sheet,
`--split train --tars FOLDER` writes a WebDataset to try the program's commands for tars on.
"""

import argparse
import io
import json
from pathlib import Path

import msgpack
import PIL.Image

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
  records = read_records(split)
  if len(records) > limit:
    records = [records[i * len(records) // limit] for i in range(limit)]
  draw(records, path, columns)


def draw(records: list[dict], path: str, columns: int = 16) -> None:
  """Writes a PNG of the records' images, each above its caption."""
  import textwrap
  import warnings

  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

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
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Glyph .* missing")  # the font's; a box is drawn
    figure.savefig(path, format="png")


# In turn, for a reader to meet all three.
_FORMATS = (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"))


def write_tars(split: str, folder: str, samples: int = 500) -> list[str]:
  """Writes a split as a WebDataset, emoji-SPLIT-00000.tar and so on -> their paths.

  A sample is its image (`000123.jpg`, `.png` or `.webp`), the caption (`000123.txt`) and all else
  (`000123.json`).
  """
  import tarfile

  records = read_records(split)
  Path(folder).mkdir(parents=True, exist_ok=True)
  paths = []
  for start in range(0, len(records), samples):
    paths.append(str(Path(folder, f"emoji-{split}-{start // samples:05d}.tar")))
    with tarfile.open(paths[-1], "w") as tar:
      for i, record in enumerate(records[start : start + samples], start):
        for kind, data in _members(record, *_FORMATS[i % len(_FORMATS)]):
          member = tarfile.TarInfo(f"{i:06d}.{kind}")
          member.size = len(data)
          tar.addfile(member, io.BytesIO(data))
  return paths


def _members(record, suffix, kind):
  image = io.BytesIO()
  PIL.Image.fromarray(transforms.decode(record["image"])).save(image, kind, quality=92)
  others = {k: v for k, v in record.items() if k not in ("image", "caption")}
  return [
    (suffix, image.getvalue()),
    ("txt", record["caption"].encode()),
    ("json", json.dumps(others).encode()),
  ]


def main(argv: list[str] | None = None) -> None:
  """Command line: draws a split's images with their captions, or writes them as a WebDataset."""
  parser = argparse.ArgumentParser(prog="python -m jepa_vl.data.embedded", description=__doc__)
  parser.add_argument("--split", required=True, choices=list(SPLITS))
  what = parser.add_mutually_exclusive_group(required=True)
  what.add_argument("--out", help="PNG file to write")
  what.add_argument("--tars", metavar="FOLDER", help="folder to write the split to, as tars")
  parser.add_argument("--columns", type=int, default=16)
  parser.add_argument("--limit", type=int, default=128, help="most images to draw")
  arguments = parser.parse_args(argv)
  if arguments.tars:
    paths = write_tars(arguments.split, arguments.tars)
    print(f"{len(paths)} tars in {arguments.tars}, the last {Path(paths[-1]).name}")
  else:
    contact_sheet(arguments.split, arguments.out, arguments.columns, arguments.limit)


if __name__ == "__main__":
  main()
