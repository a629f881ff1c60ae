"""The report's HTML: a page, its figures and pictures, and how values are written."""

import base64
import html
import io
import math

import numpy as np

THUMBNAIL = 96  # pixels; a page of full-size images would be tens of megabytes

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


def page(title, sections):
  """A whole page of HTML sections, which needs nothing but itself."""
  return (
    '<!doctype html><html lang="en"><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f"<title>Run report</title><style>{STYLE}</style>\n<h1>{escape(title)}</h1>\n"
    + "\n".join(sections)
    + "\n</html>\n"
  )


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
  image = img(buffer.getvalue(), title)
  return f"<figure>{image}<figcaption>{escape(hint)}</figcaption></figure>"


def thumbnail(image, alt, css=""):
  import cv2

  larger = image.shape[0] > THUMBNAIL
  # Nearest when enlarging: each patch is to stay a visible square.
  method = cv2.INTER_AREA if larger else cv2.INTER_NEAREST
  image = cv2.resize(np.asarray(image), (THUMBNAIL, THUMBNAIL), interpolation=method)
  return img(cv2.imencode(".png", image[..., ::-1])[1].tobytes(), alt, css)


def img(png, alt, css=""):
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
