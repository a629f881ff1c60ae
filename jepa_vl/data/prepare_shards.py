"""The second half of `prepare`: the parts' records in their final order, and their description."""

import collections
import contextlib
import csv
import functools
import hashlib
import json
import os

import grain
import msgpack
import numpy as np

from jepa_vl.data import common, embedded
from jepa_vl.data.prepare_work import Stopped, open_records, write_records

_GATHERED = 256 << 20  # bytes of records that a process holds
_HASHED = 32 << 20  # hashes compared at a time, 8 bytes each
_SHOWN = 128  # images of the contact sheet

# The edges of histograms: counts[i] is of what lies from edges[i - 1] on and below edges[i].
_WORDS = (2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 100, 200, 500, 1000)
_ASPECTS = (1 / 4, 1 / 3, 1 / 2, 2 / 3, 3 / 4, 0.9, 1.1, 4 / 3, 3 / 2, 2, 3, 4)


class Shards:
  """The output files: `held-out-...` holds the first records of the order, `train-...` the rest.

  Beside each, in the work folder and written after it, are its records' SHA-256 digests.

  Raises:
    ValueError: no record was accepted, or none is left for training.
  """

  def __init__(self, parts, options, out, work):
    self._options, self._out, self._work = options, out, work
    self._parts = [parts.path(number) for number in range(len(parts))]
    self._ends = np.cumsum([len(sidecar(path, "bytes")) for path in self._parts])
    self._bytes = sum(int(sidecar(path, "bytes").sum()) for path in self._parts)
    held_out = options.held_out
    if len(self) <= held_out:
      raise ValueError(
        f"{len(self)} records were accepted, and --held-out {held_out} leaves none to train with"
        + _reasons(self.rejects())
      )
    self.files = _cut("held-out", 0, held_out, options.records_per_shard)
    self.files += _cut("train", held_out, len(self), options.records_per_shard)

  def __len__(self):
    return int(self._ends[-1])

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if k != "_order"}  # cheap to make, not to send

  @functools.cached_property
  def _order(self):
    order = grain.MapDataset.range(len(self))  # a permutation that needs no table
    return order.seed(self._options.seed).shuffle() if self._options.shuffle else order

  def _digests(self, number):
    return os.path.join(self._work, self.files[number][0] + ".digests")

  def path(self, number):
    return os.path.join(self._out, self.files[number][0])

  def done(self, number):
    return os.path.exists(self._digests(number)) and os.path.exists(self.path(number))

  def make(self, number, stopped):
    """Writes an output file, if it is not there -> its number of records.

    Raises:
      OSError: it cannot be written.
      ValueError: a part cannot be read.
      Stopped: stopped() has become true.
    """
    _, first, last = self.files[number]
    if not self.done(number):
      digests = []
      write_records(self.path(number), self._records(first, last, digests, stopped), self._work)
      with common.whole(self._digests(number), self._work) as temporary, open(temporary, "wb") as f:
        f.write(b"".join(digests))
    return last - first

  def _records(self, first, last, digests, stopped):
    # As many at a time as memory allows, since of these each part is opened once.
    step = max(_GATHERED * len(self) // self._bytes, 1)
    for start in range(first, last, step):
      for data in self.gather(range(start, min(start + step, last)), stopped):
        digests.append(hashlib.sha256(data).digest())
        yield data

  def gather(self, positions, stopped):
    """The records (bytes) at these positions of the final order."""
    indices = np.array([int(self._order[p]) for p in positions])
    numbers = np.searchsorted(self._ends, indices, side="right")
    found = [None] * len(indices)
    for number in np.unique(numbers).tolist():
      if stopped():
        raise Stopped
      places = np.flatnonzero(numbers == number)
      start = int(self._ends[number - 1]) if number else 0
      for place, data in zip(places, self._read(number, indices[places] - start), strict=True):
        found[place] = data
    return found

  def _read(self, number, rows):
    path = self._parts[number]
    try:
      with contextlib.closing(open_records(path)) as reader:
        return reader.read(rows.tolist())
    except (RuntimeError, IndexError) as e:
      raise ValueError(
        f"{path} cannot be read any more ({e}); remove it and its .npz, and the same command "
        "makes it again"
      ) from e

  def rejects(self):
    """(source index, reason, message) of all that was rejected, in order."""
    for path in self._parts:
      yield from json.loads(str(sidecar(path, "rejects")))

  def describe(self):
    """What dataset.json says of the records."""
    read = cut = 0
    words, aspects = np.zeros(len(_WORDS) + 1, int), np.zeros(len(_ASPECTS) + 1, int)
    for path in self._parts:
      read += int(sidecar(path, "read"))
      cut += int(sidecar(path, "cut").sum())
      words += _histogram(sidecar(path, "words"), _WORDS)
      aspects += _histogram(sidecar(path, "aspect"), _ASPECTS)
    rejected = collections.Counter(reason for _, reason, _ in self.rejects())
    sizes = [os.path.getsize(self.path(number)) for number in range(len(self.files))]
    return {
      "read": read, "accepted": len(self), "rejected": dict(sorted(rejected.items())),
      "held_out": self._options.held_out, "train": len(self) - self._options.held_out,
      "exact_duplicates": self._duplicates(), "captions_cut": cut,
      "record_bytes": self._bytes, "file_bytes": sum(sizes), "files": [f[0] for f in self.files],
      "caption_words": {"edges": _WORDS, "counts": words.tolist()},
      "aspect_ratio": {"edges": _ASPECTS, "counts": aspects.tolist()},
      "content": self._content(),
    }  # fmt: skip

  def _duplicates(self):
    # Records beyond the first of each hash; so many hashes at a time as memory allows.
    rounds = -(-len(self) // _HASHED)
    unique = 0
    for i in range(rounds):
      hashes = (sidecar(path, "hash") for path in self._parts)
      unique += len(np.unique(np.concatenate([h[h % rounds == i] for h in hashes])))
    return len(self) - unique

  def _content(self):
    # Of the records' digests in order, so of all their bytes, however they lie in files.
    content = hashlib.sha256()
    for number in range(len(self.files)):
      with open(self._digests(number), "rb") as f:
        content.update(f.read())
    return content.hexdigest()

  def write_rejects(self, path):
    """Writes rejects() as CSV."""
    with (
      common.whole(path, self._work) as temporary,
      open(temporary, "w", newline="", encoding="utf-8", errors="replace") as f,
    ):
      rows = csv.writer(f)
      rows.writerow(("source_index", "reason", "message"))
      rows.writerows(self.rejects())

  def draw(self, path):
    """Writes a contact sheet (PNG) of records that lie evenly over the final order."""
    shown = min(len(self), _SHOWN)
    positions = [i * len(self) // shown for i in range(shown)]
    records = [msgpack.unpackb(data) for data in self.gather(positions, lambda: False)]
    with common.whole(path, self._work) as temporary:
      embedded.draw(records, temporary)


def sidecar(part, name):
  """An array of what was kept of a part's records (see Parts), by the path of the part."""
  with np.load(part.removesuffix("array_record") + "npz") as file:
    return file[name]


def _cut(name, first, last, most):
  # [(file, first, last)] of positions first .. last - 1, even files of at most `most` records.
  count = -(-(last - first) // most)
  borders = [first + i * (last - first) // max(count, 1) for i in range(count + 1)]
  names = [f"{name}-{i:05d}-of-{count:05d}.array_record" for i in range(count)]
  return list(zip(names, borders[:-1], borders[1:], strict=True))


def _histogram(values, edges):
  return np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)


def _reasons(rejects):
  for index, reason, message in rejects:
    return f"; the first that was not: record {index}, {reason}: {message}"
  return ""
