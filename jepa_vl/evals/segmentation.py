"""Semantic segmentation by one linear layer on frozen patch tokens."""

import jax.numpy as jnp
import numpy as np
import optax

from jepa_vl.data import maps
from jepa_vl.evals import common, dense, fit, zeroshot

PROTOCOL = """
One linear layer on standardised frozen patch tokens, fitted on train images resized to a square;
the learning rate is chosen on every tenth of them. Logits are upsampled bilinearly to the label map
at its full size; mIoU is the mean over classes of intersection over union, summed over the split's
pixels; void pixels are ignored, and so are classes that neither labels nor predictions have.
"""


def run(
  encode, variables, mesh, *, source, path, splits, train_split, num_classes, class_names, size,
  mode, stride, epochs, batch_size, lrs, weight_decay, side, keep, seed,
):  # fmt: skip
  """"SPLIT/miou" and "SPLIT/pixel_accuracy", with intervals over images.

  Of the records' `segmentation`, PNGs of classes 0 to num_classes - 1 and 255 for void; class_names
  as zeroshot's `classes`, for the report, or (). size, mode, stride: dense.Dense; 0: the model's
  size, windows that touch. epochs to weight_decay, and
  seed: fit.Fit; side: of the square on which training compares, in pixels; keep: GiB of train
  features held in memory, of more the rest is made again in every epoch. "@constant" says the
  commonest class everywhere, "@colour" the class of the nearest mean colour, "@raw_pixels" is the
  same head on each patch's pixels.

  Raises:
    ValueError: a class that is not below num_classes, or splits that cannot be read.
  """
  open_ = lambda split: dense.Dense(
    encode, (source, path, split), "segmentation", size=size, mode=mode, stride=stride
  )
  data = {s: open_(s) for s in dict.fromkeys((train_split, *splits))}
  how = fit.Fit(epochs, batch_size, tuple(lrs), weight_decay, seed)
  arguments = (data, train_split, splits, num_classes, how, side, keep, mesh)
  tokens = lambda images: encode.patches(variables, images)
  counts, lr, pictures = _fit_and_count(*arguments, tokens, pictures=True)
  key = ("segmentation", source, path, *splits, train_split, num_classes, size, mode, stride)
  key += (how, side)
  floors = encode.once(key, lambda: _floors(arguments, data[train_split].patch_size(tokens)))
  names = zeroshot.load_names(class_names) or tuple(map(str, range(num_classes)))
  figures, sizes, details = {}, {}, []
  for s in splits:
    figures |= score(s, counts[s])
    for floor, found in floors.items():
      figures |= {f"{k}@{floor}": v for k, v in score(s, found[s]).items() if "@" not in k}
    sizes[s] = {"images": len(counts[s]), "left_out": len(data[s]) - len(counts[s])}
    details += [_table(s, counts[s].sum(axis=0), names), overlay(s, pictures[s], names)]
  sizes[train_split] = {"images": len(data[train_split]), "seed": seed, "lr": lr}
  return common.result(figures, protocol=PROTOCOL, sizes=sizes, details=details)


def _floors(arguments, patch):
  data, train_split, splits, classes, *_ = arguments
  found = {"raw_pixels": _fit_and_count(*arguments, dense.pixels(patch))[0]}
  seen, colours = np.zeros(classes), np.zeros((classes, 3))
  for rows in data[train_split].stretches("colours of"):
    for image, truth in zip(*data[train_split].read(rows)[1:], strict=True):
      small = dense.picture(image, truth, truth)
      known = small[1] < classes
      np.add.at(seen, small[1][known], 1)
      np.add.at(colours, small[1][known], small[0][known])
  colours = np.where(seen[:, None] > 0, colours / np.maximum(seen, 1)[:, None], np.inf)
  constant = int(seen.argmax())
  found["constant"] = {
    s: _count(data[s], lambda image, shape: np.full(shape, constant), classes) for s in splits
  }
  found["colour"] = {
    s: _count(data[s], lambda image, shape: _nearest(image, shape, colours), classes)
    for s in splits
  }
  return found


def _nearest(image, shape, colours):
  """The class of the nearest mean colour, per pixel of the map."""
  image = dense.to_map(image.astype(np.float32), shape)
  best, found = np.full(shape, np.inf, np.float32), np.zeros(shape, int)
  for i, colour in enumerate(colours):
    distance = np.sum((image - colour) ** 2, axis=-1)
    closer = distance < best
    best[closer], found[closer] = distance[closer], i
  return found


def _count(data, predict, classes):
  """counts of every image: predict (image, map's shape) -> classes (H, W)."""
  counts = []
  for rows in data.stretches("floor of"):
    for image, truth in zip(*data.read(rows)[1:], strict=True):
      counts.append(count(predict(image, truth.shape), truth, classes))
  return np.array(counts)


def _fit_and_count(
  data, train_split, splits, classes, how, side, keep, mesh, features, pictures=False
):  # fmt: skip
  """{split: (N, 3, C) counts}, the learning rate, {split: list of pictures}."""
  goal = lambda found: check(found, classes, data[train_split].name)
  # The classes' frequencies are known without a look at the features.
  start = lambda goals: np.log(np.bincount(goals.ravel(), minlength=256)[:classes] + 1.0)
  head, lr = dense.fit(data[train_split], features, goal, _loss, start, how, side, keep, mesh)
  apply = lambda images: head(features(images).astype(np.float32))
  counts, drawn = {}, {}
  for s in splits:
    some, counts[s], drawn[s] = dense.shown(data[s]) if pictures else (), [], []
    for rows in data[s].stretches("segmentation of"):
      indices, images, truths = data[s].read(rows)
      for i, image, truth, out in zip(
        indices, images, truths, data[s].outputs(images, apply), strict=True
      ):
        predicted = dense.to_map(out, truth.shape).argmax(axis=-1)
        counts[s].append(count(predicted, check(truth, classes, s), classes))
        if i in some:
          drawn[s].append(dense.picture(image, truth, predicted.astype(np.uint8)))
    counts[s] = np.array(counts[s])
  return counts, lr, drawn


def _loss(logits, goals):
  known = goals != maps.VOID
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(known, goals, 0))
  return jnp.sum(losses * known), jnp.sum(known)


def check(found, classes, split):
  """The map. Raises ValueError if it has a class that is not below `classes`, nor void."""
  bad = found[(found >= classes) & (found != maps.VOID)]
  if bad.size:
    raise ValueError(
      f"split {split!r}: a label map has class {bad.flat[0]}; num_classes={classes} allows 0 to "
      f"{classes - 1}, and {maps.VOID} for void"
    )
  return found


def count(predicted, truth, classes):
  """(H, W) classes twice -> (3, C): pixels right, predicted and true of each class; void left out.

  """
  known = truth != maps.VOID
  predicted, truth = predicted[known], truth[known]
  bins = lambda x: np.bincount(x.astype(np.int64), minlength=classes)[:classes]
  return np.stack([bins(truth[predicted == truth]), bins(predicted), bins(truth)])


def miou(counts):
  """(3, C) -> mean IoU over classes that are predicted or true, and the share of pixels right."""
  right, predicted, true = counts
  union = predicted + true - right
  iou = np.where(union > 0, right / np.maximum(union, 1), np.nan)
  return np.array([np.nanmean(iou), right.sum() / max(true.sum(), 1)])


def score(split, counts):
  """mIoU and pixel accuracy of (N, 3, C) counts of a split's images, with their intervals."""
  values = miou(counts.sum(axis=0))
  low, high = common.bootstrap([counts], miou, draws=200)
  figures = {}
  for key, *found in zip(("miou", "pixel_accuracy"), values, low, high, strict=True):
    key = f"{split}/{key}"
    figures |= dict(zip((key, f"{key}@low", f"{key}@high"), found, strict=True))
  return figures


def _table(split, counts, names):
  right, predicted, true = counts
  union = predicted + true - right
  rows = [
    [name, float(right[c] / union[c]), float(true[c] / true.sum())]
    for c, name in enumerate(names)
    if union[c]
  ]
  return {
    "kind": "table", "title": f"IoU per class, {split}",
    "hint": "share: of the split's labelled pixels", "columns": ["class", "IoU", "share"],
    "rows": rows,
  }  # fmt: skip


def overlay(
  split, pictures, names, what="Segmentation of",
  hint="The image, its labels, and what one linear layer on the frozen patch tokens says.",
):  # fmt: skip
  """What the report draws of dense.picture's."""
  images, truth, prediction = map(np.stack, zip(*pictures, strict=True))
  return {
    "kind": "overlay", "title": f"{what} {split}", "names": list(names), "hint": hint,
    "images": images, "truth": truth, "prediction": prediction,
  }  # fmt: skip
