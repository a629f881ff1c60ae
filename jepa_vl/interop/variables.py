"""Variables that came from files: joining them, what their shapes say, fitting them to a model."""

import math
import re

import flax
import numpy as np

from jepa_vl.interop.layout import complaint, describe
from jepa_vl.model.layers import resample_positions
from jepa_vl.model.two_tower import SIZES

# Which key of the config sets each dimension of a parameter; first match wins.
KEYS = (
  (r"image/patch_embedding/kernel", ("model.patch_size", "model.size")),
  (r"text/token_embedding", ("text.tokenizer (its vocabulary)", "model.size")),
  (r"text/position_embedding", ("text.length", "model.size")),
  (r"head/dense_0/kernel", ("model.size", "model.hidden_dim")),
  (r"predictor/dense_0/kernel", ("model.embed_dim", "model.hidden_dim")),
  (r"(head|predictor)/out/kernel", ("model.hidden_dim", "model.embed_dim")),
  (r"(head|predictor)/out/bias", ("model.embed_dim",)),
  (r"(head|predictor)/", ("model.hidden_dim",) * 2),
  (r"", ("model.size",) * 5),
)


def merge(parts):
  """{path: variables} -> one {"params": {component: tree}, "batch_stats": {component: tree}}.

  Raises:
    ValueError: two paths hold the same component.
  """
  merged, origin = {"params": {}, "batch_stats": {}}, {}
  for path, variables in parts.items():
    for component in variables["params"]:
      if component in origin:
        raise ValueError(
          f"{origin[component]} and {path} both hold {component!r}; give one file for each part"
        )
      origin[component] = path
    for kind, components in variables.items():
      merged[kind] |= components
  return merged


def shapes(variables):
  """What the arrays say of the config that builds their model, as far as they are there.

  Keys: model.size, model.patch_size, model.image_size, model.embed_dim, model.hidden_dim,
  model.predictor_depth (0 for heads without predictors), vocab_size and text_positions (rows of
  the text tower's position table).

  Raises:
    ValueError: width and depth are no size of ours, the image positions are no square, or the
      modalities differ where our model has one key for both.
  """
  params = variables["params"]
  found = {
    "model.size": {n: _size(n, params[n]) for n in ("image", "text") if n in params},
    "model.embed_dim": {n: x["out"]["kernel"].shape[1] for n, x in _heads(params)},
    "model.hidden_dim": {n: x["out"]["kernel"].shape[0] for n, x in _heads(params)},
    "model.predictor_depth": {
      f"{n}_predictor": sum(name.startswith("dense_") for name in params.get(f"{n}_predictor", ()))
      for n in ("image", "text")
      if f"{n}_head" in params or f"{n}_predictor" in params
    },
  }
  result = {key: _agreed(key, values) for key, values in found.items() if values}
  if "image" in params:
    patch = math.isqrt(params["image"]["patch_embedding"]["kernel"].shape[0] // 3)
    side = _side(params["image"]["position_embedding"].shape[0] - 1)
    result |= {"model.patch_size": patch, "model.image_size": side * patch}
  if "text" in params:
    result["vocab_size"] = params["text"]["token_embedding"]["embedding"].shape[0]
    result["text_positions"] = params["text"]["position_embedding"].shape[0]
  return result


def _heads(params):
  return [(n, x) for n, x in params.items() if n.endswith(("_head", "_predictor"))]


def _size(name, tower):
  depth, width = tower["tower"]["blocks"]["attn_norm"]["scale"].shape
  for size, (w, d, _) in SIZES.items():
    if (w, d) == (width, depth):
      return size
  known = ", ".join(f"{size} {w}x{d}" for size, (w, d, _) in SIZES.items())
  raise ValueError(
    f"the {name} tower has width {width} and depth {depth}, which is no model.size "
    f"(width x depth: {known})"
  )


def _side(rows):
  side = math.isqrt(rows)
  if side**2 != rows or not rows:
    raise ValueError(
      f"the image tower's {rows} positions beside CLS are no square grid; only square images are "
      "supported"
    )
  return side


def _agreed(key, values):
  if len(set(values.values())) > 1:
    said = ", ".join(f"{name} {value}" for name, value in values.items())
    raise ValueError(f"{key} is one for both modalities, but they differ: {said}")
  return next(iter(values.values()))


def fit(loaded, into):
  """Puts loaded components into a model's variables: (variables, left_out, left_alone).

  Both are {"params": {component: tree}, "batch_stats": {component: tree}}; `into` holds arrays or
  ShapeDtypeStructs, and its own leaves remain where nothing was loaded. `left_out` names the
  components that the model lacks, `left_alone` those that were not loaded. Image positions of
  another square grid are resampled, text positions beyond the model's are cut.

  Raises:
    ValueError: within a component keys are missing, unexpected or of another shape; all of them
      are listed, with the config key that sets each dimension.
  """
  left_out = [name for name in loaded["params"] if name not in into["params"]]
  left_alone = [name for name in into["params"] if name not in loaded["params"]]
  ours, theirs = _flatten(into), _flatten(loaded)
  theirs = {path: x for path, x in theirs.items() if path.split("/")[1] not in left_out}
  theirs = {path: _adapt(path, x, ours[path]) if path in ours else x for path, x in theirs.items()}
  wanted = {path: x for path, x in ours.items() if path.split("/")[1] not in left_alone}
  _check(theirs, wanted)
  cast = {path: np.asarray(x, wanted[path].dtype) for path, x in theirs.items()}
  tree = flax.traverse_util.unflatten_dict({**ours, **cast}, sep="/")
  return {kind: tree.get(kind, {}) for kind in into}, left_out, left_alone


def _flatten(variables):
  return flax.traverse_util.flatten_dict(variables, sep="/")


def _adapt(path, x, target):
  """A position table in the target's number of rows, where that can be had; else x as it is."""
  if path == "params/image/position_embedding" and x.shape[1:] == target.shape[1:]:
    _side(x.shape[0] - 1)
    side = _side(target.shape[0] - 1)
    return np.concatenate([x[:1], resample_positions(x[1:], (side, side))])
  if path == "params/text/position_embedding" and x.ndim:
    return x[: target.shape[0]]
  return x


def _check(theirs, ours):
  """Raises ValueError unless both have the same paths and shapes."""
  missing = [f"{path}{_depth_hint(path)}" for path in ours if path not in theirs]
  unexpected = {
    path: f"{describe(x)}{_depth_hint(path)}" for path, x in theirs.items() if path not in ours
  }
  other = {}
  for path, x in ours.items():
    if path in theirs and theirs[path].shape != x.shape:
      keys = _keys(path, theirs[path].shape, x.shape)
      other[path] = (describe(theirs[path]), f"{tuple(x.shape)}{keys}")
  if missing or unexpected or other:
    raise ValueError(
      "the weights do not fit the model that the config builds (beside a key stands what in the "
      "config sets it):\n" + complaint(missing, unexpected, other)
    )


def _depth_hint(path):
  return "; model.predictor_depth" if re.search(r"predictor/(dense|bn)_", path) else ""


def _keys(path, found, expected):
  """The config keys of the dimensions in which two shapes differ, as the end of a line."""
  keys = next(keys for pattern, keys in KEYS if re.search(pattern, path))
  if len(found) != len(expected):
    return ""
  differ = [key for a, b, key in zip(found, expected, keys, strict=False) if a != b]
  return "".join(f"; {key}" for key in dict.fromkeys(differ))
