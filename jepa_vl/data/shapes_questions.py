"""Questions about scenes of the `shapes` set, balanced: language alone gets no further than CHANCE.

What is asked and what is right are drawn first, evenly, and then a scene for them. The other way
round some answers are the likelier, since scenes with them are found more easily.
"""

import numpy as np

from jepa_vl.data import shapes, shapes_scene, shapes_text
from jepa_vl.data.shapes_scene import COLOUR_NAMES, CONVERSE, SHAPES, SPLITS

VERSION = 1  # goes up when the same options give another record
KINDS = tuple(shapes_text.ASKED)
# The best that is to be had in train, val and iid without the picture. Each shape has 6 colours;
# of 36 pairs of colour and shape, asked for equally often, one for each of the 7 colours is right.
CHANCE = {"colour": 1 / 6, "shape": 7 / 36, "count": 1 / 4, "relation": 1 / 2, "presence": 1 / 2}
# How many objects there are at least: of three, an absent pair's colour and shape can be on two.
_LEAST = {"relation": 2, "presence": 3}


class ShapesQuestions:
  """`size` questions, of each of KINDS in turn, each about a scene of its own.

  options, split: as of Shapes, but for `objects`. Held-out splits hold out here as well: those of
  `pairs` ask for unseen pairs, those of `relations` for unseen relations, and answers to "how many"
  in `counts` are never right in train. There, text that train never has may tell the answer.

  A record is `image` (PNG), `question`, `answers` (one), `choices`, `kind` and, as texts,
  `question_id` and `image_id`.

  Raises:
    ValueError: an unknown split or option, or a number that cannot be.
  """

  def __init__(self, options, split):
    self._scenes = shapes.Shapes(options, split)
    if "objects" in options:
      raise ValueError(
        f"option `objects` in {options!r} is not for the shapes set's questions: how many there "
        "are is one of them"
      )

  def __len__(self):
    return len(self._scenes)

  def __getitem__(self, index):
    """The record at `index`."""
    record, contents, rng = self._ask(index)
    propose = lambda: shapes_scene.lay_out(rng, *contents)
    scene, samples, _ = shapes.seen(propose, self._scenes.side)
    return record | {"image": shapes.picture(rng, scene, samples)}

  def asked(self, index):
    """The record at `index` without its image."""
    return self._ask(index)[0]

  def scene(self, index):
    """The Scene of the record at `index`."""
    _, contents, rng = self._ask(index)
    return shapes.seen(lambda: shapes_scene.lay_out(rng, *contents), self._scenes.side)[0]

  def told(self, index):
    """What the image at `index` shows, for what reads and does not see: [(y, x, words)].

    y, x: where it is, as shares of the image's sides.
    """
    return shapes_text.told(self.scene(index))

  def _ask(self, index):
    """The record without its image, what its scene holds, and the generator for the rest."""
    index, split = range(len(self))[index], self._scenes.split
    # The last number sets it apart from the generators of Shapes.
    seed = VERSION, self._scenes.seed, list(SPLITS).index(split), index, 1
    rng, kind = np.random.default_rng(seed), KINDS[index % len(KINDS)]
    counts = [n for n in shapes_scene.counts(split) if n >= _LEAST.get(kind, 1)]
    count = counts[rng.integers(len(counts))]

    def draw(fits):
      while True:
        found = shapes_scene.draw_pairs(rng, split, count)
        if found and fits([tuple(pair) for pair in found[0].tolist()]):
          return found

    names, answer, contents = _ASK[kind](rng, split, draw)
    record = {
      "question": shapes_text.ASKED[kind].format(*names), "answers": [answer],
      "choices": list(shapes_text.CHOICES[kind]), "kind": kind,
    }  # fmt: skip
    return record | {"question_id": str(index), "image_id": str(index)}, contents, rng

  def where(self, index):
    """What names the record at `index`."""
    return f"{self._scenes.split} question {index} of the shapes set"

  @property
  def identity(self):
    """Changes with all that decides what the records are."""
    return f"questions version {VERSION}, {self._scenes.identity}"


# By kind: function (rng, split, draw) -> names in the question, answer, what `lay_out` takes.
# draw(fits): what a scene of the split holds, drawn until its (colour, shape) pairs fit.


def _ask_of_pair(rng, split, draw, given):
  """The other of colour and shape, where `given` (0: colour, 1: shape) is one object's alone."""
  target = _target(rng, split)
  shares = lambda pairs: [pair for pair in pairs if pair[given] == target[given]]
  names = COLOUR_NAMES[target[0]], SHAPES[target[1]]
  return (names[given],), names[1 - given], draw(lambda pairs: shares(pairs) == [target])


def _ask_count(rng, split, draw):
  contents = draw(lambda pairs: True)
  return (), shapes_text.NUMBERS[len(contents[0])], contents


def _ask_relation(rng, split, draw):
  """Of the first two objects; said in either direction, and true or exchanged."""
  drawn = tuple(CONVERSE)[rng.integers(len(CONVERSE))]

  def known(pairs):
    a, b = (SHAPES[shape] for _, shape in pairs[:2])
    return not (shapes_scene.is_unseen(a, drawn, b) or shapes_scene.is_unseen(b, drawn, a))

  pairs, said, novel = draw(lambda pairs: split == "relations" or known(pairs))
  relation = said = said or drawn
  a, b = (f"{COLOUR_NAMES[colour]} {SHAPES[shape]}" for colour, shape in pairs[:2])
  if rng.random() < 0.5:
    a, relation, b = b, CONVERSE[relation], a
  yes = rng.random() < 0.5
  names = (a, relation, b) if yes else (b, relation, a)
  return names, "yes" if yes else "no", (pairs, said, novel)


def _ask_presence(rng, split, draw):
  """Of a pair that is there, or is not but has its colour and its shape there."""
  target, yes = _target(rng, split), rng.random() < 0.5

  def fits(pairs):
    colours, shapes_ = zip(*pairs, strict=True)
    return (target in pairs) == yes and target[0] in colours and target[1] in shapes_

  names = (f"{COLOUR_NAMES[target[0]]} {SHAPES[target[1]]}",)
  return names, "yes" if yes else "no", draw(fits)


def _target(rng, split):
  """A pair to ask for: (colour, shape)."""
  pool = shapes_scene.UNSEEN_ROWS if split == "pairs" else shapes_scene.SEEN_ROWS
  return tuple(pool[rng.integers(len(pool))].tolist())


_ASK = {
  "colour": lambda rng, split, draw: _ask_of_pair(rng, split, draw, 1),
  "shape": lambda rng, split, draw: _ask_of_pair(rng, split, draw, 0),
  "count": _ask_count,
  "relation": _ask_relation,
  "presence": _ask_presence,
}
