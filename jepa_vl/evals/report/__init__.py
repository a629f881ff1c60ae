"""One self-contained HTML page about what a run learned: figures, curves, spectra and examples."""

import base64
import html
import io
import json
import math
import os

import numpy as np

from jepa_vl.evals import common
from jepa_vl.evals.report import details
from jepa_vl.metrics import rank_of_spectrum, read_jsonl, singular_values

QUERIES, TOP_CAPTIONS, TOP_IMAGES = 8, 5, 8
THUMBNAIL = 96  # pixels; a page of full-size images would be tens of megabytes
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

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto;
  max-width: 1180px; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; margin: .5rem 0; } h2 { border-bottom: 1px solid #ddd; margin-top: 2.5rem; }
h3 { margin: 1.5rem 0 .5rem; } p { max-width: 48rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr));
  gap: 1.2rem; align-items: start; }
dl.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(148px, 1fr));
  gap: .6rem; }
dl.facts div { background: #f5f6f8; border-radius: 6px; padding: .4rem .6rem; }
dt { color: #666; font-size: .75rem; } dd { margin: 0; font-variant-numeric: tabular-nums; }
figure { margin: 0; } figure > img { width: 100%; height: auto; }
figcaption, .quiet, tr.below td { color: #777; } figcaption, .quiet { font-size: .85rem; }
.tables { display: flex; flex-wrap: wrap; gap: 0 2.2rem; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .45rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 1px solid #999; }
th.split { padding-top: .7rem; } tr.above td.value { font-weight: bold; color: #111; }
details { margin: 1rem 0; } summary { cursor: pointer; } pre { font-size: .8rem; overflow-x: auto; }
.query { display: flex; gap: .8rem; } .query ol { margin: 0; padding-left: 1.4rem; }
.query > img { width: 96px; height: 96px; }
li.hit { color: #0a7a2f; font-weight: bold; }
.strip { display: flex; flex-wrap: wrap; gap: 4px; margin: .2rem 0 1rem; }
.strip img { width: 72px; height: 72px; border: 4px solid transparent; border-radius: 4px; }
.strip img.hit { border-color: #12a046; }
.three { display: flex; gap: 3px; } .three img { width: 33%; height: auto; }
.depths { display: grid; grid-template-columns: repeat(6, minmax(0, 96px)); gap: 4px;
  margin-bottom: 4px; }
.depths figcaption { font-size: .7rem; line-height: 1.2; }
"""


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
  pictures = []
  if embeddings is not None:
    pictures.append(_embeddings(embeddings))
  if retrieval is not None:
    pictures.append(_retrieval(**retrieval))
  if patches is not None:
    pictures.append(_patches(**patches))
  pictures.append(details.section(drawn))
  path = os.path.join(workdir, "report.html")
  whole = page("What this run learned", sections + pictures)
  for name, text in ((path, whole), (os.path.join(workdir, PICTURES), "\n".join(pictures))):
    with open(name, "w", encoding="utf-8", errors="replace") as f:  # for lone surrogates
      f.write(text)
  return path


def page(title, sections):
  """A whole page of HTML sections, which needs nothing but itself."""
  return (
    '<!doctype html><html lang="en"><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f"<title>Run report</title><style>{STYLE}</style>\n<h1>{escape(title)}</h1>\n"
    + "\n".join(sections)
    + "\n</html>\n"
  )


def _overview(config, metrics):
  facts = {}
  if metrics:
    last = metrics[-1]
    facts["last logged step"] = last["step"]
    names = {"loss": "loss", "cos/matched": "cosine, matched", "cos/rolled": "cosine, mismatched"}
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


def _embeddings(embeddings):
  """{name: (N, D)}: their spectra, and how Gaussian they are along random directions."""
  lines, longest, curves = [], 1, []
  edges = np.linspace(-4, 4, 65)
  middle = (edges[1:] + edges[:-1]) / 2
  for i, (name, z) in enumerate(embeddings.items()):
    z = np.asarray(z, np.float32)
    directions = common.unit(np.random.default_rng(0).normal(size=(64, z.shape[1])))
    counts, _ = np.histogram(np.nan_to_num(z @ directions.T), edges)
    density = counts / (len(z) * len(directions) * (edges[1] - edges[0]))
    curves.append((name, middle, density, {"color": f"C{i}"}))
    s = np.asarray(singular_values(z), float)
    label = f"{name}: effective rank {float(rank_of_spectrum(s)):.1f} of {len(s)}"
    normalised = np.maximum(s / max(s[0], 1e-12), 1e-4)  # zeros have no place on a log axis
    lines.append((label, np.arange(1, len(s) + 1), normalised, {"color": f"C{i}"}))
    longest = max(longest, len(s))
  lines.append(("isotropic ideal", [1, longest], [1, 1], {"color": "0.4", "ls": "--"}))
  hint = "Each singular value over the largest. Directions after a cliff are unused."
  spectrum = figure("Singular values of the centred embeddings", lines, hint, "index", log=True)
  ideal = np.exp(-(middle**2) / 2) / (2 * np.pi) ** 0.5
  curves.append(("standard normal", middle, ideal, {"color": "0.4", "ls": "--"}))
  hint = (
    "Density of the embeddings along 64 random directions: what SIGReg pulls to the dashed line. "
    "The contrastive baselines ask for no such thing."
  )
  gaussian = figure("Along random directions", curves, hint, "projection")
  return f'<h2>Embeddings</h2><div class="grid">{spectrum}{gaussian}</div>'


def figure(title, lines, hint="", xlabel="step", log=False):
  """An HTML figure of lines (label, x, y, style); a label of None stays out of the legend."""
  from matplotlib.figure import Figure  # late: slow to import; without pyplot it is always Agg
  from matplotlib.ticker import LogLocator

  fig = Figure(figsize=(4.6, 3.4), layout="constrained")
  ax = fig.add_subplot()
  for label, x, y, style in lines:
    ax.plot(x, y, label=label, lw=1.2, **style)
  if log:
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, high / 10), high)  # a decade at least, so that some ticks have labels
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    ax.yaxis.set_minor_formatter("{x:g}" if high < 1e3 * low else "")
  ax.set_title(title)
  ax.set_xlabel(xlabel)
  ax.grid(alpha=0.3)
  ax.spines[["top", "right"]].set_visible(False)
  if any(label for label, *_ in lines):
    columns = 1 if max(len(str(label)) for label, *_ in lines) > 20 else 3
    fig.legend(loc="outside lower center", ncols=columns, frameon=False)
  buffer = io.BytesIO()
  fig.savefig(buffer, format="png", dpi=130)
  image = _img(buffer.getvalue(), title)
  return f"<figure>{image}<figcaption>{escape(hint)}</figcaption></figure>"


def _retrieval(split, images, captions, similarity, relevant):
  similarity, relevant = np.asarray(similarity), np.asarray(relevant, bool)
  by_image = _queries(similarity, relevant, TOP_CAPTIONS)
  by_caption = _queries(similarity.T, relevant.T, TOP_IMAGES)
  cards, strips = [], []
  for i, order, rank in by_image:
    items = (
      f'<li class="hit">{escape(captions[c])} ✓</li>'
      if relevant[i, c]
      else f"<li>{escape(captions[c])}</li>"
      for c in order
    )
    right = "; ".join(escape(captions[c]) for c in np.flatnonzero(relevant[i]))
    note = f'<p class="quiet">rank {rank} of {len(captions)}: {right}</p>'
    cards.append(
      f'<div class="query">{_thumbnail(images[i], "query")}<div><ol>{"".join(items)}</ol>'
      f"{note}</div></div>"
    )
  for c, order, rank in by_caption:
    found = "".join(
      _thumbnail(images[i], "right", "hit") if relevant[i, c] else _thumbnail(images[i], "wrong")
      for i in order
    )
    note = f'<span class="quiet">first right image: rank {rank} of {len(images)}</span>'
    strips.append(f'<div>“{escape(captions[c])}” {note}<div class="strip">{found}</div></div>')
  return (
    f"<h2>Retrieval on {escape(split)}</h2><p>These queries were drawn at random with a fixed "
    "seed, not picked; right answers are green. The rank is that of the best right answer.</p>"
    f'<h3>From an image to captions</h3><div class="grid">{"".join(cards)}</div>'
    f"<h3>From a caption to images</h3>{''.join(strips)}"
  )


def _queries(scores, relevant, top):
  """Random queries that have an answer: (query, its `top` best candidates, rank of the first hit).

  scores, relevant: (Q, C). Ties and NaN count against the model, as in the retrieval figures.
  """
  ranks = common.first_hit(scores, relevant) + 1
  answerable = np.flatnonzero(relevant.any(axis=1))
  count = min(QUERIES, len(answerable))
  for q in np.random.default_rng(0).choice(answerable, count, replace=False):
    keys = np.where(np.isnan(scores[q]), np.inf, -scores[q])
    yield q, np.lexsort((relevant[q], keys))[:top], ranks[q]


def _patches(images, blocks, attention):
  """images: (n, S, S, 3) uint8; blocks: {depth: (n, h, w, W)}; attention: (n, h, w)."""
  drawn = {f"block {depth}": _principal(x) for depth, x in blocks.items()}
  peak = attention.max(axis=(1, 2), keepdims=True)
  drawn["attention"] = details.colour("magma", attention / np.maximum(peak, 1e-12))
  rows = []
  for i, image in enumerate(images):
    pictures = [("image", image)] + [(name, x[i]) for name, x in drawn.items()]
    rows.append("".join(
      f"<figure>{_thumbnail(x, name)}<figcaption>{name}</figcaption></figure>"
      for name, x in pictures
    ))  # fmt: skip
  return (
    "<h2>Patch features</h2><p>Of each block the first three principal components of all these "
    "images' patch features together, as red, green and blue: the same colour means similar "
    "features, in one image or across images. Attention: how much the last block's CLS token looks "
    "at each patch, mean over heads; bright is most.</p>"
    + "".join(f'<div class="depths">{row}</div>' for row in rows)
  )


def _principal(features):
  """(n, h, w, W) features -> (n, h, w, 3) uint8, their first principal components as colours."""
  x = np.nan_to_num(np.asarray(features, np.float32))
  n, h, w, W = x.shape
  x = x.reshape(-1, W)
  x = x - x.mean(axis=0)
  _, directions = np.linalg.eigh(x.T @ x)
  components = x @ directions[:, ::-1][:, :3]
  low, high = np.percentile(components, (1, 99), axis=0)
  rgb = np.zeros((len(x), 3), np.uint8)  # fewer than three channels leave the rest black
  rgb[:, : components.shape[1]] = 255 * np.clip((components - low) / (high - low + 1e-12), 0, 1)
  return rgb.reshape(n, h, w, 3)


def _thumbnail(image, alt, css=""):
  import cv2

  larger = image.shape[0] > THUMBNAIL
  # Nearest when enlarging: each patch is to stay a visible square.
  method = cv2.INTER_AREA if larger else cv2.INTER_NEAREST
  image = cv2.resize(np.asarray(image), (THUMBNAIL, THUMBNAIL), interpolation=method)
  return _img(cv2.imencode(".png", image[..., ::-1])[1].tobytes(), alt, css)


def _img(png, alt, css=""):
  data = base64.b64encode(png).decode()
  return f'<img class="{css}" alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def interval(row):
  """The ends of a figure's 95% interval, as the tables print them; "" for none."""
  if row.get("low") is None:
    return ""
  return f"{number(row['low'])} – {number(row['high'])}"


def number(value):
  """A figure as the tables print it."""
  if value is None or not math.isfinite(value):
    return "–"
  return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def escape(value):
  """Any value as the text of a page."""
  return html.escape(str(value))
