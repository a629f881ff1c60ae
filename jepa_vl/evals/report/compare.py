"""One page that sets runs side by side, from the files in their folders alone."""

import json
import os

import numpy as np

from jepa_vl.evals import common, report
from jepa_vl.evals.report import markup
from jepa_vl.metrics import read_jsonl


def read(folder):
  """config, results (rows), metrics and pictures (HTML) of a run's folder.

  Raises FileNotFoundError for what is no run's folder, ValueError for a file that is no JSON.
  """
  found = {"name": os.path.basename(os.path.normpath(folder))}
  for name, empty in (("config", {}), ("results", {"rows": []})):
    path = os.path.join(folder, f"{name}.json")
    if not os.path.isfile(path) and name == "config":
      raise FileNotFoundError(f"{folder} is no run's folder: looked for {path}")
    try:
      with open(path, encoding="utf-8") as f:
        found[name] = json.load(f)
    except FileNotFoundError:
      found[name] = empty  # a run that has not ended
    except ValueError as e:
      raise ValueError(f"{path} is no JSON ({e})") from e
  found["metrics"] = read_jsonl(os.path.join(folder, "metrics.jsonl"))
  try:
    with open(os.path.join(folder, report.PICTURES), encoding="utf-8") as f:
      found["pictures"] = f.read()
  except FileNotFoundError:
    found["pictures"] = ""  # a run that has not ended
  return found


def page(runs):
  """HTML of what `read` gives of one run or several."""
  for run, name in zip(runs, _names(runs), strict=True):
    run["name"] = name
  return markup.page(
    "Comparison of runs" if len(runs) > 1 else f"Run {runs[0]['name']}",
    [_differences(runs), _results(runs), _curves(runs), _pictures(runs)],
  )


def _names(runs):
  """Unique names: equal ones are numbered."""
  names = [run["name"] for run in runs]
  return [f"{n} ({i + 1})" if names.count(n) > 1 else n for i, n in enumerate(names)]


def _flat(tree, prefix=""):
  flat = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat |= _flat(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat


def _rows(head, rows):
  cell = lambda tag, v: f"<{tag}>{markup.escape(v)}</{tag}>"
  lines = "".join(f"<tr>{''.join(cell('td', v) for v in row)}</tr>" for row in rows)
  return (
    f'<div class="scroll"><table><thead><tr>{"".join(cell("th", h) for h in head)}</tr></thead>'
    f"<tbody>{lines}</tbody></table></div>"
  )


def _differences(runs):
  flat = [_flat(run["config"]) for run in runs]
  keys = sorted(set().union(*flat))
  rows = [
    [key, *(f.get(key, "–") for f in flat)]
    for key in keys
    if len({json.dumps(f.get(key), default=str) for f in flat}) > 1
  ]
  if not rows:
    return ""
  head = ["key", *(run["name"] for run in runs)]
  return f"<h2>What is configured differently</h2>{_rows(head, rows)}"


def _results(runs):
  """A row per figure, each run in its own headline reading, with floors of the first run."""
  columns, keys = [], {}
  for run in runs:
    rows = run["results"]["rows"]
    reading = common.headline_reading(r["metric"] for r in rows)
    named = {}
    for r in rows:
      if common.is_headline(r["metric"], reading):
        parts = [p for p in r["metric"].split("/") if p != reading]
        named[r["evaluation"], r["split"], "/".join(parts)] = r
    columns.append(named)
    keys |= dict.fromkeys(named)
  if not keys:
    return "<h2>Results</h2><p>No evaluation has ended.</p>"
  floors = [
    f for f in report.FLOORS if any(r.get(f) is not None for c in columns for r in c.values())
  ]
  lines = []
  for key in keys:
    first = next(c[key] for c in columns if key in c)
    cells = [_with_interval(c.get(key)) for c in columns]
    lines.append([" ".join(key), *cells, *(markup.number(first.get(f)) for f in floors)])
  head = ["figure", *(run["name"] for run in runs), *(f.replace("_", " ") for f in floors)]
  text = "With 95% intervals (resampled images). Lower is better of: rmse, abs_rel, drop_points."
  return f'<h2>Results</h2><p class="quiet">{text}</p>{_rows(head, lines)}'


def _with_interval(row):
  if row is None:
    return "–"
  value, ends = markup.number(row["value"]), markup.interval(row)
  return f"{value} ({ends})" if ends else value


def _pictures(runs):
  if len(runs) == 1:
    return runs[0]["pictures"]
  return "".join(
    f"<details><summary>Pictures of {markup.escape(run['name'])}</summary>{run['pictures']}"
    "</details>"
    for run in runs
    if run["pictures"]
  )


def _curves(runs):
  figures = []
  for title, log, hint, keys in report.PANELS:
    for key, label in keys.items():
      lines = []
      for i, run in enumerate(runs):
        values = np.array([r.get(key) for r in run["metrics"]], float)
        if np.isfinite(values).any():
          steps = [r["step"] for r in run["metrics"]]
          lines.append((run["name"], steps, values, {"color": f"C{i % 10}"}))
      if lines:
        values = np.concatenate([y for _, _, y, _ in lines])
        wide = log and np.nanmax(values) > 10 * np.nanmin(values) > 0
        named = f"{title}: {label or key}" if len(keys) > 1 else title
        figures.append(markup.figure(named, lines, hint, log=wide))
  return f'<h2>Training</h2><div class="grid">{"".join(figures)}</div>' if figures else ""
