"""Depth by one linear layer on frozen patch tokens."""

import jax.numpy as jnp
import numpy as np

from jepa_vl.evals import common, dense, fit

PROTOCOL = """
One linear layer on standardised frozen patch tokens, fitted to metric depth by squared error on
train images resized to a square; the learning rate is chosen on every tenth of them. The output is
upsampled bilinearly to the depth map at its full size and held within the allowed range. Figures
are means over images of each image's mean over pixels whose depth is known and in the range: RMSE
and AbsRel (lower is better), and the share of pixels within a factor of 1.25, its square and its
cube.
"""
METRICS = ("rmse", "abs_rel", "delta1", "delta2", "delta3")
SCALES = ("metric", "median")


def run(
  encode, variables, mesh, *, source, path, splits, train_split, min_depth, max_depth, scale, size,
  mode, stride, epochs, batch_size, lrs, weight_decay, side, keep, seed,
):  # fmt: skip
  """"SPLIT/rmse" (metres), "SPLIT/abs_rel", "SPLIT/delta1" to "delta3", with intervals over images.

  Of the records' `depth`, PNGs of millimetres; min_depth, max_depth in metres. scale: "metric", or
  "median": each prediction is first multiplied so that its median is the truth's. size to seed as
  in segmentation.run. "@constant" is the train images' mean depth map, "@raw_pixels" the same head
  on each patch's pixels.

  Raises:
    ValueError: an unknown scale, or splits that cannot be read.
  """
  _check(scale)
  open_ = lambda split: dense.Dense(
    encode, (source, path, split), "depth", size=size, mode=mode, stride=stride
  )
  data = {s: open_(s) for s in dict.fromkeys((train_split, *splits))}
  how = fit.Fit(epochs, batch_size, tuple(lrs), weight_decay, seed)
  bounds = (min_depth, max_depth)
  arguments = (data, train_split, splits, bounds, scale, how, side, keep, mesh)
  tokens = lambda images: encode.patches(variables, images)
  errors, lr, pictures = _fit_and_measure(*arguments, tokens, pictures=True)
  key = ("depth", source, path, *splits, train_split, bounds, scale, size, mode, stride, how, side)
  floors = encode.once(key, lambda: _floors(arguments, data[train_split].patch_size(tokens)))
  figures, sizes, details = {}, {}, []
  for s in splits:
    figures |= common.means({f"{s}/{m}": errors[s][:, i] for i, m in enumerate(METRICS)})
    for floor, found in floors.items():
      mean = found[s].mean(axis=0)
      figures |= {f"{s}/{m}@{floor}": mean[i] for i, m in enumerate(METRICS)}
    sizes[s] = {"images": len(errors[s]), "left_out": len(data[s]) - len(errors[s])}
    images, truth, prediction = map(np.stack, zip(*pictures[s], strict=True))
    details.append({
      "kind": "depth", "title": f"Depth of {s}", "images": images, "truth": truth,
      "hint": "The image, its depth, and what one linear layer on the frozen patch tokens says.",
      "prediction": prediction,
    })  # fmt: skip
  sizes[train_split] = {"images": len(data[train_split]), "seed": seed, "lr": lr}
  return common.result(figures, protocol=PROTOCOL, sizes=sizes, details=details)


def check(encode, keys):
  """Raises ValueError for a mode or scale that `run` would stop at."""
  dense.check(encode, keys)
  _check(keys.scale)


def _check(scale):
  if scale not in SCALES:
    raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")


def _floors(arguments, patch):
  data, train_split, splits, bounds, scale, _, side, *_ = arguments
  total = np.zeros((2, side, side))
  for rows in data[train_split].stretches("mean depth of"):
    _, _, found = data[train_split].read(rows)
    for truth in dense.targets(found, side) if found else ():
      known = (truth >= bounds[0]) & (truth <= bounds[1])
      total += np.stack([np.where(known, truth, 0), known])
  # Where no image has a known depth, the mean of all.
  everywhere = total[0].sum() / max(total[1].sum(), 1)
  mean = np.where(total[1] > 0, total[0] / np.maximum(total[1], 1), everywhere).astype(np.float32)
  constant = lambda images: np.repeat(mean[None, ..., None], len(images), axis=0)
  return {
    "raw_pixels": _fit_and_measure(*arguments, dense.pixels(patch))[0],
    "constant": {s: _measure(data[s], constant, bounds, scale)[0] for s in splits},
  }


def _fit_and_measure(
  data, train_split, splits, bounds, scale, how, side, keep, mesh, features, pictures=False
):  # fmt: skip
  """{split: (N, 5) of METRICS}, the learning rate, {split: list of pictures}."""

  def loss(out, goals):
    known = (goals >= bounds[0]) & (goals <= bounds[1])
    return jnp.sum(jnp.where(known, (out[..., 0] - goals) ** 2, 0)), jnp.sum(known)

  def start(goals):
    known = goals[(goals >= bounds[0]) & (goals <= bounds[1])]
    if not known.size:
      raise _nowhere(train_split, bounds)
    return known.mean()[None]

  head, lr = dense.fit(
    data[train_split], features, lambda found: found, loss, start, how, side, keep, mesh
  )
  apply = lambda images: head(features(images).astype(np.float32))
  found = {s: _measure(data[s], apply, bounds, scale, pictures) for s in splits}
  return {s: f[0] for s, f in found.items()}, lr, {s: f[1] for s, f in found.items()}


def _measure(data, apply, bounds, scale, pictures=False):
  some, errors, drawn = dense.shown(data) if pictures else (), [], []
  for rows in data.stretches("depth of"):
    indices, images, truths = data.read(rows)
    for i, image, truth, out in zip(
      indices, images, truths, data.outputs(images, apply), strict=True
    ):
      predicted = dense.to_map(out, truth.shape)[..., 0]
      found = measure(predicted, truth, bounds, scale)
      if found is not None:
        errors.append(found)
      if i in some:
        drawn.append(dense.picture(image, truth, np.clip(predicted, *bounds)))
  if not errors:
    raise _nowhere(data.name, bounds)
  return np.array(errors), drawn


def _nowhere(split, bounds):
  return ValueError(
    f"split {split!r}: no pixel has a depth from {bounds[0]} to {bounds[1]} m (min_depth, "
    "max_depth)"
  )


def measure(predicted, truth, bounds, scale):
  """(H, W) metres twice -> METRICS of one image, or None where no pixel counts."""
  known = (truth >= bounds[0]) & (truth <= bounds[1])
  if not known.any():
    return None
  p, t = predicted[known].astype(np.float64), truth[known].astype(np.float64)
  if scale == "median":
    p = p * np.median(t) / max(np.median(p), 1e-6)
  p = np.clip(p, *bounds)
  ratio = np.maximum(p / t, t / p)
  deltas = [np.mean(ratio < 1.25**k) for k in (1, 2, 3)]
  return np.array([np.sqrt(np.mean((p - t) ** 2)), np.mean(np.abs(p - t) / t), *deltas])
