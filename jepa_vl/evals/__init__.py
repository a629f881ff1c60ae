"""Evaluations by name: run(encode, variables, mesh, **cfg) -> common.result(...).

`config.evals` maps names to the keyword arguments of an evaluation's `run`. A name is one of EVALS,
or any other with `evaluation` naming it, so that one evaluation can run on several sets; `when` is
"always" (the default: on the schedule and at the end) or "end". Every evaluation has
`source` (a name of jepa_vl.data.sources.SOURCES), `path` and `splits`, a tuple of names; in the
path "{split}" stands for the name. Records are read as `data.image_key`, `caption_key`,
`image_root` and `index_dir` say, as in training. Keys that end in `_split` name further splits (of
a path and source of their own, where the same key with `_path` or `_source` is not ""), "" for
none, and `label` is the field of the records that holds a class, counted from 0. Of a result's
figures, a key may come with floors and the ends of a 95% interval: the same key followed by
"@random", "@low" and so on (common.FLOORS, common.INTERVAL).
"""

import inspect
import json
import logging
import math
import os

import numpy as np

from jepa_vl.data import embedded
from jepa_vl.evals import (
  clusters,
  common,
  compositional,
  dense,
  depth,
  head_probe,
  knn,
  probes,
  rank,
  retrieval,
  robustness,
  segmentation,
  vlm,
  zeroshot,
)

log = logging.getLogger(__name__)

EVALS = {
  "retrieval": retrieval.run,
  "zeroshot": zeroshot.run,
  "probe": probes.run,
  "head_probe": head_probe.run,
  "knn": knn.run,
  "rank": rank.run,
  "compositional": compositional.run,
  "robustness": robustness.run,
  "segmentation": segmentation.run,
  "clusters": clusters.run,
  "depth": depth.run,
  "vlm": vlm.run,
}

# What raises ValueError or OSError for keys that an evaluation would stop at: (encode, keys).
CHECKS = {
  "probe": probes.check,
  "head_probe": head_probe.check,
  "knn": knn.check,
  "segmentation": dense.check,
  "clusters": dense.check,
  "depth": depth.check,
  "vlm": vlm.check,
}


WHEN = ("always", "end")


def _of(name, keys):
  """The evaluation's function and its keyword arguments."""
  keys = dict(keys)
  evaluation = keys.pop("evaluation", name)
  when = keys.pop("when", "always")
  if evaluation not in EVALS:
    known = ", ".join(EVALS)
    raise ValueError(
      f"evals.{name}: no such evaluation; known are {known}; a name of your own needs "
      f"evals.{name}.evaluation, one of these"
    )
  if when not in WHEN:
    raise ValueError(f"evals.{name}.when must be one of {', '.join(WHEN)}, got {when!r}")
  return EVALS[evaluation], keys


def check(cfg):
  """Raises ValueError if the config's `evals` sub-tree names what no evaluation takes."""
  for name in cfg:
    run, keys = _of(name, cfg[name])
    _, _, _, *takes = inspect.signature(run).parameters.values()
    module = run.__module__.replace(".", "/") + ".py"
    missing = [p.name for p in takes if p.default is p.empty and p.name not in keys]
    unknown = sorted(keys.keys() - {p.name for p in takes})
    for which, names in (("lacks", missing), ("does not take", unknown)):
      if names:
        raise ValueError(f"evals.{name} {which} {', '.join(names)}; {module} says what they are")


def prepare(encode, cfg):
  """Opens all splits and reads small ones, so that what is amiss is said at the start.

  Raises:
    ValueError: a split cannot be read, is the same as another of its evaluation, or has a record
      without a class in `label`; or keys that the evaluation would stop at.
  """
  for name, keys in cfg.items():
    if isinstance(keys.splits, str):
      raise ValueError(f"evals.{name}.splits must be a tuple of names, got {keys.splits!r}")
    try:
      classes = _count_classes(keys)
    except (ValueError, OSError) as e:
      raise ValueError(f"evals.{name}: {e}") from e
    seen = {}
    for source, path, split in _places(keys):
      try:
        data = encode.source(source, path, split)
        if encode.is_small(data):
          encode.split(source, path, split)
      except (ValueError, OSError) as e:
        raise ValueError(f"evals.{name}, split {split!r}: {e}") from e
      first = seen.setdefault(data.identity, split)
      if first != split:
        raise ValueError(
          f"evals.{name}: the splits {first!r} and {split!r} are the same records; where a path "
          'holds several splits, write "{split}" in it in place of their names'
        )
      if "label" in keys and encode.is_small(data):
        records = encode.split(source, path, split).records
        _check_labels(name, keys, split, records, classes)
    _check_keys(encode, name, keys)


def _check_keys(encode, name, keys):
  check_keys = CHECKS.get(keys.get("evaluation", name))
  try:
    if check_keys:
      check_keys(encode, keys)
  except (ValueError, OSError) as e:
    raise ValueError(f"evals.{name}: {e}") from e


def _places(keys):
  """(source, path, split) of all splits that an evaluation reads."""
  for split in keys.splits:
    yield keys.source, keys.path, split
  for key in keys:
    if key.endswith("_split") and keys[key]:
      own = lambda what, key=key: keys.get(key.removesuffix("split") + what) or keys[what]
      yield own("source"), own("path"), keys[key]


def _count_classes(keys):
  """How many classes are named; infinite where they are as many as there are."""
  if keys.get("templates"):
    zeroshot.load_templates(keys.templates)
  return len(zeroshot.load_names(keys.get("classes") or ())) or math.inf


def _check_labels(name, keys, split, records, classes):
  below = f" and below {classes}" if classes < math.inf else ""
  for record in records:
    label = record.get(keys.label)
    if type(label) is not int or not 0 <= label < classes:
      raise ValueError(
        f"evals.{name}.label={keys.label!r} must be a class counted from 0{below}; in "
        f"split {split!r} a record has {label!r}, and its fields are {', '.join(record)}"
      )


def run_all(encode, variables, mesh, cfg, at_end=True):
  """The evaluations of `config.evals` -> {name: common.result}; those for the end only then."""
  results = {}
  for name in cfg:
    if at_end or cfg[name].get("when", "always") == "always":
      run, keys = _of(name, cfg[name])
      try:
        results[name] = run(encode, variables, mesh, **keys)
      except Exception:
        log.error("evals.%s failed; found before it, of these weights: %s", name, _listed(results))
        raise
  return results


def _listed(results):
  return ", ".join(
    f"{name} {key} {value:.4f}"
    for name, values in figures(results).items()
    for key, value in values.items()
    if not common.is_beside(key)
  ) or "nothing"  # fmt: skip


def figures(results):
  """{name: {key: float}} of what run_all returns."""
  return {name: result["figures"] for name, result in results.items()}


def table(trained, untrained):
  """Rows that hold each figure beside its floors, from two results of `run_all`.

  Returns dicts with evaluation, split, metric, value, low, high (of its 95% interval), untrained,
  and common.FLOORS; what an evaluation does not have is None.
  """
  rows = []
  for name, values in figures(trained).items():
    for key, value in values.items():
      if common.is_beside(key):
        continue
      split, metric = key.split("/", 1)
      row = {"evaluation": name, "split": split, "metric": metric, "value": value}
      row["untrained"] = untrained[name]["figures"].get(key)
      row |= {what: values.get(f"{key}@{what}") for what in common.INTERVAL + common.FLOORS}
      rows.append(row)
  return rows


def format_table(rows):
  """The headline rows as text: figure, its 95% interval, the untrained network's, its floors."""
  lines = ["", f"{'':48s}{'value':>8s}{'95% interval':>17s}{'untrained':>11s}   floors"]
  reading = common.headline_reading(row["metric"] for row in rows)
  number = lambda v: "-" if v is None else f"{v:.3f}"
  for row in rows:
    if not common.is_headline(row["metric"], reading):
      continue
    low, high = row.get("low"), row.get("high")
    interval = "-" if low is None else f"{low:.3f} - {high:.3f}"
    floors = ", ".join(
      f"{floor.replace('_', ' ')} {row[floor]:.3f}"
      for floor in common.FLOORS
      if row.get(floor) is not None
    )
    name = f"{row['evaluation']} {row['split']} {row['metric']}"
    lines.append(
      f"{name:48s}{number(row['value']):>8s}{interval:>17s}{number(row['untrained']):>11s}"
      f"   {floors or '-'}"
    )
  return "\n".join(lines)


def write(folder, results, rows, *, step, seed, config):
  """results.json: the table, and of each evaluation its keys, protocol, sizes and seeds."""
  about = {
    name: {"keys": config["evals"][name], **{k: result[k] for k in ("protocol", "sizes")}}
    for name, result in results.items()
  }
  with open(os.path.join(folder, "results.json"), "w") as f:
    json.dump({"step": step, "seed": seed, "evaluations": about, "rows": rows}, f, indent=1)


def pictures(encode, variables, cfg):
  """What the report draws, from the last split of the `retrieval` evaluation: see report.write."""
  # The report's own; what an evaluation draws comes with its result.
  if "retrieval" not in cfg:
    return {"embeddings": None, "retrieval": None, "patches": None, "notes": {}}
  source, path, split = cfg.retrieval.source, cfg.retrieval.path, cfg.retrieval.splits[-1]
  data = encode.split(source, path, split)
  features = encode.features(variables, source, path, split)
  images = data.images(np.arange(0, len(data), max(len(data) // 12, 1))[:12])
  blocks, attention = encode.depths(variables, images)
  shown = np.arange(min(len(data), 2000))  # a page holds few queries, and memory few similarities
  return {
    "embeddings": {"image": features["z_img"], "text": features["z_txt"]},
    "retrieval": {  # fmt: skip
      "split": split,
      "images": data.images(shown),
      "captions": data.captions,
      "similarity": common.similarity(
        {k: v[shown] for k, v in features.items() if k in ("z_img", "p_img")},
        features, encode.readings[-1],
      ),
      "relevant": data.relevant[shown].toarray(),
    },
    "notes": {s: embedded.SPLITS[s] for s in cfg.retrieval.splits if source == "emoji"},
    "patches": {"images": images, "blocks": blocks, "attention": attention},
  }
