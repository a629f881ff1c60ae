"""Tables of image paths and captions (TSV, CSV, JSONL), and folders of x.jpg beside x.txt."""

import collections
import csv
import functools
import io
import logging
import os
import re

import numpy as np

from jepa_vl.data import common
from jepa_vl.data.transforms import DamagedRecord

log = logging.getLogger(__name__)

_BLOCK = 1 << 24  # bytes of a table that are looked through at once
_IMAGES = common.PATH_NAMES + common.IMAGE_NAMES


class Table:
  """The rows of .tsv, .csv or .jsonl files that name an image file and its caption.

  The first line of a TSV or CSV names its columns. In a CSV, quotes around a cell keep its commas
  and line breaks together; elsewhere, and in a TSV, they are characters as any other. Paths are
  relative to `image_root` or, if that is empty, to the table's folder. A row is found by its place,
  so that no worker holds the table: 8 bytes a row.

  Raises:
    FileNotFoundError: nothing matches the pattern.
    ValueError: a file of another kind, without the columns, or a CSV that ends within quotes.
  """

  def __init__(self, pattern, keys):
    self.paths = common.find(pattern, what="tables (.tsv, .csv, .jsonl)", suffix=".tsv")
    self._keys = keys
    self._starts, self._header = [], []  # of each file: where its rows begin, and its columns
    for path in self.paths:
      starts = _row_starts(path)
      header = None
      if not path.endswith(".jsonl"):
        header, starts = self._read_header(path, starts), starts[1:]
      self._header.append(header)
      self._starts.append(starts)
    self._ends = np.cumsum([max(len(s) - 1, 0) for s in self._starts])
    self._stamps = [os.path.getsize(path) for path in self.paths]
    if not len(self):
      raise ValueError(f"the {len(self.paths)} tables of {pattern!r} hold no row")
    self._open = functools.lru_cache(64)(io.FileIO)

  def _read_header(self, path, starts):
    if len(starts) < 2:
      return []
    with open(path, "rb") as f:
      line = os.pread(f.fileno(), int(starts[1] - starts[0]), int(starts[0]))
    try:
      header = _cells(path, line.removeprefix(_MARK).decode("utf-8", "replace"))
      self._columns(header)
    except (DamagedRecord, csv.Error) as e:
      raise ValueError(f"{path}, whose first line must name the columns: {e}") from e
    return header

  def _columns(self, there):
    # Which of the fields hold the image and the caption.
    return (
      common.pick("image", there, self._keys.image_key, _IMAGES),
      common.pick("caption", there, self._keys.caption_key, common.CAPTION_NAMES),
    )

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if k != "_open"}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._open = functools.lru_cache(64)(io.FileIO)

  def __len__(self):
    return int(self._ends[-1])

  def __getitem__(self, index):
    """The record at `index`. Raises DamagedRecord."""
    number = int(np.searchsorted(self._ends, index, side="right"))
    path, starts, end = self.paths[number], self._starts[number], int(self._ends[number])
    i = index - (end - (len(starts) - 1))
    try:
      file = self._open(path)
      if os.fstat(file.fileno()).st_size != self._stamps[number]:
        raise OSError("it has changed since the run began")
      line = os.pread(file.fileno(), int(starts[i + 1] - starts[i]), int(starts[i]))
    except OSError as e:
      message = f"{path} cannot be read any more ({e.strerror or e})"
      raise DamagedRecord(message, "unreadable", end) from e
    try:
      return self._record(path, self._header[number], line)
    except DamagedRecord as e:
      raise e.at(f"{path}, the row at byte {starts[i]}") from e

  def where(self, index):
    """The table of the record at `index`."""
    return f"{self.paths[int(np.searchsorted(self._ends, index, side='right'))]}, record {index}"

  def _record(self, path, header, line):
    fields = common.parse_json(line) if header is None else _fields(path, header, line)
    image, caption = self._columns(fields)
    folder = self._keys.image_root or os.path.dirname(path)
    data = common.image_bytes(fields[image], folder)
    others = {k: v for k, v in fields.items() if k not in (image, caption)}
    if header:
      others = {k: common.parse_number(v) for k, v in others.items()}
    return common.make_record(data, fields[caption], others)

  @functools.cached_property
  def identity(self):
    """Changes with the tables' names and sizes, the number of rows and a sample of them."""
    names = map(os.path.basename, self.paths)
    return common.identity(self, map("{}:{}".format, names, self._stamps))


# A cell within quotes, as Python's csv has it: a quote opens one only where a cell begins, and a
# doubled one within is text. The group is empty if nothing closes it.
_QUOTED = re.compile(rb'"(?<![^,\n]")[^"]*(?:""[^"]*)*+("|\Z)')
_MARK = b"\xef\xbb\xbf"  # UTF-8's byte order mark, no part of the first cell


def _row_starts(path):
  """Byte offsets at which the rows of a table begin, and the table's end.

  An empty line is no row: it goes with the one before it. Raises ValueError for a file of another
  kind, or one that ends within quotes.
  """
  if not path.endswith((".tsv", ".csv", ".jsonl")):
    raise ValueError(f"{path}: a table is a .tsv, .csv or .jsonl file")
  with open(path, "rb") as f:
    at = f.seek(len(_MARK) if f.read(len(_MARK)) == _MARK else 0)
    breaks = _csv_breaks(path, f) if path.endswith(".csv") else _breaks(f)
    starts = np.concatenate([np.zeros(1, np.int64), *(found + (at + 1) for found in breaks)])
    if starts[-1] < f.tell():
      starts = np.append(starts, f.tell())
    sizes = np.diff(starts)
    read = lambda i: os.pread(f.fileno(), int(sizes[i]), int(starts[i]))
    empty = [i for i in np.flatnonzero(sizes <= 2) if not read(i).strip(b"\r\n")]
  return np.delete(starts, empty)


def _breaks(file):
  """Yields the places of line breaks, a block at a time, counted from where the file stands."""
  at = 0
  while block := file.read(_BLOCK):
    yield np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + at
    at += len(block)


def _csv_breaks(path, file):
  """As `_breaks`, without those within quotes, where they are text."""
  at, line, before = 0, 1, b"\n"
  while block := file.read(_BLOCK):
    while block.endswith(b'"') and (more := file.read(1)):  # so that doubled quotes stay together
      block += more
    breaks = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
    spans, cell = [], None
    for cell in _QUOTED.finditer(before + block):
      spans.append(cell.span())
    first, last = np.array(spans, np.int64).reshape(-1, 2).T - len(before)
    number = np.searchsorted(first, breaks) - 1  # of the last cell that begins before the break
    yield breaks[(number < 0) | (breaks >= np.append(last, 0)[number])] + at
    within = cell and not cell[1]
    if within and first[-1] >= 0:  # else it was opened in an earlier block
      opened = line + block.count(b"\n", 0, first[-1])  # the line of its quote
    before = b',"' if within else block[-1:]
    at, line = at + len(block), line + len(breaks)
  if before == b',"':
    raise ValueError(
      f"{path}, line {opened}: the quote that opens a cell there is closed nowhere, and all that "
      'follows would be one row. Close it, or write the cell as "...", with "" for each quote in '
      "it; if the file was cut short, copy it again"
    )


def _cells(path, line):
  line = line.rstrip("\r\n")
  if path.endswith(".tsv"):
    return line.split("\t")
  return next(csv.reader([line], strict=True), [])


def _fields(path, header, line):
  try:
    cells = _cells(path, line.decode("utf-8"))
  except UnicodeDecodeError as e:
    message = f"the row is not UTF-8 (from its byte {e.start} on)"
    raise DamagedRecord(message, "caption_encoding") from e
  except csv.Error as e:
    raise DamagedRecord(f"the row is no CSV ({e})", "malformed") from e
  if len(cells) != len(header):
    message = f"{len(cells)} cells, where the first line names {len(header)} columns"
    raise DamagedRecord(message, "malformed")
  return dict(zip(header, cells, strict=True))


class Folder:
  """A folder, with all within it, of images and captions that share a name: a/x.jpg, a/x.txt.

  Files are grouped as the members of a tar are, by their names up to the first dot, but for pairs
  that share more of it (v1.2.jpg, v1.2.txt). What lacks its partner is a record that raises
  DamagedRecord.
  """

  def __init__(self, path, keys):
    self._root, self._keys = os.path.expanduser(path), keys
    if "://" in path or not os.path.isdir(self._root):
      raise FileNotFoundError(f"path {path!r} is no folder; data.source='folder' needs one")
    names = [name for name in _names(self._root) if common.split_name(name)]
    dotted, samples = _dotted_pairs(names, keys), {}
    for name in names:
      key, kind = _split_name(name, dotted)
      samples.setdefault(key, {})[kind.lower()] = kind
    known = {*common.IMAGE_NAMES, *common.CAPTION_NAMES, "json", keys.image_key, keys.caption_key}
    self._samples = [(key, kinds) for key, kinds in samples.items() if known & set(kinds)]
    others = [
      f"{key}.{kind}"
      for key, kinds in samples.items() if not known & set(kinds)
      for kind in kinds.values() if kind.lower().rpartition(".")[2] in known
    ]  # fmt: skip
    if others:
      log.warning(
        "%s: %d files have no partner of their name and are left out: %s%s", path, len(others),
        ", ".join(others[:3]), ", ..." if len(others) > 3 else "",
      )  # fmt: skip
    if not self._samples:
      raise ValueError(f"{path!r} holds no x.jpg (jpeg, png, webp) beside x.txt (or x.json)")

  def __len__(self):
    return len(self._samples)

  def __getitem__(self, index):
    """The record at `index`. Raises DamagedRecord."""
    key, kinds = self._samples[index]
    at = os.path.join(self._root, key)
    try:
      return common.member_record(kinds, lambda k: common.read_file(f"{at}.{kinds[k]}"), self._keys)
    except DamagedRecord as e:
      raise e.at(at) from e

  def where(self, index):
    """The files of the record at `index`, without their extensions."""
    return os.path.join(self._root, self._samples[index][0])

  @property
  def paths(self):
    """The files of all records."""
    at = lambda key, kind: os.path.join(self._root, f"{key}.{kind}")
    return [at(key, kind) for key, kinds in self._samples for kind in kinds.values()]

  @functools.cached_property
  def identity(self):
    """Changes with the files' names and a sample of what is in them."""
    return common.identity(self, self._samples)


def _names(root):
  """The files in and below a folder, as paths from there, in an order of their own.

  Links to folders elsewhere are followed, to each folder once; those to folders above or within the
  root lead round in circles or to files that are read anyway.
  """
  seen, real_root = set(), os.path.realpath(root)
  for folder, inner, files in os.walk(root, followlinks=True):
    inner.sort()
    inside, real = os.path.relpath(folder, root), os.path.realpath(folder)
    is_link = real != os.path.normpath(os.path.join(real_root, inside))
    if real in seen or is_link and os.path.commonpath([real, real_root]) in (real, real_root):
      inner.clear()
      continue
    seen.add(real)
    yield from (os.path.normpath(os.path.join(inside, name)) for name in sorted(files))


def _dotted_pairs(names, keys):
  """The names, up to their last dot, that hold a dot and that an image and a caption share."""
  images = {keys.image_key} if keys.image_key else {*common.IMAGE_NAMES}
  captions = {keys.caption_key} if keys.caption_key else {*common.CAPTION_NAMES}
  found = collections.defaultdict(set)
  for name in names:
    if "." in common.split_name(name)[1]:
      key, _, kind = name.rpartition(".")
      found[key].add(kind.lower())
  return {key for key, there in found.items() if there & images and there & (captions | {"json"})}


def _split_name(name, dotted):
  """As common.split_name, at the last dot before which the name is one of `dotted`."""
  key, kind = common.split_name(name)
  parts = kind.split(".")
  for i in range(len(parts) - 1, 0, -1):
    longer = ".".join([key, *parts[:i]])
    if longer in dotted:
      return longer, ".".join(parts[i:])
  return key, kind
