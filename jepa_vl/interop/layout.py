"""The engine of the name tables: one table per foreign layout, read in both directions.

A table's row is (their name, our path, Layout, their shape). "{}" in a name stands for the layer;
such rows are stacked along our leading layer dimension. In a shape a letter is a size that must be
the same wherever it stands, and "3W" three times W.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import flax
import numpy as np

from jepa_vl.model import two_tower

HEADS = {width: heads for width, _, heads in two_tower.SIZES.values()}  # no file says them


class Layout(NamedTuple):
  """What makes our array of theirs, and theirs of ours."""

  ours: Callable
  theirs: Callable


def _split_qkv(x):
  """(..., 3W) -> (..., 3, H, K)."""
  return x.reshape(*x.shape[:-1], 3, HEADS[x.shape[-1] // 3], -1)


def _join_qkv(x):
  return x.reshape(*x.shape[:-3], -1)


def _split_heads(x):
  """(W, W) -> (H, K, W)."""
  return x.reshape(HEADS[x.shape[0]], -1, x.shape[-1])


def _join_heads(x):
  return x.reshape(-1, x.shape[-1])


def _split_patch(x):
  """(p p 3, W), pixels as row, column, channel -> (W, 3, p, p)."""
  p = math.isqrt(x.shape[0] // 3)
  return x.reshape(p, p, 3, -1).transpose(3, 2, 0, 1)


SAME = Layout(lambda x: x, lambda x: x)
FIRST = Layout(lambda x: x[0], lambda x: x[None])  # without a leading dimension of 1
LINEAR = Layout(np.transpose, np.transpose)  # PyTorch's Linear is (out, in)
PATCHES = Layout(lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]), _split_patch)
QKV = Layout(_split_qkv, _join_qkv)  # a bias, or a kernel (in, out)
QKV_LINEAR = Layout(lambda x: _split_qkv(x.T), lambda x: _join_qkv(x).T)
OUT = Layout(_split_heads, _join_heads)  # a kernel (in, out)
OUT_LINEAR = Layout(lambda x: _split_heads(x.T), lambda x: _join_heads(x).T)


def prefixed(table, theirs, ours):
  """The table with a prefix before each of their names and each of our paths."""
  return tuple((theirs + name, ours + path, *rest) for name, path, *rest in table)


def convert(table, flat, *, left_out):
  """Their {name: array} -> our nested tree of float32 arrays, without names matching `left_out`.

  Raises:
    ValueError: names are missing or unexpected or have another shape (all are listed), or the
      tower's width is none of two_tower.SIZES.
  """
  flat = {name: x for name, x in flat.items() if not re.search(left_out, name)}
  names = [_names(name, flat) for name, *_ in table]
  _check(table, names, flat)
  ours = {}
  for row, (name, path, layout, _) in zip(names, table, strict=True):
    layers = [layout.ours(flat[n]) for n in row]
    ours[path] = np.stack(layers) if "{}" in name else np.asarray(layers[0], order="C")
  return flax.traverse_util.unflatten_dict(ours, sep="/")


def _check(table, names, flat):
  """Raises ValueError unless `flat` has all `names` (per row of the table), no other, as shaped."""
  known = [name for row in names for name in row]
  missing = [name for name in known if name not in flat]
  unexpected = {name: describe(flat[name]) for name in sorted(flat.keys() - set(known))}
  sizes, other = {}, {}
  for row, (_, _, _, shape) in zip(names, table, strict=True):
    for name in row:
      if name in flat and not _fits(flat[name], shape, sizes):
        other[name] = (describe(flat[name]), _in_numbers(shape, sizes))
  if missing or unexpected or other:
    raise ValueError("what is in it does not fit:\n" + complaint(missing, unexpected, other))
  if "W" in sizes and sizes["W"] not in HEADS:
    raise ValueError(
      f"a tower of width {sizes['W']}, which no model.size has: {', '.join(map(str, HEADS))}"
    )


def invert(table, tree):
  """Our nested tree of arrays -> their {name: float32 array}, each in one piece of memory.

  Raises:
    ValueError: paths are missing or unexpected; all are listed.
  """
  flat = flax.traverse_util.flatten_dict(tree, sep="/")
  paths = [path for _, path, _, _ in table]
  missing = [path for path in paths if path not in flat]
  unexpected = {path: describe(flat[path]) for path in sorted(flat.keys() - set(paths))}
  if missing or unexpected:
    raise ValueError("the parameters do not fit:\n" + complaint(missing, unexpected, {}))
  theirs = {}
  for name, path, layout, _ in table:
    x = np.asarray(flat[path], np.float32)
    rows = {name.format(i): layer for i, layer in enumerate(x)} if "{}" in name else {name: x}
    theirs |= {n: np.asarray(layout.theirs(layer), order="C") for n, layer in rows.items()}
  return theirs


def complaint(missing, unexpected, other):
  """Lines that name every key: missing; unexpected {name: shape}; other {name: (found, wanted)}."""
  lines = [f"  missing: {name}" for name in missing]
  lines += [f"  unexpected: {name} {shape}" for name, shape in unexpected.items()]
  lines += [f"  other shape: {name} {a}, expected {b}" for name, (a, b) in other.items()]
  return "\n".join(lines)


def describe(x):
  """The shape in words, "(3, 4)", with the dtype before it if that is not float32."""
  return f"{tuple(x.shape)}" if x.dtype == np.float32 else f"{x.dtype} {tuple(x.shape)}"


def _names(name, flat):
  """Their names of one row, one per layer; as many layers as the file has under that prefix."""
  if "{}" not in name:
    return [name]
  layer = re.compile(re.escape(name.split("{}")[0]) + r"(\d+)\.")
  layers = {match[1] for match in map(layer.match, flat) if match}
  return [name.format(i) for i in range(max(len(layers), 1))]


def _parse(shape):
  """Of "3W 4": [(3, "W"), (4, "")]."""
  parts = [re.fullmatch(r"(\d*)([A-Z]?)", part).groups() for part in shape.split()]
  return [(int(factor or 1), letter) for factor, letter in parts]


def _fits(x, shape, sizes):
  """Whether x is float32 of this shape; a letter that is not in `sizes` takes what it meets."""
  parts = _parse(shape)
  if x.dtype != np.float32 or len(parts) != x.ndim:
    return False
  for size, (factor, letter) in zip(x.shape, parts, strict=True):
    if size != factor * (sizes.setdefault(letter, size // factor) if letter else 1):
      return False
  return True


def _in_numbers(shape, sizes):
  """The shape "3W N" as "(576, N)"; a letter that is not in `sizes` remains."""
  parts = [
    part if letter and letter not in sizes else str(factor * sizes.get(letter, 1))
    for part, (factor, letter) in zip(shape.split(), _parse(shape), strict=True)
  ]
  return f"({', '.join(parts)}{',' * (len(parts) == 1)})"
