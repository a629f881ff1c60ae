"""Made-up images and records, and writing them as files."""

import io
import tarfile

import cv2
import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from jepa_vl.data import pipeline, transforms
from jepa_vl.data.transforms import DamagedRecord


def png(image):
  return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


def noise(shape, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def record(i, **changes):
  fields = {"image": png(noise((20, 24), i)), "caption": f"number {i}", "tags": ["red", "blue"]}
  return fields | changes


def write(path, records):
  """Records as ArrayRecord; bytes are written as they are, everything else as msgpack."""
  writer = ArrayRecordWriter(str(path), "group_size:1")
  for r in records:
    writer.write(r if isinstance(r, bytes) else msgpack.packb(r))
  writer.close()
  return str(path)


def write_tar(path, members):
  """(name, bytes) pairs as a tar, in this order."""
  with tarfile.open(path, "w") as tar:
    for name, data in members:
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  return str(path)


def pair(i, key=None):
  """The two members of a good sample."""
  key = f"{i:06d}" if key is None else key
  return [(f"{key}.png", png(noise((20, 24), i))), (f"{key}.txt", f"number {i}".encode())]


def stands_in(source, index):
  """The index of the record that the pipeline takes for that at `index`."""
  use = lambda _, found: transforms.decode(found["image"])
  return pipeline.read_from(source, index, use)[2]


def damage(source):
  """{index: reason} of the records that cannot be used."""
  reasons = {}
  for i in range(len(source)):
    try:
      source[i]
    except DamagedRecord as e:
      reasons[i] = str(e)
  return reasons
