"""Unsupervised segmentation: k-means on frozen patch tokens, clusters matched with classes."""

import numpy as np
import scipy.cluster.vq
import scipy.optimize

from jepa_vl.data import maps
from jepa_vl.evals import common, dense, segmentation, zeroshot

PROTOCOL = """
k-means with as many clusters as classes on the leading principal components of frozen patch tokens
of unit length, a sample from every train image; no label is used. Scores are upsampled bilinearly
to the label map at its full size. Clusters are matched one to one with classes so that most pixels
of the split agree (Hungarian method), then scored as in linear segmentation. The matching uses the
split's labels, as is usual for this protocol.
"""
_RESTARTS = 4  # the one with the smallest distances is kept
_ITERATIONS = 50


def run(
  encode, variables, mesh, *, source, path, splits, train_split, num_classes, class_names, size,
  mode, stride, components, sample, seed,
):  # fmt: skip
  """"SPLIT/miou" and "SPLIT/pixel_accuracy", with intervals over images.

  Keys as in segmentation.run; components: of the PCA, 0 for none; sample: patch tokens drawn from
  each train image. "@constant" names every pixel the split's commonest class, "@raw_pixels" is the
  same on each patch's pixels.

  Raises:
    ValueError: a class that is not below num_classes, or splits that cannot be read.
  """
  open_ = lambda split: dense.Dense(
    encode, (source, path, split), "segmentation", size=size, mode=mode, stride=stride
  )
  data = {s: open_(s) for s in dict.fromkeys((train_split, *splits))}
  tokens = lambda images: encode.patches(variables, images)
  arguments = (data, train_split, splits, num_classes, components, sample, seed)
  counts, pictures = _cluster(*arguments, tokens)
  key = ("clusters", source, path, *splits, size, mode, stride, *arguments[1:])
  pixels = dense.pixels(data[train_split].patch_size(tokens))
  floor = encode.once(key, lambda: _cluster(*arguments, pixels)[0])
  names = zeroshot.load_names(class_names) or tuple(map(str, range(num_classes)))
  figures, sizes, details = {}, {}, []
  for s in splits:
    figures |= segmentation.score(s, counts[s])
    true = counts[s][:, 2].sum(axis=0)
    most = np.arange(num_classes) == true.argmax()
    constant = np.stack([true * most, true.sum() * most, true])
    for what, found in (("raw_pixels", floor[s].sum(axis=0)), ("constant", constant)):
      values = segmentation.miou(found)
      figures |= {f"{s}/miou@{what}": values[0], f"{s}/pixel_accuracy@{what}": values[1]}
    sizes[s] = {"images": len(counts[s]), "left_out": len(data[s]) - len(counts[s])}
    details.append(segmentation.overlay(
      s, pictures[s], names, "Clusters of",
      "The image, its labels, and k-means clusters of the frozen patch tokens under their names.",
    ))  # fmt: skip
  sizes[train_split] = {"images": len(data[train_split]), "seed": seed, "per_image": sample}
  return common.result(figures, protocol=PROTOCOL, sizes=sizes, details=details)


def _cluster(data, train_split, splits, classes, components, sample, seed, features):
  """{split: (N, 3, C) counts after matching}, {split: list of pictures}."""
  head = fit(data[train_split], features, classes, components, sample, seed)
  apply = lambda images: head(features(images))
  counts, pictures = {}, {}
  for s in splits:
    some, tables, drawn = dense.shown(data[s]), [], []
    for rows in data[s].stretches("clusters of"):
      indices, images, truths = data[s].read(rows)
      for i, image, truth, out in zip(
        indices, images, truths, data[s].outputs(images, apply), strict=True
      ):
        found = dense.to_map(out, truth.shape).argmax(axis=-1)
        tables.append(contingency(found, segmentation.check(truth, classes, s), classes))
        if i in some:
          drawn.append((image, truth, found))
    tables = np.array(tables)
    name = match(tables.sum(axis=0))
    counts[s] = matched(tables, name)
    pictures[s] = [dense.picture(i, t, name[f].astype(np.uint8)) for i, t, f in drawn]
  return counts, pictures


def fit(train, features, clusters, components, sample, seed):
  """k-means on a sample of the train images' tokens -> head: (..., W) -> (..., clusters) scores."""
  rng, parts = np.random.default_rng(seed), []
  for rows in train.stretches("tokens of"):
    _, images, _ = train.read(rows)
    if images:
      x = features(train.squares(images))
      x = x.reshape(len(x), -1, x.shape[-1])
      picked = rng.integers(x.shape[1], size=(len(x), sample))
      parts.append(np.take_along_axis(x, picked[..., None], axis=1).reshape(-1, x.shape[-1]))
  if not parts:
    raise ValueError(f"split {train.name!r}: no image and map can be read")
  x = common.unit(np.concatenate(parts).astype(np.float32))
  mean = x.mean(axis=0)
  _, axes = np.linalg.eigh(np.cov(x - mean, rowvar=False).astype(np.float64))
  basis = axes[:, ::-1][:, : components or None].astype(np.float32)
  x = (x - mean) @ basis
  best = None
  for _ in range(_RESTARTS):
    centres, found = scipy.cluster.vq.kmeans2(x, clusters, _ITERATIONS, minit="++", seed=rng)
    distance = np.sum((x - centres[found]) ** 2)
    if best is None or distance < best[0]:
      best = distance, centres
  centres = best[1]
  # The nearest centre has the highest of these, which are linear: they can be upsampled.
  return lambda f: (common.unit(f) - mean) @ basis @ (2 * centres.T) - np.sum(centres**2, axis=1)


def contingency(found, truth, classes):
  """(H, W) clusters and classes -> (clusters, C) numbers of pixels; void left out."""
  known = truth != maps.VOID
  cells = found[known].astype(np.int64) * classes + truth[known]
  return np.bincount(cells, minlength=classes * classes).reshape(classes, classes).astype(np.int32)


def match(table):
  """(clusters, C) -> (clusters,): the class of each cluster, one to one, most pixels right."""
  rows, columns = scipy.optimize.linear_sum_assignment(table, maximize=True)
  return columns[np.argsort(rows)]


def matched(tables, name):
  """(N, clusters, C) -> (N, 3, C): pixels right, predicted and true of each class."""
  renamed = np.empty_like(tables)
  renamed[:, name] = tables
  right = np.diagonal(renamed, axis1=1, axis2=2)
  return np.stack([right, renamed.sum(axis=2), renamed.sum(axis=1)], axis=1)
