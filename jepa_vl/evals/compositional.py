"""Whether an image is nearer to its caption than to the caption's hard negatives."""

import collections

import numpy as np

from jepa_vl.evals import common

PROTOCOL = """
The share of images whose caption has a higher cosine than every one of its hard negatives of a kind
(as in ARO and SugarCrepe, where there is one each); nothing is fitted. Ties count against the
model. Images without negatives of the kind are left out.
"""

_AT_ONCE = 1 << 16  # pairs of image and text that are scored in one go


def run(encode, variables, mesh, *, source, path, splits, kinds):
  """Keys "SPLIT/KIND/READING/accuracy", with "@random" and "@bag_of_words".

  kinds: fields of the records' `negatives`, {kind: texts}. @random is the mean of 1 / (1 + n) for n
  negatives. @bag_of_words is what a text model reaches that knows the caption's words and their
  counts, but not their order: it guesses among texts that share as many words with the caption.

  Raises:
    ValueError: no record of a split has negatives of a kind.
  """
  figures, sizes = {}, {}
  for split in splits:
    features = encode.features(variables, source, path, split)
    data = encode.split(source, path, split)
    sizes[split] = {"images": len(data)}
    for kind in kinds:
      rows, texts, columns = _of_kind(data, kind, split)
      encoded = encode.texts(variables, texts)
      wins = {
        f"{split}/{kind}/{reading}/accuracy": _wins(features, encoded, rows, columns, reading)
        for reading in encode.readings
      }
      figures |= common.means(wins)
      words = [collections.Counter(text.split()) for text in texts]
      floors = {
        "random": np.mean([1 / len(some) for some in columns]),
        "bag_of_words": np.mean([_bag_of_words([words[c] for c in some]) for some in columns]),
      }
      figures |= {f"{key}@{floor}": value for key in wins for floor, value in floors.items()}
      sizes[split][f"images_{kind}"] = len(rows)
  return common.result(figures, protocol=PROTOCOL, sizes=sizes)


def _of_kind(data, kind, split):
  """The rows that have negatives, all their texts once, and of each row the places of its caption
  and of its negatives among them."""
  rows, columns, texts = [], [], {}
  for row, record in enumerate(data.records):
    wrong = (record.get("negatives") or {}).get(kind)
    if wrong:
      rows.append(row)
      columns.append([texts.setdefault(t, len(texts)) for t in (record["caption"], *wrong)])
  if not rows:
    kinds = sorted({k for r in data.records for k in r.get("negatives") or {}})
    raise ValueError(
      f"no record of split {split!r} has negatives of the kind {kind!r} (kinds that are there: "
      f"{', '.join(kinds) or 'none'}); expected a field `negatives`, {{kind: [texts]}}"
    )
  return rows, list(texts), columns


def _wins(images, texts, rows, columns, reading):
  """Whether the first of each row's texts scores above all its others: (R,) bool."""
  rows = np.repeat(rows, lengths := [len(some) for some in columns])
  columns = np.concatenate(columns)
  scores = np.concatenate([
    _pair_scores(images, texts, rows[i : i + _AT_ONCE], columns[i : i + _AT_ONCE], reading)
    for i in range(0, len(rows), _AT_ONCE)
  ])  # fmt: skip
  starts = np.cumsum([0, *lengths[:-1]])
  # A comparison with NaN is False on either side.
  above = np.repeat(scores[starts], lengths) > scores
  return np.add.reduceat(above, starts, dtype=int) == np.array(lengths) - 1


def _pair_scores(images, texts, rows, columns, reading):
  """The reading's similarity of image rows[i] to text columns[i]: (n,)."""
  # Summed along each row, so that equal embeddings give equal scores to the last bit.
  pairs = common.READINGS[reading]
  return sum(
    np.sum(common.unit(images[a][rows]) * common.unit(texts[b][columns]), axis=1) for a, b in pairs
  ) / len(pairs)


def _bag_of_words(words):
  """The chance to pick the first of texts, given as counts of words, by the overlap with it."""
  overlap = [(some & words[0]).total() for some in words]
  return (overlap[0] == max(overlap)) / overlap.count(max(overlap))
