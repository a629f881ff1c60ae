"""Batches in an exact order: batch k is a function of (seed, k), whoever computes it.

Position p of the endless stream belongs to epoch p // n and, through that epoch's permutation, to
one example; batch k holds positions k B .. k B + B - 1. Of a mixture, p first belongs to one of its
sources, as that one's p'-th, with its own epochs. The caption and each view of the image draw from
streams of their own, keyed by (seed, epoch, example, view). Neither processes, workers nor a
restart enter, so the data position of a run is its step number.
"""

import concurrent.futures
import functools
import math
import os

import grain
import numpy as np

from jepa_vl.data import feed, packing, transforms
from jepa_vl.data.tokenizer import tokenize
from jepa_vl.data.transforms import DamagedRecord

# The rest of a batch stays on the host.
MODEL_KEYS = (
  "image", "global", "local", "text", "mask", "packed_text", "packed_position", "packed_readout",
  "label",
)  # fmt: skip

# So many unreadable records in a row mean that the data set is broken, not one record of it.
_GIVE_UP = 1000


class Order:
  """order[p] -> (epoch, example) for every position of the endless stream.

  A source with `parts`, (records, weight) of each, is drawn from them in that proportion.
  """

  def __init__(self, source, seed):
    parts = getattr(source, "parts", ((len(source), 1.0),))
    self._counts = [count for count, _ in parts]
    self._starts = np.cumsum([0, *self._counts]).tolist()
    seeds = [seed] + [_derived(seed, number) for number in range(1, len(parts))]
    self._orders = [
      grain.MapDataset.range(count).seed(s).shuffle().repeat(None)
      for count, s in zip(self._counts, seeds, strict=True)
    ]
    # position -> (part, how many of that part came before)
    turns = [
      grain.MapDataset.range(_ENDLESS).map(functools.partial(_pair, number))
      for number in range(len(parts))
    ]
    self._turns = grain.MapDataset.mix(turns, [w for _, w in parts]) if len(parts) > 1 else turns[0]

  def __getitem__(self, position):
    part, drawn = self._turns[position]
    return drawn // self._counts[part], self._starts[part] + int(self._orders[part][drawn])


_ENDLESS = np.iinfo(np.int64).max // 2


def _pair(a, b):
  return a, int(b)


def _derived(seed, number):
  return int(np.random.default_rng((seed, number)).integers(2**32))


# Rows of which each stage is done for all before the next begins: what is small between two images
# otherwise takes three times as long, its code and data gone from the processor's cache.
_STAGED = 64


class Batches:
  """Batch start_step + k of this process: decoded, augmented and tokenised, as a dict of arrays.

  `image` (B, S, S, 3) uint8, or `global` (B, Vg, S, S, 3) and `local` (B, Vl, S', S', 3); `text`
  (B, L) int32, `mask` (B, L) bool; host side: `index` (the example), `bad` (the first unreadable
  index that it replaces, or -1), `reason` (why, by its place in transforms.REASONS, or -1) and
  `truncated`. With `cfg.label`, the name of a field, also `label` (B,) int32, -1 where a record has
  none.
  """

  def __init__(
    self, source, tokenizer, cfg, *, batch_size, seed, start_step, parts, count, board
  ):
    if cfg.augment not in transforms.AUGMENT:
      raise ValueError(
        f"data.augment must be one of {', '.join(transforms.AUGMENT)}, got {cfg.augment!r}"
      )
    self._source, self._tokenizer, self._cfg = source, tokenizer, cfg
    self._augment = transforms.AUGMENT[cfg.augment]
    self._batch_size, self._seed, self._start = batch_size, seed, start_step
    part = batch_size // count
    self._rows = [row for p in parts for row in range(p * part, (p + 1) * part)]
    self._order = Order(source, seed)
    self._board = board

  def __len__(self):
    return _ENDLESS

  def __getitem__(self, k):
    first = (self._start + k) * self._batch_size
    size = transforms.image_side(self._cfg, self._cfg.image_size, self._start + k)
    drawn = [self._order[first + row] for row in self._rows]
    batch, captions, labels, host = {}, [], [], []
    for start in range(0, len(drawn), _STAGED):
      stretch = drawn[start : start + _STAGED]
      records = [self._read(example) for _, example in stretch]
      for (epoch, example), record in zip(stretch, records, strict=True):
        record, images, index, reason = self._row(epoch, example, record, size)
        for name, image in images.items():
          if name not in batch:
            batch[name] = np.empty((len(drawn), *image.shape), image.dtype)
          batch[name][len(captions)] = image
        captions.append(self._caption(epoch, index, record))
        labels.append(self._label(index, record))
        code = transforms.REASONS.index(reason) if reason else -1
        host.append((index, example if reason else -1, code))
    self._board.enter(feed.TOKENISING, index)
    text, mask, truncated = tokenize(
      self._tokenizer, captions, length=self._cfg.text_length, readout=self._cfg.readout
    )
    self._board.enter(feed.WAITING)
    index, bad, reason = np.array(host, np.int64).T
    batch |= {"text": text, "mask": mask, "index": index, "bad": bad}
    if self._cfg.label:
      batch["label"] = np.array(labels, np.int32)
    return batch | {"reason": reason.astype(np.int8), "truncated": truncated}

  def _read(self, example):
    self._board.enter(feed.READING, example)
    try:
      return self._source[example]
    except DamagedRecord:  # `read_from` will meet it again and take another
      return None

  def _row(self, epoch, example, record, size):
    use = functools.partial(self._images, epoch, size)
    try:
      if record is not None:
        return record, use(example, record), example, ""
    except DamagedRecord:  # as above
      pass
    return read_from(self._source, example, use, self._board)

  def _caption(self, epoch, index, record):
    # Without tags nothing is drawn.
    rng = self._stream(epoch, index, transforms.CAPTION, 0) if record.get("tags") else None
    return transforms.training_caption(record, rng, self._cfg.tag_prob)

  def _label(self, index, record):
    label = record.get(self._cfg.label, -1) if self._cfg.label else -1
    if type(label) is not int or not -1 <= label < self._cfg.classes:
      raise ValueError(
        f"{self._source.where(index)}: {self._cfg.label!r} must be a class counted from 0 and "
        f"below probe.classes={self._cfg.classes}, or -1 for none, got {label!r}"
      )
    return label

  def _stream(self, *key):
    return np.random.default_rng((self._seed, *key))

  def _images(self, epoch, size, index, record):
    self._board.enter(feed.DECODING, index)
    streams = functools.partial(self._stream, epoch, index)
    return self._augment(record["image"], streams, size, self._cfg)


def read_from(source, index, use, board=feed.NO_BOARD):
  """The record at `index` or, if it cannot be used, at the next index where it can.

  use: function (index, record) that makes what is wanted of the image; may raise DamagedRecord.

  Returns:
    the record, what `use` gave, its index, and the reason why the one at `index` cannot be used, or
    "".

  Raises:
    ValueError: a long run of unreadable records.
  """
  count, i, reason = len(source), index, ""
  for _ in range(_GIVE_UP):
    try:
      board.enter(feed.READING, i % count)
      record = source[i % count]
      return record, use(i % count, record), i % count, reason
    except DamagedRecord as e:
      last, reason = e, reason or e.reason
      i += max(e.resume - i % count, 1)
    if i >= index + count:
      break
  raise ValueError(
    f"{min(count, i - index)} records in a row from {index} cannot be used (last: {last}); "
    "check that data.path names image-caption records"
  )


def why_bad(source, index):
  """The reason why the record at `index` cannot be used, for the log."""
  try:
    transforms.decode(source[index]["image"])
    return "it can be read now"
  except DamagedRecord as e:
    return str(e)


def batches(
  source, tokenizer, cfg, *, batch_size, seed, start_step, parts=(0,), count=1, board=None
):
  """Iterator over one process's rows of the global batches start_step, start_step + 1, ...

  parts: which of `count` equal parts of a batch's rows are this process's
    (`sharding.row_parts`); the rows come in that order.
  cfg: the config's `data` sub-tree with `image_size`, `text_length`, `readout`, `accumulate`,
    `label` and `classes` added. With `text_packing` the batch's captions come as `packing.pack`
    lays them.
  board: the feed.Board on which the processes say what they are at.

  Raises:
    ValueError: `batch_size` is not a multiple of `count`, or a part not one of the packed groups.
  """
  if batch_size % count:
    raise ValueError(f"batch_size={batch_size} is not a multiple of the {count} parts of its rows")
  part = batch_size // count
  if cfg.text_packing and part % (cfg.packing_group * cfg.accumulate):
    raise ValueError(
      f"data.packing_group={cfg.packing_group} x accumulate={cfg.accumulate} does not divide the "
      f"{part} rows of a part; use {math.gcd(cfg.packing_group, part // cfg.accumulate)}"
    )
  every = Batches(
    source, tokenizer, cfg, batch_size=batch_size, seed=seed, start_step=start_step,
    parts=parts, count=count, board=board or feed.NO_BOARD,
  )  # fmt: skip
  ds = grain.MapDataset.source(every)
  if cfg.text_packing:
    ds = ds.map(functools.partial(packing.pack, cfg=cfg))
  ds = ds.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
  if cfg.workers:
    ds = ds.mp_prefetch(grain.MultiprocessingOptions(num_workers=cfg.workers))
  return iter(ds)


def evaluation_rows(source, indices, *, image_size, resize_ratio):
  """The readable records at `indices`, in order, and the indices left out.

  Returns:
    records without fields of bytes (list of dict), images (list of (S, S, 3) uint8), left_out.
  """
  def prepare(item):
    index, record = item
    try:
      image = transforms.decode(record["image"]) if record else None
    except DamagedRecord:
      image = None
    if image is None:
      return index, None, None
    kept = {k: v for k, v in record.items() if not isinstance(v, bytes)}
    return index, kept, transforms.centre_crop(image, image_size, resize_ratio)

  # Sources are read by one thread, as they expect; decoding is most of the work.
  with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    rows = list(pool.map(prepare, ((i, _read_or_none(source, i)) for i in indices)))
  records = [record for _, record, _ in rows if record is not None]
  images = [image for _, _, image in rows if image is not None]
  left_out = [index for index, record, _ in rows if record is None]
  return records, images, left_out


def _read_or_none(source, index):
  try:
    return source[index]
  except DamagedRecord:
    return None
