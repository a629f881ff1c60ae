"""Damaged inputs by the thousand: python tests/fuzz.py KIND FIRST LAST FOLDER

Input number n of a kind is a function of (kind, n). Each number is printed before it is tried, so
that whoever started this process knows which one crashed it, hung (30 s) or failed.
"""

import csv
import faulthandler
import io
import json
import os
import pickle
import struct
import sys
import tarfile
import warnings
import zlib

import msgpack
import numpy as np
import PIL.Image
from records import noise, pair, png, record, write, write_tar

from jepa_vl.data import common, sources, tokenizer, transforms
from jepa_vl.data.transforms import DamagedRecord

TIME_LIMIT = 30  # seconds an input may take
PICTURES = [noise((20, 24), i) for i in range(6)]

# --- damage to bytes


def flip(data, rng):
  for _ in range(rng.integers(1, 9)):
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))


def overwrite(data, rng):
  at, n = rng.integers(len(data)), rng.integers(1, 600)
  n = min(n, len(data) - at)
  data[at : at + n] = rng.bytes(n) if rng.random() < 0.7 else bytes(n)


def insert(data, rng):
  at = rng.integers(len(data) + 1)
  data[at:at] = rng.bytes(rng.integers(1, 600))


def delete(data, rng):
  at = rng.integers(len(data))
  del data[at : at + rng.integers(1, 600)]


def truncate(data, rng):
  del data[rng.integers(len(data) + 1) :]


def double(data, rng):
  at = rng.integers(len(data))
  data[at:at] = data[at : at + rng.integers(1, 2000)]


DAMAGE = (flip, overwrite, insert, delete, truncate, double)


def damaged(data, rng, kinds=DAMAGE):
  data = bytearray(data)
  for _ in range(rng.integers(1, 3)):
    if data:
      kinds[rng.integers(len(kinds))](data, rng)
  return bytes(data)


# --- what may come out


def read(source, index):
  """The record if its image can be decoded, else None."""
  try:
    found = source[index]
    image = transforms.decode(found["image"])
  except DamagedRecord as e:
    assert e.reason in transforms.REASONS and str(e) == str(pickle.loads(pickle.dumps(e)))
    return None
  assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
  assert isinstance(found["caption"], str) and found["caption"].strip()
  return found


def read_all(name, path):
  """[record or None] of a file, or the error with which it is refused at opening."""
  try:
    source = sources.open_source(name, path, "")
  except (ValueError, OSError) as e:
    assert str(e)
    return e
  assert source.identity
  return [read(source, i) for i in range(min(len(source), 50))]


# --- kinds: function (number, rng, folder) -> None, or AssertionError


def encoded(image, **options):
  file = io.BytesIO()
  PIL.Image.fromarray(image).save(file, **options)
  return file.getvalue()


FORMATS = (
  {"format": "JPEG"}, {"format": "JPEG", "progressive": True}, {"format": "PNG"}, {"format": "GIF"},
  {"format": "WEBP"}, {"format": "WEBP", "lossless": True}, {"format": "TIFF"}, {"format": "BMP"},
)  # fmt: skip


DECLARES = ("PNG", "GIF", "JPEG", "WEBP")


def declare(data, kind, rng):
  """The image with another size in its header."""
  data = bytearray(data)
  side = lambda bits: int(rng.integers(2 ** rng.integers(1, bits + 1)))
  if kind == "PNG":
    data[16:24] = struct.pack(">2I", side(32), side(32))
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
  elif kind == "GIF":
    data[6:10] = struct.pack("<2H", side(16), side(16))
  elif kind == "JPEG":
    at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2")) + 5
    data[at : at + 4] = struct.pack(">2H", side(16), side(16))
  else:
    data[21:30] = rng.bytes(9)
  return bytes(data)


def image(number, rng, folder):
  options = FORMATS[number % len(FORMATS)]
  whole = encoded(PICTURES[number % 6], **options)
  kind = options["format"] if rng.random() < 0.3 else ""
  data = declare(whole, kind, rng) if kind in DECLARES else damaged(whole, rng)
  before = transforms.decode(whole)
  side = int(rng.choice([2, 4, 16]))  # a JPEG's small crops are taken from a part of its size
  for use in (decoded, cropped):
    try:
      use(data, side, rng)
    except DamagedRecord as e:
      assert e.reason in ("image_undecodable", "image_too_large")
  np.testing.assert_array_equal(transforms.decode(whole), before)


def decoded(data, side, rng):
  found = transforms.decode(data)
  assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3
  assert 0 < found.shape[0] * found.shape[1] <= transforms.MAX_PIXELS
  assert transforms.centre_crop(found, side, 1.1).shape == (side, side, 3)


def cropped(data, side, rng):
  for crop in transforms.crops(data, [(rng, side, (0.1, 1.0)), (rng, side, (0.5, 1.0))]):
    assert crop.dtype == np.uint8 and crop.shape == (side, side, 3)


TOKENIZER = tokenizer.load("emoji")


def text(rng):
  """A caption of random bytes, damaged UTF-8 or random characters, some of them half pairs."""
  n = int(rng.integers(1, 100_000 if rng.random() < 0.02 else 200))
  if (kind := rng.random()) < 0.3:
    return rng.bytes(n)
  if kind < 0.6:
    return damaged("grinning face käse 顔 😀 ".encode() * (n // 20 + 1), rng)
  top = (0x80, 0x3000, 0x110000)[rng.integers(3)]
  return "".join(map(chr, rng.integers(0, top, n)))


def caption(number, rng, folder):
  value = text(rng)
  try:
    value = common.check_caption(value)
  except DamagedRecord as e:
    assert e.reason in ("no_caption", "caption_encoding")
    return
  ids, mask, truncated = tokenizer.tokenize(TOKENIZER, [value], length=12, readout="eot")
  assert ids.shape == mask.shape == (1, 12) and mask[0, 0]
  assert ids.min() >= 0 and ids.max() < TOKENIZER.vocab_size


def anything(rng, depth=0):
  """A random msgpack value."""
  some = lambda: anything(rng, depth + 1)
  return [
    None, True, -1, 2**63, 1.5, float("nan"), "", "text", b"", rng.bytes(40),
    msgpack.ExtType(5, b"x"), msgpack.Timestamp(1), png(PICTURES[0]),
    [some() for _ in range(3)] if depth < 3 else [],
    {"a": some(), "image": some()} if depth < 3 else {},
  ][rng.integers(15)]  # fmt: skip


def packed(number, rng, folder):
  """A record between two good ones."""
  if rng.random() < 0.5:
    middle = damaged(msgpack.packb(record(1)), rng)
  elif rng.random() < 0.8:
    fields = record(1, **{["image", "caption", "tags", "cls"][rng.integers(4)]: anything(rng)})
    middle = msgpack.packb(fields)
  else:
    middle = msgpack.packb(anything(rng))
  rows = read_all("array_record", write(f"{folder}/x.array_record", [record(0), middle, record(2)]))
  assert rows[0] == record(0) and rows[2] == record(2)


def tar(number, rng, folder):
  """Whatever is whole in the damaged file is read as it was."""
  samples = {f"number {i}": pair(i) for i in range(5)}
  path = write_tar(f"{folder}/x.tar", [m for members in samples.values() for m in members])
  with open(path, "rb") as f:
    whole = f.read()
  with tarfile.open(path) as opened:
    places = [(m.offset, m.offset_data + m.size) for m in opened]
  mutation = (other_size, other_name, swap, None)[min(rng.integers(12), 3)]
  if mutation:
    data, touched = mutation(whole, places, rng)
  else:
    data, touched = damaged(whole, rng), ()
  with open(path, "wb") as f:
    f.write(data)
  rows = read_all("webdataset", path)
  rows = [] if isinstance(rows, Exception) else rows
  found = {(r["caption"], r["image"]) for r in rows if r}
  for i, (text, members) in enumerate(samples.items()):
    intact = all(whole[a:b] in data for a, b in places[2 * i : 2 * i + 2])
    once = all(data.count(name.encode()) == 1 for name, _ in members)
    if intact and once and i not in touched:
      assert (text, members[0][1]) in found, f"sample {i} is whole and was not read"


def header(whole, places, number):
  return tarfile.TarInfo.frombuf(whole[places[number][0] :][:512], "utf-8", "surrogateescape")


def with_header(whole, at, info):
  return whole[:at] + info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + whole[at + 512 :]


def other_size(whole, places, rng):
  # With the right checksum: a larger one takes in the samples that follow.
  number = int(rng.integers(len(places)))
  info = header(whole, places, number)
  info.size = int(rng.integers(2 ** rng.integers(1, 62))) * (-1 if rng.random() < 0.2 else 1)
  return with_header(whole, places[number][0], info), range(number // 2, 5)


def other_name(whole, places, rng):
  number = int(rng.integers(len(places)))
  info = header(whole, places, number)
  names = ["../../x.png", "/etc/x.txt", "", ".", "x", "000003.png", "a\nb.png", "\udcff.txt", "a/"]
  info.name = names[rng.integers(len(names))]
  if rng.random() < 0.3:
    info.type = bytes([rng.integers(48, 128)])
  # Some types, as that of long names, say something about the next member.
  return with_header(whole, places[number][0], info), (number // 2, number // 2 + 1, 3)


def swap(whole, places, rng):
  # Two tars in one file, the first cut anywhere.
  cut = rng.integers(len(whole))
  return whole[cut:] + whole[:cut], ()


def array_record(number, rng, folder):
  """Whatever is read is what was written; a few flipped bits cost as many records at most."""
  kinds = (flip,) if rng.random() < 0.5 else DAMAGE
  path = write(f"{folder}/x.array_record", [record(i) for i in range(12)])
  with open(path, "rb") as f:
    whole = f.read()
  data = damaged(whole, rng, kinds)
  with open(path, "wb") as f:
    f.write(data)
  rows = read_all("array_record", path)
  if isinstance(rows, Exception):
    assert path in str(rows), rows
    return
  if kinds == (flip,):
    assert all(r is None or r == record(i) for i, r in enumerate(rows))
    assert sum(r is None for r in rows) <= sum(a != b for a, b in zip(data, whole, strict=True))


def parquet(number, rng, folder):
  """Row groups whose bytes were not touched are read as they were."""
  import pyarrow as pa
  import pyarrow.parquet as pq

  path = f"{folder}/x.parquet"
  rows = {"image": [png(x) for x in PICTURES], "caption": [f"number {i}" for i in range(6)]}
  pq.write_table(pa.table(rows), path, row_group_size=2, compression=("none", "snappy")[number % 2])
  footer = pq.read_metadata(path)
  with open(path, "rb") as f:
    whole = f.read()
  data = damaged(whole, rng, (flip, overwrite) if rng.random() < 0.7 else DAMAGE)
  with open(path, "wb") as f:
    f.write(data)
  found = read_all("parquet", path)
  end = -footer.serialized_size - 8
  if len(data) == len(whole) and data[end:] == whole[end:]:
    for group in range(3):
      columns = [footer.row_group(group).column(c) for c in (0, 1)]
      begin = min(c.dictionary_page_offset or c.data_page_offset for c in columns)
      end = begin + sum(c.total_compressed_size for c in columns)
      if data[begin:end] == whole[begin:end]:
        for i in (2 * group, 2 * group + 1):
          assert found[i] == {"image": rows["image"][i], "caption": rows["caption"][i]}


def table(number, rng, folder):
  """Lines that are whole are read as they were."""
  kind = ("tsv", "csv", "jsonl")[number % 3]
  for i, x in enumerate(PICTURES):
    if not os.path.exists(f"{folder}/{i}.png"):
      with open(f"{folder}/{i}.png", "wb") as f:
        f.write(png(x))
  rows = [{"path": f"{i}.png", "text": f"number {i}, \"quoted\""} for i in range(6)]
  file = io.StringIO()
  if kind == "jsonl":
    file.write("".join(json.dumps(row) + "\n" for row in rows))
  else:
    plain = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None}
    writer = csv.writer(file, lineterminator="\n", **(plain if kind == "tsv" else {}))
    writer.writerows([["path", "text"], *(row.values() for row in rows)])
  whole = file.getvalue().encode()
  data = damaged(whole, rng)
  with open(f"{folder}/x.{kind}", "wb") as f:
    f.write(data)
  found = read_all("table", f"{folder}/x.{kind}")
  lines = whole.splitlines()
  first = kind != "jsonl"
  if isinstance(found, Exception) or first and not data.startswith(lines[0] + b"\n"):
    return
  pairs = {(r["caption"], r["image"]) for r in found if r}
  for i, line in enumerate(lines[first:]):
    before, is_there, _ = (b"\n" + data).partition(b"\n" + line + b"\n")
    if is_there and (kind != "csv" or before.count(b'"') % 2 == 0):
      assert (rows[i]["text"], png(PICTURES[i])) in pairs, f"row {i} is whole and was not read"


KINDS = {
  "image": image, "caption": caption, "packed": packed, "tar": tar, "array_record": array_record,
  "parquet": parquet, "table": table,
}  # fmt: skip


def main(kind, first, last, folder):
  warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
  faulthandler.enable()
  for number in range(int(first), int(last)):
    print(f"{kind} {number}", flush=True)
    faulthandler.dump_traceback_later(TIME_LIMIT, exit=True)
    KINDS[kind](number, np.random.default_rng((list(KINDS).index(kind), number)), folder)
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
  main(*sys.argv[1:])
