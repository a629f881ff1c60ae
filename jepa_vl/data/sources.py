"""Indexable sources of image-caption records.

A record is a dict with `image` (encoded bytes), `caption` (str) and, where a data set has them,
`tags` (list of str) and labels for evaluation.
"""

from jepa_vl.data import common, embedded
from jepa_vl.data.array_record import ArrayRecord
from jepa_vl.data.parquet import Parquet
from jepa_vl.data.tables import Folder, Table
from jepa_vl.data.transforms import DamagedRecord
from jepa_vl.data.webdataset import WebDataset

__all__ = ["SOURCES", "ArrayRecord", "DamagedRecord", "from_config", "keys_of", "open_source"]

# name: function (path, split, keys) -> source
SOURCES = {
  "emoji": lambda path, split, keys: ArrayRecord(embedded.split_path(split)),
  "array_record": lambda path, split, keys: ArrayRecord(path),
  "webdataset": lambda path, split, keys: WebDataset(path, keys),
  "parquet": lambda path, split, keys: Parquet(path, keys),
  "table": lambda path, split, keys: Table(path, keys),
  "folder": lambda path, split, keys: Folder(path, keys),
}

# What a `path` of each looks like, for the message about an empty one.
_EXAMPLES = {
  "array_record": "/data/pairs/train-*.array_record",
  "webdataset": "/data/pairs/{00000..00099}.tar",
  "parquet": "/data/pairs/train-*.parquet",
  "table": "/data/pairs/train.tsv",
  "folder": "/data/pairs",
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
  """The training source of the config's `data` sub-tree."""
  return open_source(cfg.source, cfg.path, cfg.split, keys_of(cfg))
