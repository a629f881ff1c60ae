"""Indexable sources of image-caption records.

A record is a dict with `image` (encoded bytes), `caption` (str) and, where a data set has them,
`tags` (list of str) and labels for evaluation.
"""

import functools
import glob
import hashlib
import os

import msgpack

from jepa_vl.data import embedded
from jepa_vl.data.transforms import DamagedRecord


class ArrayRecord:
  """Records of one or several ArrayRecord files, in the files' order.

  Raises:
    FileNotFoundError: nothing matches the pattern.
    ValueError: a file is empty or truncated, named.
  """

  def __init__(self, pattern):
    self.paths = sorted(glob.glob(pattern))
    if not self.paths:
      raise FileNotFoundError(
        f"path {pattern!r} matches no file; expected one or more ArrayRecord files, for example "
        "--config.data.path='/data/pairs/train-*.array_record'"
      )
    self._reader = _open(self.paths)

  def __len__(self):
    return len(self._reader)

  def __getitem__(self, index):
    """The record at `index`. Raises DamagedRecord."""
    try:
      record = msgpack.unpackb(self._reader[index])
    except Exception as e:  # the reader and msgpack each have a family of their own
      raise DamagedRecord(f"record {index}: cannot be read ({type(e).__name__}: {e})") from e
    if not isinstance(record, dict) or not {"image", "caption"} <= set(record):
      raise DamagedRecord(f"record {index}: no msgpack dict with 'image' and 'caption'")
    tags = record.get("tags") or []
    if not isinstance(tags, list) or any(type(t) is not str for t in [record["caption"], *tags]):
      raise DamagedRecord(f"record {index}: 'caption' must be a string, 'tags' a list of strings")
    return record

  @functools.cached_property
  def identity(self):
    """Changes with the files' names and sizes, the number of records and a sample of them."""
    parts = [f"{os.path.basename(p)}:{os.path.getsize(p)}" for p in self.paths]
    n = len(self)
    for index in sorted({i * (n - 1) // 7 for i in range(8)}):  # sizes are of whole 64 KiB blocks
      try:
        parts.append(repr(self[index]))
      except DamagedRecord as e:
        parts.append(str(e))
    return f"{n} records, {hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


def _open(paths):
  from array_record.python import array_record_data_source  # late: workers import this module

  open_ = array_record_data_source.ArrayRecordDataSource
  try:
    reader = open_(paths)
    if len(reader):
      return reader
  except Exception:  # which file it was is only found by opening them one by one
    pass
  for path in paths:
    try:
      if not os.path.getsize(path):
        raise ValueError("it is empty")
      if not len(open_([path])):
        raise ValueError("it holds no record")
    except Exception as e:
      reason = str(e).partition("\n")[0]
      raise ValueError(
        f"{path} is not a whole ArrayRecord file ({reason}); it may have been cut "
        "short in copying: copy or prepare it again, or leave it out of data.path"
      ) from e
  return open_(paths)


def _emoji(path, split):
  return ArrayRecord(embedded.split_path(split))


def _array_record(path, split):
  if not path:
    raise ValueError(
      "data.path is empty, and data.source='array_record' needs one. Give the pattern of your "
      "training records, --config.data.path='/data/pairs/train-*.array_record', and a tokenizer, "
      "--config.text.tokenizer=captions.model (README, 'Your own data', shows how to make both); "
      "or try the program on the embedded dataset: --config=configs/tiny.py"
    )
  return ArrayRecord(os.path.expanduser(path).replace("{split}", split))


# name: function (path, split) -> source
SOURCES = {"emoji": _emoji, "array_record": _array_record}


def open_source(name, path, split):
  """The source `name` of SOURCES.

  `split` picks one of an embedded source's; in a `path` it takes the place of "{split}".

  Raises:
    ValueError: unknown name, or a path that is needed and empty.
  """
  if name not in SOURCES:
    raise ValueError(f"data.source must be one of {', '.join(SOURCES)}, got {name!r}")
  return SOURCES[name](path, split)
