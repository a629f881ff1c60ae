"""WebDataset tars: random access through an index of each tar, made once.

The index of x.tar is x.tar.jepa-index: a line of JSON (the tar's size and time, how many samples
and members follow, and what was amiss), then int64 (start, copy) of each sample and one more,
(name, offset, size) of each member, and the samples' keys, one a line.

`python -m jepa_vl.data.webdataset 'PATTERN' [--index-dir DIR]` makes the indexes ahead of a run.
"""

import argparse
import concurrent.futures
import functools
import hashlib
import io
import json
import logging
import multiprocessing
import os
import struct
import tarfile

import numpy as np
import tqdm

from jepa_vl.data import common
from jepa_vl.data.transforms import DamagedRecord

log = logging.getLogger(__name__)

_VERSION = 2
_OPEN_FILES = 64  # tars held open by one process
_BLOCK = 512  # bytes of a tar's header
_MAGIC, _MAGIC_AT = b"ustar", 257  # what a header contains, and where


class WebDataset:
  """The samples of one or several tars: tars by name, samples in the order of their first member.

  A sample that lacks its image or caption, or whose key the tar has seen before, is a record that
  raises DamagedRecord.

  Raises:
    FileNotFoundError: nothing matches the pattern.
    ValueError: no sample at all, or a compressed tar.
  """

  def __init__(self, pattern, keys):
    self.paths = common.find(pattern, what="WebDataset tars", suffix=".tar")
    self._keys = keys
    found = make_indexes(self.paths, keys.index_dir)
    self._indexes = [index for index, _ in found]
    self._sizes = [head["size"] for _, head in found]
    self._ends = np.cumsum([head["samples"] for _, head in found])
    if not len(self):
      raise ValueError(f"the {len(self.paths)} tars of {pattern!r} hold no sample")
    self._shard = functools.lru_cache(_OPEN_FILES)(self._open)

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if k != "_shard"}  # open files stay here

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._shard = functools.lru_cache(_OPEN_FILES)(self._open)

  def __len__(self):
    return int(self._ends[-1])

  def __getitem__(self, index):
    """The record at `index`. Raises DamagedRecord."""
    number = int(np.searchsorted(self._ends, index, side="right"))
    end = int(self._ends[number])
    try:
      shard = self._shard(number)
    except OSError as e:
      message = f"{self.paths[number]} cannot be read any more ({e.strerror or e})"
      raise DamagedRecord(message, "unreadable", end) from e
    return shard.record(shard.samples - (end - index), self._keys)

  def where(self, index):
    """The tar of the record at `index`."""
    return f"{self.paths[int(np.searchsorted(self._ends, index, side='right'))]}, record {index}"

  def _open(self, number):
    return _Shard(self.paths[number], self._indexes[number])

  @functools.cached_property
  def identity(self):
    """Changes with the tars' names and sizes, the number of samples and a part of them."""
    names = map(os.path.basename, self.paths)
    return common.identity(self, map("{}:{}".format, names, self._sizes))


class _Shard:
  """A tar and its index, both open while this object lives."""

  def __init__(self, path, index):
    self._path = path
    self._tar, self._index = io.FileIO(path), io.FileIO(index)
    head = json.loads(_header_line(self._index))
    if _stamp(os.fstat(self._tar.fileno())) != [head["size"], head["mtime_ns"]]:
      raise OSError("it has changed since it was indexed")
    self.samples, self._names = head["samples"], head["names"]
    self._samples_at = self._index.tell()
    self._members_at = self._samples_at + 16 * (head["samples"] + 1)
    self._keys_at = self._members_at + 24 * head["members"]

  def record(self, i, keys):
    """The record of sample i. Raises DamagedRecord."""
    try:
      start, copy, end, _ = struct.unpack("<4q", self._pread(self._index, 32, 16 * i))
      data = self._pread(self._index, 24 * (end - start), 24 * start, self._members_at)
      members = {self._names[n]: (size, at) for n, at, size in struct.iter_unpack("<3q", data)}
      if copy:
        message = f"the key is there {copy} times before; the first one counts"
        raise DamagedRecord(message, "duplicate_key")
      read = lambda name: self._pread(self._tar, *members[name], 0)
      return common.member_record(members, read, keys)
    except OSError as e:
      raise DamagedRecord(f"{self._path}, sample {self._key(i)!r}: {e}", "unreadable") from e
    except DamagedRecord as e:
      raise e.at(f"{self._path}, sample {self._key(i)!r}") from e

  def _pread(self, file, size, offset, base=None):
    data = os.pread(file.fileno(), size, offset + (self._samples_at if base is None else base))
    if len(data) != size:
      raise OSError(f"{file.name} has been cut short")
    return data

  def _key(self, i):
    self._index.seek(self._keys_at)
    return self._index.read().decode("utf-8", "replace").split("\n")[i]


def make_indexes(paths, index_dir):
  """(index file, its header) of every tar; makes those that are missing or out of date.

  One at a time for a few, in processes for many; whatever was made before an interruption stays.
  """
  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    found = list(pool.map(functools.partial(_find_index, index_dir=index_dir), paths))
  missing = [i for i, index in enumerate(found) if index is None]
  processes = min(common.cores(), len(missing) // 8)
  make = functools.partial(build_index, index_dir=index_dir)
  todo = [paths[i] for i in missing]
  bar = functools.partial(tqdm.tqdm, total=len(todo), desc="indexing tars", unit="tar", delay=1)
  if processes > 1:
    spawn = multiprocessing.get_context("spawn")  # a fork would copy JAX's threads half
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=spawn) as pool:
      made = list(bar(pool.map(make, todo)))
  else:
    made = [make(path) for path in bar(todo)]
  for i, index in zip(missing, made, strict=True):
    found[i] = index
  _warn(paths, [head for _, head in found])
  return found


def _warn(paths, heads):
  amiss = [(path, head) for path, head in zip(paths, heads, strict=True) if head["amiss"]]
  for path, head in amiss[:20]:
    log.warning("%s: %s; %d samples of it are used", path, head["amiss"], head["samples"])
  if len(amiss) > 20:
    log.warning("%d more tars are cut short, damaged or empty", len(amiss) - 20)


def _candidates(path, index_dir):
  # Where the index of a tar may be, the preferred place first.
  path = os.path.abspath(path)
  name = f"{hashlib.sha256(path.encode()).hexdigest()[:16]}-{os.path.basename(path)}"
  cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  cached = os.path.join(cache, "jepa_vl", name + common.INDEX_SUFFIX)
  if index_dir:
    return [os.path.join(os.path.expanduser(index_dir), name + common.INDEX_SUFFIX)]
  return [path + common.INDEX_SUFFIX, cached]


def _stamp(stat):
  return [stat.st_size, stat.st_mtime_ns]


def _header_line(file):
  # readline() of an unbuffered file reads byte by byte
  start = file.read(1 << 12)
  while b"\n" not in start and (more := file.read(1 << 12)):
    start += more
  line = start.partition(b"\n")[0] + b"\n"
  file.seek(len(line))
  return line


def _find_index(path, index_dir):
  stamp = _stamp(os.stat(path))
  for index in _candidates(path, index_dir):
    try:
      with open(index, "rb", buffering=0) as f:
        head = json.loads(_header_line(f))
        body = os.fstat(f.fileno()).st_size - f.tell()
      found = [head["version"], head["size"], head["mtime_ns"], head["body"]]
      if found == [_VERSION, *stamp, body]:
        return index, head
    except (OSError, ValueError, KeyError, TypeError):  # not there, or not whole
      continue
  return None


def build_index(path, index_dir):
  """Reads a tar's headers and writes its index -> (index file, its header).

  Raises:
    ValueError: a compressed tar.
    OSError: the tar cannot be read, or the index nowhere be written.
  """
  stamp = _stamp(os.stat(path))
  members, amiss = _walk(path)
  names, samples = {}, {}  # kind -> number; (key, copy) -> [(name, offset, size)]
  seen = {}
  for key, kind, offset, size in members:
    copy = seen[key, kind] = seen.get((key, kind), -1) + 1
    number = names.setdefault(kind, len(names))
    samples.setdefault((key, copy), []).append((number, offset, size))
  starts = np.cumsum([0, *map(len, samples.values())])
  table = np.stack([starts, [copy for _, copy in samples] + [0]], axis=1).astype("<i8")
  flat = np.array([m for sample in samples.values() for m in sample], "<i8")
  keys = "\n".join(key.replace("\n", " ") for key, _ in samples).encode("utf-8", "replace")
  body = table.tobytes() + flat.tobytes() + keys
  head = {
    "version": _VERSION, "size": stamp[0], "mtime_ns": stamp[1], "body": len(body),
    "samples": len(samples), "members": len(members), "names": list(names),
    "amiss": amiss if samples else amiss or "it holds no file with a key and an extension",
  }  # fmt: skip
  content = json.dumps(head).encode() + b"\n" + body
  for index in _candidates(path, index_dir):
    try:
      return _write(index, content), head
    except OSError as e:
      reason = e.__cause__ or e
  raise OSError(f"the index of {path} cannot be written ({reason}); set data.index_dir to a folder")


def _write(path, content):
  # In one step: another process may be making the same index, or be stopped in the middle.
  folder = os.path.dirname(path)
  os.makedirs(folder, exist_ok=True)
  with common.whole(path, folder) as temporary, open(temporary, "wb") as f:
    f.write(content)
  return path


def _walk(path):
  """[(key, kind, offset, size)] of a tar's whole files, and what is amiss with it or "".

  After damage, and after an end mark, it goes on at the next header.
  """
  with open(path, "rb") as file:
    if file.read(2) in (b"\x1f\x8b", b"BZ", b"\xfd7"):
      raise ValueError(f"{path} is compressed; samples are read by their place: unpack it first")
    size = os.fstat(file.fileno()).st_size
    found, lost, start, end = [], [], 0, 0
    while start < size:
      last, end = _read_members(file, start, size, found)
      # If neither a header nor the end mark follows the last member, it lost bytes or gained some.
      begin = end if end > start and _is_boundary(file, end) else last
      start = _next_header(file, begin, size)
      if start < end:
        end = start  # it lost some of its padding, or else of its content:
        if found and found[-1][2] == last and start < last + found[-1][3]:
          found.pop()
          end = last - _BLOCK  # with its header
      if not _only_zeros(file, end, start):
        lost.append((end, start))
  return found, _amiss(lost, end, size)


def _is_boundary(file, at):
  file.seek(at)
  block = file.read(_BLOCK)
  return not block.strip(b"\0") or _is_header(block)


def _read_members(file, start, size, found):
  """Adds the whole files from `start` to an end mark or damage.

  Returns:
    where the last member's content begins, and where it ends.
  """
  file.seek(start)
  last, end = start + 1, start  # if there is none, its header is not tried again
  try:
    with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar:
      while (member := tar.next()) is not None:
        tar.members = []  # it would keep them all
        if tar.offset <= end or min(tar.offset, member.offset_data + member.size) > size:
          break
        last, end = member.offset_data, tar.offset
        name = common.split_name(member.name)
        if name and member.isreg() and not member.issparse():
          found.append((name[0], name[1].lower(), member.offset_data, member.size))
  except OSError:
    raise
  except Exception:  # damaged from here on; the module has no family for all that it meets then
    pass
  return last, min(end, size)


def _next_header(file, start, size):
  """Where the next header at `start` or later begins, or `size`.

  It is known by its magic and checksum, at any byte: bytes that were lost or doubled shift all that
  follows. Images and captions contain none, unless they were made to.
  """
  file.seek(start)
  data, at = b"", start  # `data` begins at byte `at` of the file
  while block := file.read(1 << 20):
    data += block
    place = data.find(_MAGIC)
    while 0 <= place <= len(data) - (_BLOCK - _MAGIC_AT):
      begin = place - _MAGIC_AT
      if begin >= 0 and _is_header(data[begin : begin + _BLOCK]):
        return at + begin
      place = data.find(_MAGIC, place + 1)
    at += max(len(data) - (_BLOCK - 1), 0)
    data = data[-(_BLOCK - 1) :]  # a header may go on in the next block
  return size


def _is_header(block):
  try:
    return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size >= 0
  except tarfile.HeaderError:
    return False


def _only_zeros(file, start, stop):
  file.seek(start)
  while start < stop and (block := file.read(min(stop - start, 1 << 20))):
    if block.strip(b"\0"):
      return False
    start += len(block)
  return True


def _amiss(lost, end, size):
  if lost:
    (start, stop), more = lost[0], len(lost) - 1
    return (
      f"{stop - start} bytes from byte {start} on are no whole member (cut short or damaged)"
      + (f", nor are those in {more} other places" if more else "")
    )
  if end < size:  # a tar ends in blocks of zeros
    return ""
  return "it has no end mark and may have been cut short" if size else "it is empty"


def main(argv=None):
  """Command line: makes the indexes of tars."""
  parser = argparse.ArgumentParser(prog="python -m jepa_vl.data.webdataset")
  parser.add_argument("pattern")
  parser.add_argument("--index-dir", default="")
  arguments = parser.parse_args(argv)
  logging.basicConfig(level=logging.INFO, format="%(message)s")
  source = WebDataset(arguments.pattern, common.Keys(index_dir=arguments.index_dir))
  print(f"{len(source.paths)} tars, {len(source)} samples")


if __name__ == "__main__":
  main()
