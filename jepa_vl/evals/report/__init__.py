"""One self-contained HTML page about what a run learned: figures, curves, spectra and examples."""

import json
import math
import os

import numpy as np

from jepa_vl.evals import common
from jepa_vl.evals.report import details, pictures
from jepa_vl.evals.report.markup import escape, figure, interval, number, page
from jepa_vl.metrics import read_jsonl

FLOORS = ("untrained", *common.FLOORS)

# part of the config -> the keys that stand above the whole of it
MAIN_KEYS = {
  "data": ("source",),
  "objective": ("name", "align", "lambda_img", "lambda_txt"),
  "model": ("size", "image_size", "patch_size", "embed_dim"),
  "text": ("tokenizer",),
  "optim": ("lr",),
  None: ("steps", "batch_size", "seed"),
}

BOTH = {"img_to_txt": "image → text", "txt_to_img": "text → image"}
# title, whether a wide range gets a log axis, what to look for, {metric: label}; "rolled" is dashed
PANELS = (
  ("Loss", True, "The weighted sum of the objective's terms.", {"loss": None}),
  (
    "Contrastive loss",
    True,
    "CLIP: cross-entropy over the batch, either way. SigLIP: over all pairs, per image.",
    {f"contrast/{key}": label for key, label in BOTH.items()} | {"sigmoid": "all pairs"},
  ),
  (
    "Scale and bias of the logits",
    False,
    "Learned; the scale as its logarithm.",
    {"log_scale": "log scale", "bias": "bias"},
  ),
  (
    "Prediction error",
    True,
    "Each modality predicts the other's embedding; lower is better.",
    {f"align/{key}": label for key, label in BOTH.items()},
  ),
  (
    "SIGReg",
    True,
    "Distance of the embeddings from an isotropic Gaussian; lower is better.",
    {"sigreg/img": "image", "sigreg/txt": "text"},
  ),
  ("Distance between views", True, "Of each view to the mean of the global ones.", {"multi": None}),
  (
    "Cosines",
    False,
    "Solid: matched pairs; dashed: mismatched pairs. The gap between them is what was learned; "
    "high cosines without a gap are collapse.",
    {"cos/matched": "embeddings", "cos/rolled": None}
    | {
      f"cos/{key}{end}": BOTH[key] if not end else None for key in BOTH for end in ("", "_rolled")
    },
  ),
  (
    "Effective rank of a batch",
    False,
    "Directions in use, at most the embedding dimension; a fall towards 1 is collapse.",
    {"rank/img": "image", "rank/txt": "text"},
  ),
  (
    "Contrastive logits",
    False,
    "At temperature 0.07, on which no objective trains. The gap is minus the batch's InfoNCE and "
    "rises towards 0 as pairs match.",
    {"logit/positive": "positive", "logit/logsumexp": "log-sum-exp", "logit/gap": "gap"},
  ),
  (
    "Online probe",
    False,
    "Share of a batch's labels that a linear layer on the CLS feature gets right before it learns "
    "from them.",
    {"probe/top1": None},
  ),
  ("Gradient norm", True, "Before clipping.", {"grad_norm": None}),
  ("Learning rate", False, "", {"lr": None}),
  ("Examples per second", False, "", {"examples_per_s": None}),
  (
    "Use of the hardware",
    False,
    "Shares of 1; MFU is absent where the device's peak is not known.",
    {"mfu": "MFU", "data_wait": "time spent waiting for data"},
  ),
)

PICTURES = "pictures.html"  # of a run's folder: the sections that need the network, for later pages


def write(workdir, *, config, results, embeddings, retrieval, patches, notes, drawn):
  """Writes workdir/report.html and returns its path; its pictures also to workdir/pictures.html.

  config: nested dict; results: rows of `evals.table`; embeddings: {name: (N, D)};
  retrieval: dict of split, images (N, S, S, 3) uint8, captions (C), similarity and relevant (N, C);
  patches: dict of images (n, S, S, 3) uint8, blocks {depth: (n, h, w, W) features} and attention
  (n, h, w); notes: {split: one line}. embeddings, retrieval and patches may be None, which leaves
  their section out; drawn: the details of evaluations (common.result).
  """
  metrics = read_jsonl(os.path.join(workdir, "metrics.jsonl"))
  evals = read_jsonl(os.path.join(workdir, "evals.jsonl"))
  sections = [_overview(config, metrics), _results(results, notes), _training(metrics)]
  sections.append(_progress(evals))
  drawings = []
  if embeddings is not None:
    drawings.append(pictures.embeddings(embeddings))
  if retrieval is not None:
    drawings.append(pictures.retrieval(**retrieval))
  if patches is not None:
    drawings.append(pictures.patches(**patches))
  drawings.append(details.section(drawn))
  path = os.path.join(workdir, "report.html")
  whole = page("What this run learned", sections + drawings)
  for name, text in ((path, whole), (os.path.join(workdir, PICTURES), "\n".join(drawings))):
    with open(name, "w", encoding="utf-8", errors="replace") as f:  # for lone surrogates
      f.write(text)
  return path


def _overview(config, metrics):
  facts = {}
  if metrics:
    last = metrics[-1]
    facts["last logged step"] = last["step"]
    # Of predictions, if there are any: then nothing makes the embeddings themselves alike.
    predicted = "cos/img_to_txt" in last
    matched, rolled = ("img_to_txt", "img_to_txt_rolled") if predicted else ("matched", "rolled")
    names = {"loss": "loss", f"cos/{matched}": "cosine, matched"}
    names |= {f"cos/{rolled}": "cosine, mismatched"}
    names |= {"rank/img": "effective rank, image", "rank/txt": "effective rank, text"}
    names |= {"examples_per_s": "examples/s"}
    facts |= {label: number(last[key]) for key, label in names.items() if key in last}
  settings = {}
  for part, keys in MAIN_KEYS.items():
    tree = config.get(part, {}) if part else config
    if part == "objective" and not tree.get("name", "").startswith("levljepa"):
      keys = ("name",)
    settings |= {f"{part}.{k}" if part else k: tree[k] for k in keys if k in tree}
  pretty = json.dumps(config, indent=2, default=str, ensure_ascii=False)
  return (
    f"{_facts(facts)}<h2>Configuration</h2>{_facts(settings)}"
    f"<details><summary>All of it</summary><pre>{escape(pretty)}</pre></details>"
  )


def _facts(values):
  items = (f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in values.items())
  return f'<dl class="facts">{"".join(items)}</dl>' if values else ""


def _results(rows, notes):
  reading = common.headline_reading(r["metric"] for r in rows)
  head = [r for r in rows if common.is_headline(r["metric"], reading)]
  won = [_beats_floors(r) for r in head]
  won = [w for w in won if w is not None]
  text = "No evaluation has been run."
  if rows:
    text = (
      f"<b>{sum(won)} of {len(won)}</b> headline figures beat every floor beside them: those are "
      "bold, the others grey. This is no test of significance; on a small split a small difference "
      "may be noise."
    )
  lines = (f"<li><b>{escape(k)}</b>: {escape(v)}" for k, v in notes.items())
  legend = (
    '<p class="quiet">i2t: an image finds its caption, t2i: a caption finds its images. R@k: share '
    "of queries with a right answer among the first k. avg: mean of the cosines of either "
    "prediction with its target; embed: cosine of the embeddings. untrained: the same network "
    "with random weights. rank: effective rank of the embeddings, higher is more isotropic.</p>"
  )
  details = f"<details><summary>All {len(rows)} figures</summary>{_tables(rows)}</details>"
  return (
    f"<h2>Results</h2><p>{text}</p>"
    + (f"<ul>{''.join(lines)}</ul>" if notes else "")
    + (f"{legend}{_tables(head)}{details}" if rows else "")
  )


def _beats_floors(row):
  """Whether the value is better than all the floors that the row has; None if it has none."""
  floors = [row[f] for f in FLOORS if row.get(f) is not None]
  sign = -1 if common.lower_is_better(row["metric"]) else 1
  return all(sign * row["value"] > sign * f for f in floors) if floors else None


def _tables(rows):
  evaluations = {}
  for r in rows:
    evaluations.setdefault(r["evaluation"], {}).setdefault(r["split"], []).append(r)
  parts = (
    f'<div class="scroll"><h3>{escape(name)}</h3>{_table(splits)}</div>'
    for name, splits in evaluations.items()
  )
  return f'<div class="tables">{"".join(parts)}</div>'


def _table(splits):
  rows = [r for part in splits.values() for r in part]
  floors = [f for f in FLOORS if any(r.get(f) is not None for r in rows)]
  columns = "".join(f"<th>{f.replace('_', ' ')}</th>" for f in floors)
  out = [f"<table><thead><tr><th><th>value</th><th>95% interval</th>{columns}</tr></thead>"]
  for split, part in splits.items():
    out.append(f'<tbody><tr><th class="split" colspan="{3 + len(floors)}">{escape(split)}</th>')
    for r in part:
      mark = {True: "above", False: "below", None: ""}[_beats_floors(r)]
      cells = "".join(f"<td>{number(r.get(f))}</td>" for f in floors)
      name = f"<td>{escape(r['metric'])}</td>"
      value = f'<td class="value">{number(r["value"])}</td><td>{interval(r)}</td>'
      out.append(f'<tr class="{mark}">{name}{value}{cells}')
    out.append("</tbody>")
  return "".join(out) + "</table>"


def _training(records):
  if len(records) < 2:
    return f"<h2>Training</h2><p>Too few logged steps for curves ({len(records)}).</p>"
  steps = [r["step"] for r in records]
  figures = []
  for title, log, hint, keys in PANELS:
    lines = []
    colour = -1
    for key, label in keys.items():
      colour += "rolled" not in key  # a dashed line has the colour of its solid one
      values = np.array([r.get(key) for r in records], float)  # null becomes NaN
      if np.isfinite(values).any():
        style = {"color": f"C{colour}", "ls": "--" if "rolled" in key else "-"}
        lines.append((label, steps, values, style))
    if lines:
      values = np.concatenate([y for _, _, y, _ in lines])
      log = log and np.nanmax(values) > 10 * np.nanmin(values) > 0
      figures.append(figure(title, lines, hint, log=log))
  return f'<h2>Training</h2><div class="grid">{"".join(figures)}</div>'


def _progress(records):
  """Headline evaluations over the steps, a panel per metric and a line per split."""
  panels, steps = {}, {r["step"] for r in records}
  reading = common.headline_reading(k for r in records for k in r["metrics"])
  for r in records:
    figures = {k: v for k, v in r["metrics"].items() if not common.is_beside(k)}
    most = max((int(k.partition("R@")[2]) for k in figures if "R@" in k), default=None)
    for key, value in figures.items():
      split, _, metric = key.partition("/")
      largest = "R@" not in metric or metric.endswith(f"R@{most}")
      if not common.is_headline(metric, reading) or not largest:
        continue
      floors = [v for k, v in r["metrics"].items() if k.startswith(f"{key}@") and v is not None]
      line = panels.setdefault(f"{r['name']}: {metric}", {}).setdefault(split, [])
      line.append((r["step"], value, max(floors, default=math.nan)))
  if len(steps) < 2:
    text = "Too few evaluations during training for curves"
    return f"<h2>Evaluations over training</h2><p>{text} ({len(steps)}).</p>"
  figures = []
  for title, splits in panels.items():
    lines = []
    for i, (split, points) in enumerate(splits.items()):
      x, value, floor = np.array(points, float).T
      lines.append((split, x, value, {"color": f"C{i}", "marker": "o", "ms": 3}))
      if np.isfinite(floor).any():
        lines.append((None, x, floor, {"color": f"C{i}", "ls": ":"}))
    figures.append(figure(title, lines))
  return (
    "<h2>Evaluations over training</h2><p>One line per split; dotted: its highest floor other than "
    f'the untrained network.</p><div class="grid">{"".join(figures)}</div>'
  )
