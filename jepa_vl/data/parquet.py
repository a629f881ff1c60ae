"""Parquet files with the image's bytes, Hugging Face's {bytes, path}, or its path, in a column.

A record costs reading its row group, unless that was among the last 256 MB read: small row groups
(100 rows, as Hugging Face writes them) keep random access affordable.
"""

import concurrent.futures
import functools
import importlib.util
import json
import logging
import os

import numpy as np

from jepa_vl.data import common
from jepa_vl.data.transforms import DamagedRecord

log = logging.getLogger(__name__)

_CACHE_BYTES = 256 << 20  # of row groups, in each process that reads
_LARGE_GROUP = 64 << 20  # bytes of a row group from which on reading is said to be slow
_OPEN_FILES = 64
_IMAGES = common.IMAGE_NAMES + common.PATH_NAMES


class Parquet:
  """The rows of one or several Parquet files, in the files' order; gs:// and s3:// by fsspec.

  Raises:
    FileNotFoundError: nothing matches the pattern.
    ValueError: a file is no whole Parquet file or lacks a column that the first one has.
  """

  def __init__(self, pattern, keys):
    self.paths = common.find(pattern, what="Parquet files", suffix=".parquet", remote=True)
    self._root = keys.image_root
    if not importlib.util.find_spec("pyarrow"):
      raise ValueError("data.source='parquet' needs pyarrow: pip install pyarrow")
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
      footers = list(pool.map(_footer, self.paths))
    self._schemas(footers, keys)
    groups = [f.row_group(g) for f in footers for g in range(f.num_row_groups)]
    counts = [f.num_row_groups for f in footers]
    self._file_of = np.repeat(np.arange(len(footers)), counts)
    self._first_group = np.cumsum([0, *counts])
    self._ends = np.cumsum([g.num_rows for g in groups])
    self._file_ends = np.cumsum([f.num_rows for f in footers])
    self._stamps = [_stamp(f) for f in footers]
    if not len(self):
      raise ValueError(f"the {len(self.paths)} files of {pattern!r} hold no row")
    size = sum(_size(g, self._columns) for g in groups) / len(groups)
    self._keep = int(_CACHE_BYTES // max(size, 1)) + 1
    if size > _LARGE_GROUP and len(groups) > self._keep:
      log.warning(
        "%s: each record costs reading a row group of %.0f MB; write the files with smaller ones "
        "(row_group_size=100), or use tars or ArrayRecord", pattern, size / 1e6,
      )  # fmt: skip
    self._forget()

  def _schemas(self, footers, keys):
    # The columns to read: those of the first file, which all files must have.
    schema = footers[0].schema.to_arrow_schema()
    try:
      self._image = common.pick("image", schema.names, keys.image_key, _IMAGES)
      names = common.CAPTION_NAMES
      self._caption = common.pick("caption", schema.names, keys.caption_key, names)
    except DamagedRecord as e:
      raise ValueError(f"{self.paths[0]}: {e}") from e
    others = [f.name for f in schema if f.name in ("tags", "concept") or str(f.type)[:3] == "int"]
    self._columns = list(dict.fromkeys([self._image, self._caption, *others]))
    self._classes = _class_names(schema.metadata, self._caption)
    for path, footer in zip(self.paths, footers, strict=True):
      lacking = set(self._columns) - set(footer.schema.to_arrow_schema().names)
      if lacking:
        raise ValueError(f"{path} has no column {sorted(lacking)}, but {self.paths[0]} has")

  def _forget(self):
    self._file = functools.lru_cache(_OPEN_FILES)(self._open_file)
    self._group = functools.lru_cache(self._keep)(self._read_group)

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if k not in ("_file", "_group")}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._forget()

  def __len__(self):
    return int(self._file_ends[-1])

  def __getitem__(self, index):
    """The record at `index`. Raises DamagedRecord."""
    number = int(np.searchsorted(self._ends, index, side="right"))
    path = self.paths[self._file_of[number]]
    table = self._group(number)
    i = index - (int(self._ends[number]) - table.num_rows)
    try:
      row = {name: table.column(name)[i].as_py() for name in self._columns}
      folder = self._root or os.path.dirname(path)
      image = common.image_bytes(row.pop(self._image), folder)
      if self._classes:
        caption = common.class_name(self._classes, row[self._caption])
        return common.make_record(image, caption, row)
      return common.make_record(image, row.pop(self._caption), row)
    except DamagedRecord as e:
      raise e.at(f"{path}, row group {number}, row {i}") from e
    except (ValueError, LookupError, TypeError) as e:
      message = f"{path}, row group {number}, row {i}: {e}"
      raise DamagedRecord(message, "malformed") from e

  def where(self, index):
    """The file of the record at `index`."""
    number = int(np.searchsorted(self._file_ends, index, side="right"))
    return f"{self.paths[number]}, record {index}"

  def _open_file(self, number):
    file = _open(self.paths[number])
    if _stamp(file.metadata) != self._stamps[number]:
      raise OSError("it has changed since the run began")
    return file

  def _read_group(self, number):
    file = int(self._file_of[number])
    try:
      opened = self._file(file)
    except (OSError, ValueError) as e:
      message = f"{self.paths[file]} cannot be read any more ({e})"
      raise DamagedRecord(message, "unreadable", int(self._file_ends[file])) from e
    g = number - int(self._first_group[file])
    try:
      return opened.read_row_group(g, columns=self._columns, use_threads=False)
    except (OSError, ValueError) as e:  # pyarrow's own are of these
      message = f"{self.paths[file]}: its row group {g} cannot be read ({e})"
      raise DamagedRecord(message, "unreadable", int(self._ends[number])) from e

  @functools.cached_property
  def identity(self):
    """Changes with the files' names, footers, the number of rows and a sample of them."""
    names = map(os.path.basename, self.paths)
    return common.identity(self, map("{}:{}".format, names, self._stamps))


def _open(path):
  import pyarrow.parquet as pq  # late: it is large, and only needed here

  if "://" in path:
    files, path = common.filesystem(path)
    return pq.ParquetFile(files.open(path), pre_buffer=True)
  return pq.ParquetFile(path)


def _footer(path):
  try:
    with _open(path) as file:
      footer = file.metadata
    rows = [footer.row_group(g).num_rows for g in range(footer.num_row_groups)]
    if min(rows, default=0) < 0 or sum(rows) != footer.num_rows:
      raise ValueError(f"its footer speaks of {footer.num_rows} rows and of {sum(rows)}")
    return footer
  except OSError as e:
    raise OSError(f"{path} cannot be opened ({e})") from e
  except ValueError as e:
    raise ValueError(
      f"{path} is not a whole Parquet file ({e}); it may have been cut short in copying: copy it "
      "again, or leave it out of data.path"
    ) from e


def _stamp(footer):
  return [footer.num_rows, footer.num_row_groups, footer.serialized_size]


def _size(group, columns):
  parts = (group.column(i) for i in range(group.num_columns))
  return sum(p.total_uncompressed_size for p in parts if p.path_in_schema.split(".")[0] in columns)


def _class_names(metadata, column):
  # Hugging Face keeps the names of a ClassLabel column in the schema.
  try:
    features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    return features[column]["names"]
  except (KeyError, TypeError, ValueError):
    return None
