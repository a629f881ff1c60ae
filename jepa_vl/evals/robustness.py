"""What another distribution of the same classes costs: other backgrounds, styles, corruptions."""

import os
import re

import numpy as np

from jepa_vl.evals import common, probes, zeroshot

PROTOCOL = """
A linear probe on standardised frozen features, fitted on the training images of the first set, its
penalty chosen on every tenth of them; the drop is what other sets lose against the first, in
points (ImageNet-9: Original, Mixed-Same, Mixed-Rand, arXiv 2006.09994). Images that show one
foreground are resampled together.
"""


def pair_key(file_name):
  """What names the foreground of an image: its file's stem or, as in ImageNet-9, a part of it.

  There n02085620_16757.JPEG has its foreground in fg_n02085620_16757_bg_n01532829_06835.JPEG.
  """
  stem = os.path.splitext(os.path.basename(file_name))[0]
  match = re.fullmatch(r"fg_(.+)_bg_.+", stem)
  return match[1] if match else stem


def pairs(first, other, label):
  """For each record of `first` the place of its partner in `other`; None if not all have one.

  Partners have one label and one pair_key, which no third record may have.
  """
  if not all("file_name" in record for record in (*first, *other)):
    return None
  a, b = ([(r[label], pair_key(r["file_name"])) for r in records] for records in (first, other))
  places = {key: i for i, key in enumerate(b)}
  if not len(places) == len(set(a)) == len(a) == len(b) or set(a) != set(places):
    return None
  return np.array([places[key] for key in a])


def drops(first, other, order):
  """By how many points fewer of `other` are right, with the ends of its 95% interval.

  first (N, R), other (M, R) bool; order: `first`'s partners in `other`, which are resampled
  together, or None: each image by itself. -> (R,) each.
  """
  drop = 100 * (first.mean(axis=0) - other.mean(axis=0))
  if order is not None:
    gap = first.astype(float) - other[order]
    return drop, *common.bootstrap([gap], lambda total: 100 * total / len(gap))
  columns = [np.concatenate([first, 0 * other]), np.concatenate([0 * first, other])]
  columns.append(np.repeat([[1, 0], [0, 1]], (len(first), len(other)), axis=0))
  difference = lambda a, b, counts: 100 * (a / counts[0] - b / counts[1])
  return drop, *common.bootstrap(columns, difference)


def run(
  encode, variables, mesh, *, source, path, splits, label, train_split, train_path, l2, classes,
  templates,
):  # fmt: skip
  """Top-1 on every split, and in points what all but the first lose against the first.

  Keys "SPLIT/WHAT/top1" and "SPLIT/WHAT/drop_points", where WHAT is a feature whose linear probe
  was fitted on `train_split` of `train_path` ("" for `path`), or, if there are `templates`, a
  reading of zero-shot classification; `classes` and `templates` as in zeroshot.run.

  Raises:
    ValueError: the splits' classes have other names, or as zeroshot.run.
  """
  where = {split: (source, path, split) for split in splits}
  where[""] = (source, train_path or path, train_split)
  features = {s: encode.features(variables, *at) for s, at in where.items()}
  data = {s: encode.split(*at) for s, at in where.items()}
  y = {s: common.labels(split, label) for s, split in data.items()}
  if all("class_name" in record for split in data.values() for record in split.records):
    zeroshot.own_names([r for split in data.values() for r in split.records], label)  # one for all
  hits = {s: {} for s in splits}
  for name in probes.FEATURES:
    x = {s: features[s][name] for s in y}
    right = probes.fit_and_score(x, y, train="", select="", penalties=tuple(l2), mesh=mesh)
    for s in splits:
      hits[s][name] = right[s]
  if templates:
    names = zeroshot.names_of(encode, source, path, splits, label, classes)
    groups = np.unique(names, return_inverse=True)[1]
    texts = zeroshot.class_embeddings(encode, variables, names, zeroshot.load_templates(templates))
    for s in splits:
      for reading in encode.readings:
        hits[s][reading] = zeroshot.classify(features[s], texts, y[s], groups, reading)[0] < 1
  return _result(splits, data, y, hits, label)


def _result(splits, data, y, hits, label):
  names = list(hits[splits[0]])
  table = {s: np.stack([hits[s][name] for name in names], axis=1) for s in splits}
  figures, rows, paired = {}, {name: [name] for name in names}, []
  for s in splits:
    figures |= common.means({f"{s}/{name}/top1": hits[s][name] for name in names})
    for name in names:
      figures[f"{s}/{name}/top1@majority"] = np.bincount(y[s]).max() / len(y[s])
      rows[name].append(float(hits[s][name].mean()))
  for s in splits[1:]:
    order = pairs(data[splits[0]].records, data[s].records, label)
    paired += [s] if order is not None else []
    for name, *found in zip(names, *drops(table[splits[0]], table[s], order), strict=True):
      key = f"{s}/{name}/drop_points"
      figures |= dict(zip((key, f"{key}@low", f"{key}@high"), found, strict=True))
      rows[name].append("{:.1f} ({:.1f} - {:.1f})".format(*found))
  sizes = {s or "train": {"images": len(split), "left_out": len(split.left_out)}
           for s, split in data.items()}  # fmt: skip
  sizes["paired"] = paired
  columns = ["", *(f"{s}, top-1" for s in splits), *(f"drop on {s}, points" for s in splits[1:])]
  hint = (
    f"How much of the accuracy on {splits[0]} is lost, with 95% intervals. cls, pooled: linear "
    "probes; the others: readings of zero-shot classification."
  )
  detail = {"kind": "table", "title": f"What other images than {splits[0]} cost", "hint": hint,
            "columns": columns, "rows": list(rows.values())}  # fmt: skip
  return common.result(figures, protocol=PROTOCOL, sizes=sizes, details=[detail])
