"""Evaluations by name: run(encode, variables, mesh, **cfg) -> {key: float}.

`config.evals` maps a name of EVALS to the keyword arguments of its `run`. Every evaluation has
`source` (a name of jepa_vl.data.sources.SOURCES), `path` and `splits`, a tuple of names; in the
path "{split}" stands for the name. Records are read as `data.image_key`, `caption_key`,
`image_root` and `index_dir` say, as in training. Keys that end in `_split` name further splits, and
`label` is the field of the records that holds a class, counted from 0. Of what `run` returns, a key
may come with floors: the same key followed by "@random", "@majority" or "@raw_pixels".
"""

import inspect
import math

import numpy as np

from jepa_vl import metrics
from jepa_vl.data import embedded
from jepa_vl.evals import common, probes, rank, retrieval, zeroshot

EVALS = {
  "retrieval": retrieval.run,
  "zeroshot": zeroshot.run,
  "probe": probes.run,
  "rank": rank.run,
}


def check(cfg):
  """Raises ValueError if the config's `evals` sub-tree names what no evaluation takes."""
  for name in cfg:
    if name not in EVALS:
      raise ValueError(f"evals.{name}: no such evaluation; known are {', '.join(EVALS)}")
    try:
      inspect.signature(EVALS[name]).bind(None, None, None, **cfg[name])
    except TypeError as e:
      raise ValueError(f"evals.{name}: {e}; see jepa_vl/evals for its keys") from e


def prepare(encode, cfg):
  """Reads all splits that the config names, so that what is amiss is said at the start.

  Raises:
    ValueError: a split cannot be read, is the same as another of its evaluation, or has a record
      without a class in `label`.
  """
  for name, keys in cfg.items():
    if isinstance(keys.splits, str):
      raise ValueError(f"evals.{name}.splits must be a tuple of names, got {keys.splits!r}")
    seen = {}
    for split in (*keys.splits, *(keys[k] for k in keys if k.endswith("_split"))):
      try:
        data = encode.split(keys.source, keys.path, split)
      except (ValueError, OSError) as e:
        raise ValueError(f"evals.{name}, split {split!r}: {e}") from e
      first = seen.setdefault(data.identity, split)
      if first != split:
        raise ValueError(
          f"evals.{name}: the splits {first!r} and {split!r} are the same records; where a path "
          'holds several splits, write "{split}" in it in place of their names'
        )
      if "label" in keys:
        _check_labels(name, keys, split, data.records)


def _check_labels(name, keys, split, records):
  classes = len(keys.get("classes", ())) or math.inf  # a probe takes as many as there are
  below = f" and below {classes}" if classes < math.inf else ""
  for record in records:
    label = record.get(keys.label)
    if type(label) is not int or not 0 <= label < classes:
      raise ValueError(
        f"evals.{name}.label={keys.label!r} must be a class counted from 0{below}; in "
        f"split {split!r} a record has {label!r}, and its fields are {', '.join(record)}"
      )


def run_all(encode, variables, mesh, cfg):
  """Runs the evaluations of `config.evals` -> {name: metrics}."""
  return {name: EVALS[name](encode, variables, mesh, **cfg[name]) for name in cfg}


def table(trained, untrained):
  """Rows that hold each figure beside its floors, from two results of `run_all`.

  Returns dicts with evaluation, split, metric, value, untrained, random, majority, raw_pixels;
  a floor that an evaluation does not have is None.
  """
  rows = []
  for name, figures in trained.items():
    for key, value in figures.items():
      if common.is_floor(key):
        continue
      split, metric = key.split("/", 1)
      row = {"evaluation": name, "split": split, "metric": metric, "value": value}
      row["untrained"] = untrained[name][key]
      row |= {floor: figures.get(f"{key}@{floor}") for floor in common.FLOORS}
      rows.append(row)
  return rows


def format_table(rows):
  """The headline rows as text: figure, then its floors."""
  columns = ("value", "untrained", *common.FLOORS)
  lines = ["", f"{'':44s}" + "".join(f"{c.replace('_', ' '):>12s}" for c in columns)]
  reading = common.headline_reading(row["metric"] for row in rows)
  for row in rows:
    if not common.is_headline(row["metric"], reading):
      continue
    cells = "".join(f"{'-' if row[c] is None else format(row[c], '.3f'):>12s}" for c in columns)
    lines.append(f"{row['evaluation'] + ' ' + row['split'] + ' ' + row['metric']:44s}{cells}")
  return "\n".join(lines)


def pictures(encode, variables, cfg):
  """What the report draws, from the last split of the `retrieval` evaluation: see report.write."""
  if "retrieval" not in cfg:
    return {"spectra": None, "retrieval": None, "patches": None, "notes": {}}
  source, path, split = cfg.retrieval.source, cfg.retrieval.path, cfg.retrieval.splits[-1]
  data = encode.split(source, path, split)
  features = encode.features(variables, source, path, split)
  images = data.images[:: max(len(data.images) // 12, 1)][:12]
  return {
    "spectra": {
      "image": np.asarray(metrics.singular_values(features["z_img"])),
      "text": np.asarray(metrics.singular_values(features["z_txt"])),
    },
    "retrieval": {
      "split": split,
      "images": data.images,
      "captions": data.captions,
      "similarity": common.similarity(features, features, encode.readings[-1]),
      "relevant": data.relevant,
    },
    "notes": {s: embedded.SPLITS[s] for s in cfg.retrieval.splits if source == "emoji"},
    "patches": {"images": images, "features": encode.patches(variables, images)},
  }
