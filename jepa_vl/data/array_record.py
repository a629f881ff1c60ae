"""ArrayRecord files of msgpack dicts."""

import functools
import os

import msgpack

from jepa_vl.data import common
from jepa_vl.data.transforms import DamagedRecord


class ArrayRecord:
  """Records of one or several ArrayRecord files, in the files' order.

  Raises:
    FileNotFoundError: nothing matches the pattern.
    ValueError: a file is empty or truncated, named.
  """

  def __init__(self, pattern):
    self._pattern = pattern
    self.paths = common.find(pattern, what="ArrayRecord files", suffix=".array_record")
    self._reader = _open(self.paths)

  def __len__(self):
    return len(self._reader)

  def __getitem__(self, index):
    """The record at `index`. Raises DamagedRecord."""
    try:
      return _record(self._reader, index)
    except DamagedRecord as e:
      raise e.at(f"record {index}") from e

  def where(self, index):
    """What names the record at `index`."""
    return f"record {index} of {self._pattern}"

  @functools.cached_property
  def identity(self):
    """Changes with the files' names and sizes, the number of records and a sample of them."""
    # The sizes are of whole 64 KiB blocks: the sample matters.
    parts = [f"{os.path.basename(p)}:{os.path.getsize(p)}" for p in self.paths]
    return common.identity(self, parts)


def _record(reader, index):
  try:
    data = reader[index]
  except Exception as e:  # the reader has a family of its own
    raise DamagedRecord(f"cannot be read ({type(e).__name__}: {e})", "unreadable") from e
  if not data:  # what the reader gives, without an error, of a file that was cut while it is open
    raise DamagedRecord("has no bytes; its file may have been cut short", "unreadable")
  try:
    record = msgpack.unpackb(data)
  except Exception as e:  # and so has msgpack
    raise DamagedRecord(f"no msgpack ({type(e).__name__}: {e})", "malformed") from e
  if not isinstance(record, dict) or not {"image", "caption"} <= set(record):
    raise DamagedRecord("no msgpack dict with 'image' and 'caption'", "malformed")
  tags = record.get("tags") or []
  if not isinstance(tags, list) or any(type(t) is not str for t in tags):
    raise DamagedRecord("'tags' must be a list of strings", "malformed")
  common.check_caption(record["caption"])
  return record


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
