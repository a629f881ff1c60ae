"""The `shapes` set: scenes drawn on demand, of which everything is known.

One to five objects (shapes_scene.py) before a wall, with captions, hard negatives and questions
(shapes_text.py), the class of every pixel and its depth. Record i of a split is a function of
(VERSION, seed, split, i). `python -m jepa_vl.data.shapes --split=train --out=sheet.png` draws a
contact sheet.
"""

import argparse
import math
from pathlib import Path

import cv2
import numpy as np

from jepa_vl.data import shapes_scene, shapes_text
from jepa_vl.data.shapes_scene import COLOURS, SPLITS

VERSION = 1  # goes up when the same options give another record
TOKENIZER = Path(__file__).with_name("shapes_tokenizer.model")

_FINE = 3  # samples along each side of a pixel; its class and depth are those of the middle one
_SEEN = 0.6  # share of every object that must be seen
_PNG = [cv2.IMWRITE_PNG_COMPRESSION, 1]
_TEXTURED = 8  # added to an object's number where its texture is dark
_DARK = 0.5  # what the texture does to the colour


class Shapes:
  """`size` records of a split; options as "side=64,size=20000,seed=0", in any order, or "".

  side: pixels; size: records (train: 100000, others: 1000); seed: of all splits together;
  objects: how many in each scene, 0 (the default): as the split has them.

  A record is `image` (PNG), `caption` and the five `captions` that it is one of, `negatives`
  {"colour": [...], "relation": [...]}, `segmentation` (PNG, 0 background, else 1 + the place in
  SHAPES), `depth` (PNG, uint16, mm), `questions` (as they fall; balanced ones are in
  shapes_questions.py), and as labels `shape` and `colour` (places in
  SHAPES and COLOURS) of the nearest object and `count`.

  Raises:
    ValueError: an unknown split or option, or a number that cannot be.
  """

  def __init__(self, options, split):
    if split not in SPLITS:
      raise ValueError(f"unknown split {split!r} of the shapes set; known: {', '.join(SPLITS)}")
    usual = {"side": 64, "size": 100_000 if split == "train" else 1000, "seed": 0, "objects": 0}
    given = _parse(options, usual)
    self.side, self._size, self.seed, objects = (usual | given).values()
    self.split, self._counts = split, shapes_scene.counts(split)
    if objects and objects not in self._counts:
      known = " or ".join(map(str, self._counts))
      raise ValueError(f"objects={objects}: scenes of the split {split!r} have {known}")
    self._counts = (objects,) if objects else self._counts
    if not 16 <= self.side <= 1024 or self._size < 1:
      raise ValueError(f"side={self.side} must be 16 to 1024 and size={self._size} at least 1")

  def __len__(self):
    return self._size

  def __getitem__(self, index):
    """The record at `index`."""
    scene, samples, owner, rng = self._draw(index)
    captions = shapes_text.captions(scene)
    number = int(rng.integers(len(captions)))
    nearest = scene.objects[0]
    return {
      "image": picture(rng, scene, samples),
      "caption": captions[number],
      "captions": captions,
      "negatives": shapes_text.negatives(scene, number),
      "segmentation": _png(_of_each(scene, 0, lambda o: o.shape + 1, np.uint8)[owner]),
      "depth": _png(_of_each(scene, shapes_scene.WALL, lambda o: o.depth, np.uint16)[owner]),
      "questions": shapes_text.questions(rng, scene, self.split),
      "shape": nearest.shape,
      "colour": nearest.colour,
      "count": len(scene.objects),
    }

  def scene(self, index):
    """The Scene of the record at `index`."""
    return self._draw(index)[0]

  def _draw(self, index):
    """The scene, its samples (see `_samples`), those of the pixels' middles without texture, and
    the generator for all else of the record."""
    index = range(self._size)[index]
    rng = np.random.default_rng((VERSION, self.seed, list(SPLITS).index(self.split), index))
    # Once drawn it stays: scenes of many objects fit less often, and would be rare otherwise.
    count = self._counts[rng.integers(len(self._counts))]
    return *seen(lambda: shapes_scene.propose(rng, self.split, count), self.side), rng

  def where(self, index):
    """What names the record at `index`."""
    return f"{self.split} record {index} of the shapes set"

  @property
  def identity(self):
    """Changes with all that decides what the records are."""
    return (
      f"shapes version {VERSION}, {self.split}, {self._size} records of side {self.side}, seed "
      f"{self.seed}, {' '.join(map(str, self._counts))} objects"
    )


def _parse(options, known):
  found = {}
  for option in filter(None, options.split(",")):
    name, _, value = (part.strip() for part in option.partition("="))
    if name not in known or not value.isdecimal():
      raise ValueError(
        f"option {option!r} of the shapes set; expected {', '.join(known)} with a whole number, "
        "as in side=64,size=20000,seed=0"
      )
    found[name] = int(value)
  return found


# --- pixels


def seen(propose, side):
  """The first scene of propose() of which every object is seen, its samples (see `_samples`), and
  those of the pixels' middles without texture."""
  while True:
    scene = propose()
    if scene:
      samples = _samples(scene.objects, side * _FINE)
      owner = samples[_FINE // 2 :: _FINE, _FINE // 2 :: _FINE] % _TEXTURED
      if _all_seen(scene.objects, owner):
        return scene, samples, owner


def picture(rng, scene, samples):
  """The scene before a background, as lit: PNG."""
  return _png(_light(rng, _paint(rng, scene, samples)))


def _samples(objects, side):
  """Whose each sample is: (side, side) uint8, 0 the background, else 1 + the object's place, and
  _TEXTURED more where its texture is dark."""
  found = np.zeros((side, side), np.uint8)
  for k in range(len(objects), 0, -1):  # the farthest first
    o = objects[k - 1]
    # Sample i is at (i + 1/2) / side; fillPoly takes 1/16 of a sample.
    points = [np.rint((c * side - 0.5) * 16).astype(np.int32) for c in shapes_scene.contours(o)]
    cv2.fillPoly(found, points, k, shift=4)
    tile = _TILES[o.texture]
    if tile is not None:
      top, left = (max(math.floor((v - o.radius) * side), 0) for v in (o.y, o.x))
      width = math.ceil(2 * o.radius * side) + 1
      part = found[top : top + width, left : left + width]
      dark = cv2.resize(tile, (width, width), interpolation=cv2.INTER_NEAREST)
      dark = dark[: part.shape[0], : part.shape[1]]
      part += dark * (part == k)
  return found


def _tiles():
  """By texture: what is added to the samples of the square around an object."""
  y, x = (np.mgrid[:128, :128] + 0.5) / 64 - 1
  period = 0.62
  stripes = ((0.8 * x + 0.6 * y) / period) % 1 < 0.45
  dots = np.hypot(*(v / period % 1 - 0.5 for v in (x, y))) < 0.33
  return None, *((_TEXTURED * pattern).astype(np.uint8) for pattern in (stripes, dots))


_TILES = _tiles()


def _all_seen(objects, owner):
  side = len(owner)
  seen = np.bincount(owner.ravel(), minlength=len(objects) + 1)[1:]
  return all(
    n >= _SEEN * shapes_scene.AREAS[o.shape] * (o.radius * side) ** 2
    for n, o in zip(seen.tolist(), objects, strict=True)
  )


def _of_each(scene, background, value, kind):
  return np.array([background, *(value(o) for o in scene.objects)], kind)


def _paint(rng, scene, samples):
  """The objects before a background: (S, S, 3) float32 RGB, antialiased."""
  table = np.zeros((256, 1, 3), np.uint8)
  for k, o in enumerate(scene.objects, 1):
    table[k] = colour = np.array(tuple(COLOURS.values())[o.colour])
    table[k + _TEXTURED] = np.rint(_DARK * colour)
  side = len(samples) // _FINE
  shrink = lambda x: cv2.resize(x, (side, side), interpolation=cv2.INTER_AREA)
  objects = shrink(cv2.applyColorMap(samples, table)).astype(np.float32)
  free = shrink((samples == 0).astype(np.float32))[..., None]
  return objects + free * _background(rng, side)


def _background(rng, side):
  """Plain, a gradient or soft noise, pale or dim in any hue: (S, S, 3) float32."""
  hue, saturation, value = rng.random(2), rng.uniform(0.05, 0.3, 2), rng.uniform(0.15, 0.95)
  near = np.clip(value + rng.uniform(-0.2, 0.2), 0.1, 1)
  ends = np.stack([hue * 360, saturation, (value, near)], 1).astype(np.float32)
  ends = cv2.cvtColor(ends[None], cv2.COLOR_HSV2RGB)[0] * 255  # (2, 3)
  kind = rng.integers(3)
  if kind == 0:
    return ends[0]
  if kind == 1:
    share = _ramp(side, rng.uniform(0, 2 * math.pi)) / 2 + 0.5
  else:
    grid = rng.random((int(rng.integers(3, 13)),) * 2, np.float32)
    share = cv2.resize(grid, (side, side), interpolation=cv2.INTER_LINEAR)
  return ends[0] + share[..., None] * (ends[1] - ends[0])


def _ramp(side, angle):
  """(S, S) float32 that goes from -1 to 1 along `angle`."""
  line = (np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1
  ramp = math.cos(angle) * line + math.sin(angle) * line[:, None]
  return ramp / np.float32(abs(math.cos(angle)) + abs(math.sin(angle)))


def _light(rng, image):
  """As lit: (S, S, 3) float32 -> uint8. One gain for all pixels, and one side brighter."""
  gain, slope = rng.uniform(0.7, 1.1), rng.uniform(0, 0.2)
  light = gain * (1 + slope * _ramp(len(image), rng.uniform(0, 2 * math.pi)))
  return np.clip(np.rint(image * light[..., None].astype(np.float32)), 0, 255).astype(np.uint8)


def _png(array):
  if array.ndim == 3:
    array = array[..., ::-1]  # OpenCV's order
  return cv2.imencode(".png", array, _PNG)[1].tobytes()


# --- command line


def train_tokenizer(path):
  """Writes TOKENIZER: SentencePiece's BPE in which every word of the set is one piece."""
  import sentencepiece

  with open(path, "wb") as file:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(shapes_text.vocabulary()), model_writer=file, model_type="bpe",
      vocab_size=2000, hard_vocab_limit=False, byte_fallback=True, character_coverage=1.0,
      normalization_rule_name="identity", unk_id=0, eos_id=1, bos_id=-1, pad_id=-1,
      eos_piece="<|endoftext|>", num_threads=1, minloglevel=1,
    )  # fmt: skip


def contact_sheet(source, path, *, columns=4, limit=24):
  """Writes a PNG of the first records: image, classes, depth and caption."""
  import textwrap

  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  count = min(limit, len(source))
  rows = -(-count // columns)
  figure = Figure(figsize=(3.9 * columns, 1.75 * rows), dpi=100)
  FigureCanvasAgg(figure)
  axes = figure.subplots(rows, 3 * columns, squeeze=False)
  for axis in axes.flat:
    axis.axis("off")
  for i in range(count):
    record = source[i]
    row = axes[i // columns, 3 * (i % columns) :]
    read = lambda name, r=record: cv2.imdecode(np.frombuffer(r[name], np.uint8), -1)
    row[0].imshow(read("image")[..., ::-1])
    row[1].imshow(read("segmentation"), cmap="Accent_r", vmin=0, vmax=7, interpolation="nearest")
    row[2].imshow(read("depth"), cmap="magma_r", vmin=shapes_scene.NEAREST, vmax=5000)
    caption = "\n".join(textwrap.wrap(record["caption"], 58)[:3])
    row[0].text(0, 1.03, caption, va="bottom", fontsize=8, transform=row[0].transAxes)
  figure.subplots_adjust(0.005, 0, 0.995, 1 - 0.4 / (1.75 * rows), wspace=0.04, hspace=0.42)
  figure.savefig(path, format="png")


def main(argv=None):
  """Command line: draws a contact sheet, or makes the tokenizer anew."""
  parser = argparse.ArgumentParser(prog="python -m jepa_vl.data.shapes", description=__doc__)
  parser.add_argument("--split", choices=list(SPLITS), default="train")
  parser.add_argument("--path", default="", help="options, as data.path: side=64,seed=0,objects=1")
  what = parser.add_mutually_exclusive_group(required=True)
  what.add_argument("--out", help="PNG file to write")
  what.add_argument("--tokenizer", metavar="FILE", help="file to write the tokenizer to")
  parser.add_argument("--columns", type=int, default=4)
  parser.add_argument("--limit", type=int, default=24, help="most records to draw")
  arguments = parser.parse_args(argv)
  if arguments.tokenizer:
    train_tokenizer(arguments.tokenizer)
    return
  if arguments.columns < 1 or arguments.limit < 1:
    parser.error("--columns and --limit must be at least 1")
  source = Shapes(arguments.path, arguments.split)
  contact_sheet(source, arguments.out, columns=arguments.columns, limit=arguments.limit)


if __name__ == "__main__":
  main()
