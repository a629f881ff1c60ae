"""Several captions in one row of the text tower: fewer rows, the same embeddings.

Captions are packed within groups of `packing_group` rows of one micro-batch, each group into the
same number of rows of L tokens. So a group can lie on one device, shapes are fixed, and a batch
depends on its captions alone. Where the captions of a group have no room, its longest are cut.
"""

import numpy as np


def rows_per_group(cfg):
  """R, the rows of L tokens that a group's captions share: room for `packing_tokens` of each."""
  return -(-cfg.packing_group * cfg.packing_tokens // cfg.text_length)


def pack(batch, cfg):
  """The batch with `text` and `mask` replaced by three arrays of G groups of g captions.

  `packed_text` (G, R, L) int32: captions one behind the other, none split over rows;
  `packed_position` (G, R, L) int32: the place of a token in its caption, 0 in padding;
  `packed_readout` (G, g) int32: the place r L + t of each caption's EOT in its group.
  Captions cut for room are marked in `truncated`, as those cut for length are.

  With `accumulate` = A, every A-th row is of one micro-batch (`step.py`), and so is every A-th
  group: a micro-batch's groups hold its rows, in their order.
  """
  text, mask = batch["text"], batch["mask"]
  g, L, R = cfg.packing_group, text.shape[1], rows_per_group(cfg)
  members = np.arange(len(text)).reshape(-1, g, cfg.accumulate).swapaxes(1, 2).reshape(-1, g)
  whole = mask.sum(axis=1)[members]  # (G, g)
  lengths, starts = fit(whole, rows=R, length=L)

  ids = text[members]  # (G, g, L), a copy
  eot = np.take_along_axis(ids, whole[..., None] - 1, axis=2)
  np.put_along_axis(ids, lengths[..., None] - 1, eot, axis=2)
  group, caption, t = np.nonzero(np.arange(L) < lengths[..., None])
  place = starts[group, caption] + t
  packed, positions = np.zeros((2, len(members), R * L), np.int32)
  packed[group, place] = ids[group, caption, t]
  positions[group, place] = t

  truncated = batch["truncated"].copy()
  truncated[members] |= lengths < whole
  return {k: v for k, v in batch.items() if k not in ("text", "mask")} | {
    "packed_text": packed.reshape(-1, R, L),
    "packed_position": positions.reshape(-1, R, L),
    "packed_readout": (starts + lengths - 1).astype(np.int32),
    "truncated": truncated,
  }


def fit(lengths, *, rows, length):
  """Cuts each group's captions to the largest common length at which they find room.

  Returns:
    lengths after the cut (G, g), and the flat place r `length` + t of each first token (G, g).
  """
  caps = np.arange(1, length + 1)
  totals = np.minimum(lengths[..., None], caps).sum(axis=1)  # (G, length)
  # More tokens than places: no larger cap can do. Below it each is tried, because best fit may fail
  # at one cap and do at a larger one.
  cap = (totals <= rows * length).sum(axis=1)
  starts = np.empty_like(lengths)
  left = np.arange(len(lengths))
  while len(left):
    cut = np.minimum(lengths[left], cap[left, None])
    starts[left], found = best_fit(cut, rows=rows, length=length)
    left = left[~found]
    cap[left] -= 1
  return np.minimum(lengths, cap[:, None]), starts


def best_fit(lengths, *, rows, length):
  """The longest caption first (of equals the first), into the row that it fills best.

  Returns:
    the flat place of each first token (G, g), whether all of a group found room (G,).
  """
  room = np.full((len(lengths), rows), length)
  starts = np.empty_like(lengths)
  group = np.arange(len(lengths))
  for caption in np.argsort(-lengths, axis=1, kind="stable").T:  # in all groups at once
    left = room - lengths[group, caption][:, None]
    row = np.where(left < 0, length, left).argmin(axis=1)
    starts[group, caption] = (row + 1) * length - room[group, row]
    room[group, row] = left[group, row]  # below 0 from the first caption that fits in no row
  return starts, (room >= 0).all(axis=1)
