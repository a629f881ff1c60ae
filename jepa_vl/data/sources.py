"""Indexable sources of image-caption records.

A record is a dict with `image` (encoded bytes), `caption` (str) and, where a data set has them,
`tags` (list of str) and labels for evaluation.
"""

import numpy as np

from jepa_vl.data import common, embedded
from jepa_vl.data.array_record import ArrayRecord
from jepa_vl.data.parquet import Parquet
from jepa_vl.data.prepared import open_hugging_face, open_tfds
from jepa_vl.data.tables import Folder, Table
from jepa_vl.data.transforms import DamagedRecord
from jepa_vl.data.webdataset import WebDataset

__all__ = ["SOURCES", "ArrayRecord", "DamagedRecord", "Mixture", "from_config", "open_source"]

# name: function (path, split, keys) -> source
SOURCES = {
  "emoji": lambda path, split, keys: ArrayRecord(embedded.split_path(split)),
  "array_record": lambda path, split, keys: ArrayRecord(path),
  "webdataset": lambda path, split, keys: WebDataset(path, keys),
  "parquet": lambda path, split, keys: Parquet(path, keys),
  "table": lambda path, split, keys: Table(path, keys),
  "folder": lambda path, split, keys: Folder(path, keys),
  "tfds": open_tfds,
  "hugging_face": open_hugging_face,
}

# What a `path` of each looks like, for the message about an empty one.
_EXAMPLES = {
  "array_record": "/data/pairs/train-*.array_record",
  "webdataset": "/data/pairs/{00000..00099}.tar",
  "parquet": "/data/pairs/train-*.parquet",
  "table": "/data/pairs/train.tsv",
  "folder": "/data/pairs",
  "tfds": "name:1.0.0",
  "hugging_face": "/data/saved_to_disk",
}


def open_source(name, path, split, keys=common.USUAL):
  """The source `name` of SOURCES.

  `split` picks one of an embedded source's; in a `path` it takes the place of "{split}".

  Raises:
    ValueError: unknown name, a path that is needed and empty, or data without a readable record.
  """
  if name not in SOURCES:
    raise ValueError(f"data.source must be one of {', '.join(SOURCES)}, got {name!r}")
  if name in _EXAMPLES and not path:
    raise ValueError(
      f"data.path is empty, and data.source={name!r} needs one. Give the pattern of your "
      f"training records, --config.data.path='{_EXAMPLES[name]}', and a tokenizer, "
      "--config.text.tokenizer=captions.model (README, 'Your own data', shows how to make both); "
      "or try the program on the embedded dataset: --config=configs/tiny.py"
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
    return open_source(cfg.source, cfg.path, cfg.split, keys_of(cfg))
  if cfg.path:
    raise ValueError("data.mix and data.path are both given; the mix names its own paths")
  for part in cfg.mix:
    if len(part) != 3 or not isinstance(part[2], (int, float)) or not 0 < part[2] < np.inf:
      raise ValueError(
        "data.mix must be a tuple of (source, path, weight) with weights above 0, for example "
        f"(('webdataset', '/a/*.tar', 0.7), ('parquet', '/b', 0.3)); got {part!r}"
      )
  opened = [open_source(name, path, cfg.split, keys_of(cfg)) for name, path, _ in cfg.mix]
  return Mixture(opened, [float(weight) for _, _, weight in cfg.mix])


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
