"""The first half of `prepare`: the source's records, checked, cleaned and resized, in parts."""

import dataclasses
import hashlib
import html
import io
import json
import os
import re
import unicodedata

import cv2
import msgpack
import numpy as np
import PIL.Image

from jepa_vl.data import common, transforms
from jepa_vl.data.prepare_work import Stopped, write_records
from jepa_vl.data.transforms import DamagedRecord

MAX_CAPTION = 10_000  # characters

# NumPy's names and types of what is kept of every accepted record until the end.
COLUMNS = {"hash": "<u8", "words": "<i4", "aspect": "<f8", "bytes": "<i8", "cut": "?"}


@dataclasses.dataclass(frozen=True)
class Options:
  """All that decides which bytes come out; nothing of where, by how many and when."""

  source: str
  identity: str  # the source's own
  split: str
  image_key: str
  caption_key: str
  size: int
  quality: int
  format: str
  min_size: int
  records_per_shard: int
  held_out: int
  shuffle: bool
  seed: int
  version: int = 1  # of this program: goes up when the same options give other bytes


class Parts:
  """Part c holds what can be used of the source's c-th stretch, in its order.

  part-00003.array_record has the records and part-00003.npz, written after it, the COLUMNS, the
  number of records `read` and the rejects, as JSON [[source index, reason, message], ...].
  """

  def __init__(self, source, options, work, max_unreadable=1.0):
    self._source, self._options, self._work = source, options, work
    self._max_unreadable = max_unreadable
    # Short enough to keep many processes busy, whatever their number: the bytes must not hang on it
    self._length = min(4096, max(64, -(-len(source) // 256)))

  def __len__(self):
    return -(-len(self._source) // self._length)

  def path(self, number, kind="array_record"):
    return os.path.join(self._work, f"part-{number:05d}.{kind}")

  def stretch(self, number):
    """The source's indices of a part, as a range."""
    first = number * self._length
    return range(first, min(first + self._length, len(self._source)))

  def done(self, number):
    return os.path.exists(self.path(number, "npz"))

  def make(self, number, stopped):
    """Writes a part -> how many records were read.

    Raises:
      OSError: it cannot be written, or too many of its records have no readable file.
      Stopped: stopped() has become true.
    """
    rows, rejects = [], []
    records = self._records(self.stretch(number), rows, rejects, stopped)
    write_records(self.path(number), records, self._work)
    read = len(self.stretch(number))
    self._check(rejects, read)
    columns = {name: np.array([row[name] for row in rows], kind) for name, kind in COLUMNS.items()}
    path = self.path(number, "npz")
    with common.whole(path, self._work) as temporary, open(temporary, "wb") as f:
      np.savez(f, read=read, rejects=json.dumps(rejects), **columns)
    return read

  def _check(self, rejects, read):
    # A disk or network that went away must not become a part without half its records.
    gone = [(index, message) for index, reason, message in rejects if reason == "unreadable"]
    if len(gone) > max(10, self._max_unreadable * read):
      raise OSError(
        f"{len(gone)} of {read} records in a row have no readable file, the first: record "
        f"{gone[0][0]}: {gone[0][1]}. If the storage was away, the same command goes on; if they "
        "are missing for good, allow it with --max-unreadable=1"
      )

  def _records(self, indices, rows, rejects, stopped):
    for index in indices:
      if stopped():
        raise Stopped
      try:
        data, row = prepare_record(self._source, index, self._options)
      except DamagedRecord as e:
        rejects.append((index, e.reason, str(e)))
        continue
      rows.append(row)
      yield data


def prepare_record(source, index, options):
  """A source's record -> its bytes in ArrayRecord, and its COLUMNS.

  Raises:
    DamagedRecord: it cannot be used.
    RuntimeError: something unforeseen, with the record's index.
  """
  try:
    return _prepare_record(source[index], options)
  except DamagedRecord:
    raise
  except Exception as e:
    raise RuntimeError(f"record {index} of the source: {type(e).__name__}: {e}") from e


def _prepare_record(record, options):
  caption, cut = clean_caption(common.check_caption(record.get("caption")))
  image, aspect = prepare_image(record["image"], options)
  try:
    data = msgpack.packb(record | {"image": image, "caption": caption})
  except (OverflowError, TypeError, ValueError) as e:  # a number of 70 bits, half a surrogate pair
    raise DamagedRecord(f"a field of it cannot be stored ({e})", "malformed") from e
  digest = hashlib.sha256(record["image"] + b"\0" + caption.encode()).digest()
  return data, {
    "hash": int.from_bytes(digest[:8], "little"), "words": len(caption.split()), "aspect": aspect,
    "bytes": len(data), "cut": cut,
  }  # fmt: skip


# With the semicolon alone: "&copy=2" in a web address is no copyright sign.
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
# The joiners U+200C and U+200D stay: emoji, Persian and Indic scripts are spelt with them.
_INVISIBLE = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u200b\u2060\ufeff]")


def clean_caption(text):
  """A caption as `prepare` documents it, and whether it was cut. Raises DamagedRecord if empty."""
  text = _ENTITY.sub(lambda match: html.unescape(match[0]), text)
  text = unicodedata.normalize("NFC", _INVISIBLE.sub("", text))
  text = " ".join(text.split())
  if not text:
    raise DamagedRecord("the caption is empty once it is cleaned", "no_caption")
  if len(text) <= MAX_CAPTION:
    return text, False
  words = text[: MAX_CAPTION + 1].rpartition(" ")[0]
  # Chinese has a blank here and there, and not at the end of a word.
  return words if len(words) >= 0.9 * MAX_CAPTION else text[:MAX_CAPTION], True


def prepare_image(data, options):
  """Encoded bytes -> the encoded bytes to keep, and width / height. Raises DamagedRecord."""
  image = transforms.decode(data)
  h, w = image.shape[:2]
  short = min(h, w)
  if short < options.min_size:
    message = f"image of {w} x {h} pixels; the shorter side must have {options.min_size}"
    raise DamagedRecord(message, "image_too_small")
  if short > options.size:
    image = transforms.resize(image, *(round(n * options.size / short) for n in (h, w)))
  elif _can_stay(data):
    return data, w / h
  return _encode(image, options), w / h


def _can_stay(data):
  # Whether any decoder would show this file as ours does: another encoding could only lose.
  try:
    image = PIL.Image.open(io.BytesIO(data), formats=("JPEG", "WEBP"))
    still = not getattr(image, "is_animated", False)
    known = image.format in ("JPEG", "WEBP") and image.mode == "RGB"
    return known and still and transforms.is_upright(image)
  except Exception:  # another format, or a header that Pillow does not like
    return False


# format: (suffix, the key of its quality, the most pixels of a side)
_FORMATS = {
  "jpeg": (".jpg", cv2.IMWRITE_JPEG_QUALITY, 65_500),
  "webp": (".webp", cv2.IMWRITE_WEBP_QUALITY, 16_383),
}


def _encode(image, options):
  suffix, quality, most = _FORMATS[options.format]
  h, w = image.shape[:2]
  if max(h, w) > most:
    message = f"image of {w} x {h} pixels, and a side of a {options.format} has at most {most}"
    raise DamagedRecord(message, "image_too_large")
  bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
  return cv2.imencode(suffix, bgr, [quality, options.quality])[1].tobytes()
