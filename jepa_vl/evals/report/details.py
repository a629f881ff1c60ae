"""What evaluations hand to the report: tables, confusions, maps over images (common.result)."""

import base64
import html
import math

import cv2
import matplotlib
import numpy as np

SIDE = 144  # pixels of a picture
VOID = 255


def section(details):
  """HTML of all details, folded where they are long; "" for none."""
  parts = [
    f"<h3>{html.escape(d['title'])}</h3><p class=\"quiet\">{html.escape(d['hint'])}</p>"
    + KINDS[d["kind"]](d)
    for d in details
  ]
  return f"<h2>In detail</h2>{''.join(parts)}" if parts else ""


def _table(detail):
  cell = lambda v: html.escape(_text(v))
  head = "".join(f"<th>{cell(c)}</th>" for c in detail["columns"])
  rows = "".join(
    f"<tr>{''.join(f'<td>{cell(v)}</td>' for v in row)}</tr>" for row in detail["rows"]
  )
  return (
    f'<details open><summary>{len(detail["rows"])} rows</summary><div class="scroll"><table>'
    f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>"
  )


def _text(value):
  if not isinstance(value, float):
    return str(value)
  return f"{value:.3f}" if math.isfinite(value) else "–"


def _matrix(detail):
  counts = np.asarray(detail["counts"], float)
  share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
  colours = colour("viridis", share)
  size = max(320 // max(len(counts), 1), 4)
  picture = colours.repeat(size, axis=0).repeat(size, axis=1)
  names = ", ".join(html.escape(str(n)) for n in detail["names"])
  return (
    f'<div class="scroll">{_img(picture, "confusions")}</div>'
    f'<p class="quiet">In this order: {names}. Yellow: all images of the row.</p>'
  )


def _overlay(detail):
  names = detail["names"] or ()
  palette = _palette(max(len(names), int(_largest(detail)) + 1))
  rows = []
  for image, *found in zip(
    detail["images"], detail["truth"], detail["prediction"], strict=True
  ):
    image = _square(image)
    mixed = [_mix(image, _square(m), palette) for m in found]
    rows.append(_strip(image, *mixed))
  there = np.unique([m for key in ("truth", "prediction") for m in detail[key]])
  legend = " ".join(
    f'<span style="border-left: 1em solid rgb{tuple(int(v) for v in palette[c])}; '
    f'padding-left: .3em; margin-right: .8em">{html.escape(str(names[c]))}</span>'
    for c in there
    if c < len(names)
  )
  return f'<div class="grid">{"".join(rows)}</div><p class="quiet">{legend}</p>'


def _depth(detail):
  truth, prediction = (np.asarray(detail[k], float) for k in ("truth", "prediction"))
  known = truth[truth > 0]
  low, high = (known.min(), known.max()) if known.size else (0.0, 1.0)
  grey = lambda m: colour("magma", np.clip((_square(m) - low) / max(high - low, 1e-9), 0, 1))
  rows = [
    _strip(_square(image), grey(t), grey(p))
    for image, t, p in zip(detail["images"], truth, prediction, strict=True)
  ]
  return (
    f'<div class="grid">{"".join(rows)}</div><p class="quiet">Dark {low:.2f} m, bright '
    f"{high:.2f} m.</p>"
  )


KINDS = {"table": _table, "matrix": _matrix, "overlay": _overlay, "depth": _depth}


def _largest(detail):
  found = np.concatenate([np.ravel(detail[k]) for k in ("truth", "prediction")])
  return found[found != VOID].max(initial=0)


def _palette(count):
  """(count, 3) uint8: well apart for neighbours, the first (background, mostly) grey."""
  hue = (np.arange(count) * 0.381966) % 1
  hsv = np.stack([hue, np.full(count, 0.8), np.full(count, 0.95)], axis=1)
  colours = (255 * matplotlib.colors.hsv_to_rgb(hsv)).astype(np.uint8)
  colours[0] = 128
  return colours


def _mix(image, classes, palette):
  """Half the image's grey, half the class's colour; void stays the image."""
  grey = image.mean(axis=-1, keepdims=True)
  known = (classes != VOID)[..., None]
  colour = palette[np.where(classes == VOID, 0, classes)]
  return np.where(known, 0.35 * grey + 0.65 * colour, image).astype(np.uint8)


def _square(picture):
  method = cv2.INTER_AREA if np.ndim(picture) == 3 else cv2.INTER_NEAREST_EXACT
  return cv2.resize(np.ascontiguousarray(picture), (SIDE, SIDE), interpolation=method)


def colour(name, values):
  """Values in [0, 1] as colours of a map of that name, (..., 3) uint8."""
  return (255 * matplotlib.colormaps[name](values)[..., :3]).astype(np.uint8)


def _strip(*pictures):
  named = zip(pictures, ("image", "truth", "prediction"), strict=True)
  return f'<div class="three">{"".join(_img(p, alt) for p, alt in named)}</div>'


def _img(picture, alt):
  png = cv2.imencode(".png", np.ascontiguousarray(picture[..., ::-1]))[1].tobytes()
  return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
