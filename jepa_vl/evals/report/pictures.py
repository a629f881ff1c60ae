"""Sections of the report that need the network: embeddings, retrieval, patch features."""

import numpy as np

from jepa_vl.evals import common
from jepa_vl.evals.report import details
from jepa_vl.evals.report.markup import escape, figure, thumbnail
from jepa_vl.metrics import rank_of_spectrum, singular_values

QUERIES, TOP_CAPTIONS, TOP_IMAGES = 8, 5, 8


def embeddings(embeddings):
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


def retrieval(split, images, captions, similarity, relevant):
  similarity, relevant = np.asarray(similarity), np.asarray(relevant, bool)
  by_image = queries(similarity, relevant, TOP_CAPTIONS)
  by_caption = queries(similarity.T, relevant.T, TOP_IMAGES)
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
      f'<div class="query">{thumbnail(images[i], "query")}<div><ol>{"".join(items)}</ol>'
      f"{note}</div></div>"
    )
  for c, order, rank in by_caption:
    found = "".join(
      thumbnail(images[i], "right", "hit") if relevant[i, c] else thumbnail(images[i], "wrong")
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


def queries(scores, relevant, top):
  """Random queries that have an answer: (query, its `top` best candidates, rank of the first hit).

  scores, relevant: (Q, C). Ties and NaN count against the model, as in the retrieval figures.
  """
  ranks = common.first_hit(scores, relevant) + 1
  answerable = np.flatnonzero(relevant.any(axis=1))
  count = min(QUERIES, len(answerable))
  for q in np.random.default_rng(0).choice(answerable, count, replace=False):
    keys = np.where(np.isnan(scores[q]), np.inf, -scores[q])
    yield q, np.lexsort((relevant[q], keys))[:top], ranks[q]


def patches(images, blocks, attention):
  """images: (n, S, S, 3) uint8; blocks: {depth: (n, h, w, W)}; attention: (n, h, w)."""
  drawn = {f"block {depth}": _principal(x) for depth, x in blocks.items()}
  peak = attention.max(axis=(1, 2), keepdims=True)
  drawn["attention"] = details.colour("magma", attention / np.maximum(peak, 1e-12))
  rows = []
  for i, image in enumerate(images):
    pictures = [("image", image)] + [(name, x[i]) for name, x in drawn.items()]
    rows.append("".join(
      f"<figure>{thumbnail(x, name)}<figcaption>{name}</figcaption></figure>"
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
