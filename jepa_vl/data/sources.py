"""Indexable sources of image-caption records.

A record is a dict with `image` (encoded bytes), `caption` (str) and, where a data set has them,
`tags` (list of str), `captions` (all of one image, list of str), labels for evaluation and maps
(`segmentation`, `depth`: PNG bytes, see maps.py) or a question with its answers (question_sets.py).
Of a source for evaluations alone `caption` may be missing.
"""

import numpy as np

from jepa_vl.data import common, dense_sets, embedded, question_sets
from jepa_vl.data.array_record import ArrayRecord
from jepa_vl.data.class_folder import ClassFolder
from jepa_vl.data.coco_captions import CocoCaptions
from jepa_vl.data.parquet import Parquet
from jepa_vl.data.prepared import open_hugging_face, open_tfds
from jepa_vl.data.shapes import Shapes
from jepa_vl.data.shapes_questions import ShapesQuestions
from jepa_vl.data.tables import Folder, Table
from jepa_vl.data.transforms import DamagedRecord
from jepa_vl.data.webdataset import WebDataset

__all__ = ["SOURCES", "ArrayRecord", "DamagedRecord", "Mixture", "from_config", "open_source"]

# name: function (path, split, keys) -> source
SOURCES = {
  "emoji": lambda path, split, keys: ArrayRecord(embedded.split_path(split)),
  "shapes": lambda path, split, keys: Shapes(path, split),
  "shapes_questions": lambda path, split, keys: ShapesQuestions(path, split),
  "array_record": lambda path, split, keys: ArrayRecord(path),
  "webdataset": lambda path, split, keys: WebDataset(path, keys),
  "parquet": lambda path, split, keys: Parquet(path, keys),
  "table": lambda path, split, keys: Table(path, keys),
  "folder": lambda path, split, keys: Folder(path, keys),
  "tfds": open_tfds,
  "hugging_face": open_hugging_face,
  "class_folder": lambda path, split, keys: ClassFolder(path),
  "coco_captions": CocoCaptions,
  "segmentation_folder": dense_sets.segmentation_folder,
  "depth_folder": dense_sets.depth_folder,
  "ade20k": dense_sets.ade20k,
  "coco_stuff": dense_sets.coco_stuff,
  "voc": dense_sets.voc,
  "nyuv2": dense_sets.NYUv2,
  "gqa": question_sets.gqa,
  "vqav2": question_sets.vqav2,
  "pope": question_sets.pope,
}

# What a `path` looks like, of each that needs one.
EXAMPLES = {
  "array_record": "/data/pairs/train-*.array_record",
  "webdataset": "/data/pairs/{00000..00099}.tar",
  "parquet": "/data/pairs/train-*.parquet",
  "table": "/data/pairs/train.tsv",
  "folder": "/data/pairs",
  "tfds": "name:1.0.0",
  "hugging_face": "/data/saved_to_disk",
  "class_folder": "/data/imagenet/{split}",
  "coco_captions": "/data/coco/dataset_coco.json",
  "segmentation_folder": "/data/streets",
  "depth_folder": "/data/rooms",
  "ade20k": "/data/ADEChallengeData2016",
  "coco_stuff": "/data/coco_stuff",
  "voc": "/data/VOCdevkit/VOC2012",
  "nyuv2": "/data/nyuv2",
  "gqa": "/data/gqa",
  "vqav2": "/data/vqav2",
  "pope": "/data/pope",
}


def open_source(name, path, split, keys=common.USUAL):
  """The source `name` of SOURCES.

  `split` picks one of an embedded source's; in a `path` it takes the place of "{split}".

  Raises:
    ValueError: unknown name, a path that is needed and empty, or data without a readable record.
  """
  if name not in SOURCES:
    raise ValueError(f"data.source must be one of {', '.join(SOURCES)}, got {name!r}")
  if name in EXAMPLES and not path:
    raise ValueError(
      f"data.path is empty, and data.source={name!r} needs one. Give the pattern of your "
      f"training records, --config.data.path='{EXAMPLES[name]}', and a tokenizer, "
      "--config.text.tokenizer=configs/captions.model (README, 'Your own data', shows how to make "
      "both); or try the program on the embedded dataset: --config=configs/tiny.py"
    )
  source = SOURCES[name](path.replace("{split}", split), split, keys)
  try:
    common.probe(source)
  except ValueError as e:
    raise ValueError(f"data.source={name!r}, path {path!r}: {e}") from e
  return source


def keys_of(cfg):
  """How the config's `data` sub-tree wants records to be read."""
  return common.Keys(cfg.image_key, cfg.caption_key, cfg.image_root, cfg.index_dir)


def from_config(cfg):
  """The training source of the config's `data` sub-tree: its `source`, or the several of `mix`."""
  if not cfg.mix:
    return _with_captions(cfg, cfg.source, cfg.path)
  if cfg.path:
    raise ValueError("data.mix and data.path are both given; the mix names its own paths")
  for part in cfg.mix:
    if len(part) != 3 or not isinstance(part[2], (int, float)) or not 0 < part[2] < np.inf:
      raise ValueError(
        "data.mix must be a tuple of (source, path, weight) with weights above 0, for example "
        f"(('webdataset', '/a/*.tar', 0.7), ('parquet', '/b', 0.3)); got {part!r}"
      )
  opened = [_with_captions(cfg, name, path) for name, path, _ in cfg.mix]
  return Mixture(opened, [float(weight) for _, _, weight in cfg.mix])


def _with_captions(cfg, name, path):
  source = open_source(name, path, cfg.split, keys_of(cfg))
  if "caption" not in common.probe(source):
    raise ValueError(
      f"data.source={name!r} has no captions: it is for evaluations, and training needs pairs of "
      "image and caption"
    )
  return source


class Mixture:
  """Several sources end to end, and how often each is drawn.

  parts: (number of records, weight) of each, from which the pipeline makes the order: every source
  has its own epochs, and of any stretch of the stream each fills its share.
  """

  def __init__(self, sources, weights):
    self._sources = sources
    self._ends = np.cumsum([len(s) for s in sources])
    self.parts = tuple(zip(map(len, sources), weights, strict=True))

  def __len__(self):
    return int(self._ends[-1])

  def __getitem__(self, index):
    """The record at `index`. Raises DamagedRecord."""
    number = int(np.searchsorted(self._ends, index, side="right"))
    source = self._sources[number]
    start = int(self._ends[number]) - len(source)
    try:
      return source[index - start]
    except DamagedRecord as e:
      message, resume = f"data.mix[{number}]: {e}", e.resume and start + e.resume
      raise DamagedRecord(message, e.reason, resume) from e

  def where(self, index):
    """What names the record at `index`."""
    number = int(np.searchsorted(self._ends, index, side="right"))
    source = self._sources[number]
    return f"data.mix[{number}]: {source.where(index - int(self._ends[number]) + len(source))}"

  @property
  def identity(self):
    """Changes with the sources' and with the weights: they decide what comes at which step."""
    parts = zip(self.parts, self._sources, strict=True)
    return "; ".join(f"{weight:g} of {source.identity}" for (_, weight), source in parts)
