"""Label and depth maps of images, as evaluations of dense prediction read them."""

import concurrent.futures
import io
import os

import cv2
import numpy as np
import PIL.Image

from jepa_vl.data import transforms
from jepa_vl.data.transforms import DamagedRecord

VOID = 255  # the class of pixels that count nowhere


def classes(data):
  """A PNG of class numbers, of a palette's places or grey values -> (H, W) uint8.

  Raises DamagedRecord for what is no such picture.
  """
  try:
    image = PIL.Image.open(io.BytesIO(data))
    found = np.asarray(image)
  except (OSError, ValueError, SyntaxError) as e:
    raise DamagedRecord(f"the label map cannot be decoded ({e})", "undecodable") from e
  if found.ndim != 2 or found.max(initial=0) > 255:
    raise DamagedRecord(
      f"the label map has mode {image.mode}; expected one class number below 256 per pixel (a "
      "PNG of grey values or of a palette)",
      "undecodable",
    )
  return found.astype(np.uint8)


def depth(data):
  """A 16-bit PNG of millimetres -> (H, W) float32 metres, 0 where it is not known.

  Raises DamagedRecord.
  """
  try:
    found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
  except cv2.error:  # of an empty file
    found = None
  if found is None or found.ndim != 2 or found.dtype != np.uint16:
    raise DamagedRecord(
      "the depth map is no PNG of one 16-bit channel in millimetres", "undecodable"
    )
  return found.astype(np.float32) / 1000


def png(array):
  """(H, W) or (H, W, 3) RGB -> PNG bytes, quickly made."""
  array = array[..., ::-1] if array.ndim == 3 else array
  return cv2.imencode(".png", array, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


DECODERS = {"segmentation": classes, "depth": depth}  # field of a record: its decoder


def read(source, indices, field):
  """The images and maps at `indices` of a source whose records have `field`.

  Returns:
    indices of what can be read, images (list of (H, W, 3) uint8), maps (list of (H', W')).

  Raises:
    ValueError: a record without the field.
  """

  def prepare(item):
    index, record = item
    if record is None:
      return None
    if field not in record:
      raise ValueError(
        f"{source.where(index)} has no {field!r}, a PNG of {_MEANINGS[field]} per pixel; its "
        f"fields are {', '.join(record)}"
      )
    try:
      return index, transforms.decode(record["image"]), DECODERS[field](record[field])
    except DamagedRecord:
      return None

  # Sources are read by one thread, as they expect; decoding is most of the work.
  with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    rows = list(pool.map(prepare, ((int(i), _read_or_none(source, int(i))) for i in indices)))
  rows = [row for row in rows if row is not None]
  return tuple(list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])


_MEANINGS = {"segmentation": "class numbers", "depth": "millimetres"}


def _read_or_none(source, index):
  try:
    return source[index]
  except DamagedRecord:
    return None
