"""What a scene of the `shapes` set holds: objects, where they stand, and what train never shows.

Lengths are shares of the image's side, y grows downward. An object stands with its lowest point on
the ground, which is seen from above: the lower it stands, the nearer and the larger it is, and what
is nearer hides what is farther. So depth follows from the picture: `depth_of` is exact.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")
# Hues far enough apart to be told in any light of `shapes.py`; RGB.
COLOURS = {
  "red": (225, 45, 40),
  "yellow": (240, 215, 45),
  "green": (55, 175, 65),
  "cyan": (60, 205, 215),
  "blue": (50, 85, 225),
  "purple": (145, 65, 215),
  "pink": (245, 95, 180),
}
COLOUR_NAMES = tuple(COLOURS)
MOST = 5  # objects

# What no scene of train, val and iid holds, and every scene of the split of that name does.
UNSEEN_PAIRS = (
  ("red", "circle"),
  ("purple", "square"),
  ("cyan", "triangle"),
  ("yellow", "star"),
  ("blue", "cross"),
  ("green", "ring"),
)
UNSEEN_COUNTS = (4,)
# Of the centres, by however little; the same said the other way round is unseen, too.
UNSEEN_RELATIONS = (
  ("circle", "left of", "square"),
  ("star", "left of", "triangle"),
  ("ring", "in front of", "cross"),
  ("square", "in front of", "star"),
)
CONVERSE = {"left of": "right of", "in front of": "behind"}
CONVERSE |= {b: a for a, b in CONVERSE.items()}

SPLITS = {
  "train": "without unseen pairs, counts and relations",
  "val": "as train; for choosing hyper-parameters",
  "iid": "as train",
  "pairs": "a colour on a shape that train never has together, in every image",
  "counts": "numbers of objects that train never has",
  "relations": "relations between shapes that train never has, in every image",
}

NEAREST, FARTHEST = 2000, 4000  # mm
WALL = 8000  # mm, the background
_HORIZON = -0.25  # above the image
_LOWEST = 0.97  # where an object at NEAREST stands
_HIGHEST = _HORIZON + (_LOWEST - _HORIZON) * NEAREST / FARTHEST
RADII = (0.17, 0.25)  # by size, at NEAREST; of the circle that an object fits in
_TURN = math.radians(15)  # at most, either way
# By how much two centres, or the two lines they stand on, must differ for a relation to be said.
MARGIN = 0.12
_APART = 0.45  # distance of two centres over the sum of their radii, at least
_TRIED = 32  # layouts that are drawn at once


class Object(NamedTuple):
  """shape, colour, size, texture: places in SHAPES, ...; x, y: the centre; depth in mm; radius: of
  the circle it fits in; turn: radians."""

  shape: int
  colour: int
  size: int
  texture: int
  x: float
  y: float
  depth: int
  radius: float
  turn: float

  @property
  def pair(self):
    """(colour, shape): no two objects of a scene share it."""
    return COLOUR_NAMES[self.colour], SHAPES[self.shape]


class Scene(NamedTuple):
  """objects: nearest first. first, relation, second: what the captions say of two of them; of a
  single object ("" and 0)."""

  objects: tuple
  first: int
  relation: str
  second: int


def depth_of(y):
  """The depth in mm of what stands at height y of the image."""
  return round(NEAREST * (_LOWEST - _HORIZON) / (y - _HORIZON))


def is_unseen(first, relation, second):
  """Whether train never has a shape in this relation to another. Names -> bool."""
  said_otherwise = (second, CONVERSE[relation], first)
  return (first, relation, second) in UNSEEN_RELATIONS or said_otherwise in UNSEEN_RELATIONS


def counts(split):
  """The numbers of objects that a split's scenes have, all equally often."""
  if split == "counts":
    return UNSEEN_COUNTS
  least = 2 if split == "relations" else 1
  return tuple(n for n in range(least, MOST + 1) if n not in UNSEEN_COUNTS)


def _polygon(corners, inner=1.0, start=-math.pi / 2):
  """(corners, 2) points on the unit circle from the top on; every second one at `inner`."""
  angles = start + np.arange(corners) * 2 * math.pi / corners
  lengths = np.where(np.arange(corners) % 2, inner, 1.0)
  return np.stack([np.cos(angles), np.sin(angles)], 1) * lengths[:, None]


def _cross(arm=0.36):
  length = math.sqrt(1 - arm**2)
  quarter = [(-arm, -length), (arm, -length), (arm, -arm)]
  turns = [np.array([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]])
           for a in np.arange(4) * math.pi / 2]  # fmt: skip
  return np.concatenate([np.array(quarter) @ turn for turn in turns])


# Shape: its closed contours within the unit circle, the second a hole. Areas are alike.
OUTLINES = {
  "circle": (0.85 * _polygon(32),),
  "square": (_polygon(4, start=-math.pi / 4),),
  "triangle": (_polygon(3),),
  "star": (_polygon(10, inner=0.5),),
  "cross": (_cross(),),
  "ring": (0.95 * _polygon(32), 0.5 * _polygon(32)),
}


def _shoelace(points):
  x, y = points.T
  return abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


# By shape, of radius 1.
AREAS = tuple(
  float(_shoelace(OUTLINES[name][0]) - sum(_shoelace(hole) for hole in OUTLINES[name][1:]))
  for name in SHAPES
)


def contours(o):
  """An object's contours in the image: list of (points, 2)."""
  cos, sin = math.cos(o.turn) * o.radius, math.sin(o.turn) * o.radius
  rotation = np.array([[cos, sin], [-sin, cos]])
  return [points @ rotation + (o.x, o.y) for points in OUTLINES[SHAPES[o.shape]]]


def _reach(shapes, turns):
  """How far below its centre a shape of radius 1 goes. (n,), (n,) -> (n,)."""
  return np.array([
    np.max(OUTLINES[SHAPES[s]][0] @ (math.sin(t), math.cos(t)))
    for s, t in zip(shapes, turns, strict=True)
  ])  # fmt: skip


_ALL_PAIRS = np.array([(c, s) for c in range(len(COLOURS)) for s in range(len(SHAPES))])
_IS_UNSEEN = np.array([(COLOUR_NAMES[c], SHAPES[s]) in UNSEEN_PAIRS for c, s in _ALL_PAIRS])
SEEN_ROWS, UNSEEN_ROWS = _ALL_PAIRS[~_IS_UNSEEN], _ALL_PAIRS[_IS_UNSEEN]


@functools.cache
def _unseen_by_shape():
  """(shape, shape) -> 0 if the first is never left of the second, 1: in front of it."""
  axis = {"left of": 0, "in front of": 1}
  return {(SHAPES.index(a), SHAPES.index(b)): axis[r] for a, r, b in UNSEEN_RELATIONS}


def propose(rng, split, count):
  """A random scene of `count` objects by the split's rules, or None if none was found at once.

  Objects overlap, but how much of each is seen is for the caller to look at.
  """
  found = draw_pairs(rng, split, count)
  return lay_out(rng, *found) if found else None


def lay_out(rng, pairs, said, novel):
  """A random scene of these objects, or None if none was found at once.

  Args:
    pairs: (count, 2) colours and shapes; said: the relation of the first to the second, "" for any;
    novel: whether relations that train never has may be.
  """
  count = len(pairs)
  colours, shapes = pairs.T
  sizes, textures = rng.integers((len(SIZES),) * count), rng.integers((len(TEXTURES),) * count)
  turns = rng.uniform(-_TURN, _TURN, count)
  # Rounded first: depth and radius are then exactly those of where the object stands.
  base = rng.uniform(_HIGHEST, _LOWEST, (_TRIED, count))
  depth = np.rint(NEAREST * (_LOWEST - _HORIZON) / (base - _HORIZON))
  radius = np.take(RADII, sizes) * NEAREST / depth
  x = radius + (1 - 2 * radius) * rng.random((_TRIED, count))
  y = base - _reach(shapes, turns) * radius
  good = np.flatnonzero(_allowed(shapes, x, y, base, radius, said, novel))
  if not len(good):
    return None
  k = good[0]
  columns = (shapes, colours, sizes, textures, x[k], y[k], depth[k].astype(int), radius[k], turns)
  objects = [Object(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]
  if count == 1:
    return Scene(tuple(objects), 0, "", 0)
  relation = said or _relation(rng, x[k], base[k])
  order = sorted(range(count), key=lambda i: objects[i].depth)
  first, second = order.index(0), order.index(1)
  if rng.random() < 0.5:
    first, relation, second = second, CONVERSE[relation], first
  return Scene(tuple(objects[i] for i in order), first, relation, second)


def draw_pairs(rng, split, count):
  """What a scene of a split holds, as `lay_out` takes it, or None if it may not be.

  Returns:
    (count, 2) colours and shapes, no two rows alike, the first two of which differ in both; the
    relation of the first to the second that the split demands, or ""; whether it demands one.
  """
  unseen = UNSEEN_RELATIONS[rng.integers(len(UNSEEN_RELATIONS))] if split == "relations" else None
  pairs = SEEN_ROWS[rng.permutation(len(SEEN_ROWS))]
  if split == "pairs":
    pairs = np.concatenate([UNSEEN_ROWS[rng.integers(len(UNSEEN_ROWS))][None], pairs])
  elif unseen:
    ends = [pairs[pairs[:, 1] == SHAPES.index(unseen[i])][0] for i in (0, 2)]
    rest = [p for p in pairs[: count + 2] if not any((p == end).all() for end in ends)]
    pairs = np.stack(ends + rest)
  pairs = pairs[:count]
  if count > 1 and (pairs[0] == pairs[1]).any():
    return None
  return pairs, unseen[1] if unseen else "", bool(unseen)


def _allowed(shapes, x, y, base, radius, said, novel):
  """Which of the layouts (K, n) may be: (K,) bool."""
  good, n = np.ones(len(x), bool), len(shapes)
  place = x, -base  # what is in front stands lower
  for i in range(n):
    for j in range(i + 1, n):
      apart = np.hypot(x[:, i] - x[:, j], y[:, i] - y[:, j])
      good &= apart >= _APART * (radius[:, i] + radius[:, j])
    for j in range(n):
      axis = _unseen_by_shape().get((shapes[i], shapes[j]))
      if axis is not None and not novel:
        good &= place[axis][:, i] > place[axis][:, j]
  if said:
    value = place[0 if said in ("left of", "right of") else 1]
    first, second = (0, 1) if said in ("left of", "in front of") else (1, 0)
    good &= value[:, second] - value[:, first] >= MARGIN
  elif n > 1:
    good &= np.maximum(abs(x[:, 0] - x[:, 1]), abs(base[:, 0] - base[:, 1])) >= MARGIN
  return good


def _relation(rng, x, base):
  """What is said of object 0 and object 1."""
  may = []
  if abs(x[0] - x[1]) >= MARGIN:
    may.append("left of" if x[0] < x[1] else "right of")
  if abs(base[0] - base[1]) >= MARGIN:
    may.append("in front of" if base[0] > base[1] else "behind")
  return may[rng.integers(len(may))]
