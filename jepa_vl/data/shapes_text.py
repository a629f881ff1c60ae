"""What the `shapes` set says of a scene: captions, hard negatives, questions. No article "an" and
no plural hang on what is swapped, so that a negative has the caption's words to the last one."""

import re

from jepa_vl.data.shapes_scene import (
  COLOUR_NAMES,
  CONVERSE,
  FARTHEST,
  NEAREST,
  SHAPES,
  SIZES,
  TEXTURES,
  UNSEEN_PAIRS,
  is_unseen,
)  # fmt: skip

NUMBERS = ("no", "one", "two", "three", "four", "five")
# By kind: what is asked, and what may be answered.
ASKED = {
  "colour": "what colour is the {}?",
  "shape": "what shape is the {} object?",
  "count": "how many objects are there?",
  "relation": "is the {} {} the {}?",
  "presence": "is there a {}?",
}
CHOICES = {
  "colour": COLOUR_NAMES, "shape": SHAPES, "count": NUMBERS[1:], "relation": ("yes", "no"),
  "presence": ("yes", "no"),
}  # fmt: skip

# {a}, {b}: colour and shape; {A}, {B}: size and texture before them; {is}: the relation; {n}: how
# many objects; {rest}: names the others, if there are any.
_TWO = (
  "a {a} {is} a {b}",
  "a {A} {is} a {B}",
  "{is} a {b} there is a {a}",
  "the {a} is {is} the {b}{rest}",
  "{n} objects: a {a} {is} a {b}{rest}",
)
_ONE = (
  "a {a}",
  "a {A}",
  "there is a {a}",
  "a {shape} that is {colour}",
  "{n} {colour} object: a {shape}",
)


def captions(scene):
  """The five captions of a scene, all true."""
  return [_fill(template, scene) for template in _templates(scene)]


def _templates(scene):
  return _TWO if scene.relation else _ONE


def _fill(template, scene, *, swap=""):
  """swap: "colour" has the two objects exchange their colours, "relation" their places."""
  a, b = scene.objects[scene.first], scene.objects[scene.second]
  rest = [o for o in scene.objects if o is not a and o is not b]
  if swap == "colour":
    a, b = a._replace(colour=b.colour), b._replace(colour=a.colour)
  elif swap == "relation":
    a, b = b, a
  also = " and ".join("a " + " ".join(o.pair) for o in rest)
  words = {"a": " ".join(a.pair), "b": " ".join(b.pair), "A": _full(a), "B": _full(b)}
  words |= {"colour": a.pair[0], "shape": a.pair[1]}
  words |= {"is": scene.relation, "n": NUMBERS[len(scene.objects)]}
  return template.format(**words, rest=f" with {also}" if also else "")


def _full(o):
  return " ".join((SIZES[o.size], TEXTURES[o.texture], *o.pair))


def negatives(scene, number):
  """Hard negatives of caption `number`: its words in another order, false of the scene.

  None says what train never says: being unheard of alone would give it away. Where that leaves
  nothing, as of a single object, the list is empty.

  Returns:
    {"colour": [...], "relation": [...]}, each of one caption at most.
  """
  found = {"colour": [], "relation": []}
  if not scene.relation:
    return found
  a, b = scene.objects[scene.first], scene.objects[scene.second]
  template = _templates(scene)[number]
  swapped = {(b.pair[0], a.pair[1]), (a.pair[0], b.pair[1])}
  there = {o.pair for o in scene.objects}
  if not swapped & set(UNSEEN_PAIRS) and not swapped <= there:
    found["colour"].append(_fill(template, scene, swap="colour"))
  if not is_unseen(b.pair[1], scene.relation, a.pair[1]):
    found["relation"].append(_fill(template, scene, swap="relation"))
  return found


def questions(rng, scene, split):
  """At most one question of each type of ASKED, about a scene as it fell.

  Whether "yes" or "no" is right is drawn before what is asked, and nothing is asked whose answer
  is the same all through train. But scenes are found more easily with some answers than with
  others, which language alone can learn: `shapes_questions` is without that.

  Returns:
    list of {"type", "question", "answer", "choices"}.
  """
  objects = scene.objects
  found = []
  for kind, given in (("colour", 1), ("shape", 0)):
    values = [o.pair[given] for o in objects]
    alone = [o for o in objects if values.count(o.pair[given]) == 1]
    if alone:
      o = alone[rng.integers(len(alone))]
      found.append(_question(kind, (o.pair[given],), o.pair[1 - given]))
  found.append(_question("count", (), NUMBERS[len(objects)]))
  for kind, ask in (("relation", _ask_relation), ("presence", _ask_presence)):
    yes = bool(rng.random() < 0.5)
    names = ask(rng, scene, split, yes)
    if names:
      found.append(_question(kind, names, "yes" if yes else "no"))
  return found


def _question(kind, names, answer):
  question = ASKED[kind].format(*names)
  return {"type": kind, "question": question, "answer": answer, "choices": list(CHOICES[kind])}


def _ask_relation(rng, scene, split, yes):
  if not scene.relation:
    return None
  a, b, relation = scene.objects[scene.first], scene.objects[scene.second], scene.relation
  if rng.random() < 0.5:
    a, relation, b = b, CONVERSE[relation], a
  unseen = any(is_unseen(x.pair[1], relation, y.pair[1]) for x, y in ((a, b), (b, a)))
  if unseen and split != "relations":
    return None
  if not yes:
    a, b = b, a
  return " ".join(a.pair), relation, " ".join(b.pair)


def _ask_presence(rng, scene, split, yes):
  there = [o.pair for o in scene.objects]
  if not yes:
    colour, shape = _absent(rng, there, split)
  elif split == "pairs":
    colour, shape = next(pair for pair in there if pair in UNSEEN_PAIRS)
  else:
    colour, shape = there[rng.integers(len(there))]
  return (f"{colour} {shape}",)


def _absent(rng, there, split):
  """A pair that is not there, of a colour and a shape that are; else of one of them."""
  colours, shapes = ({pair[i] for pair in there} for i in (0, 1))
  both = [(c, s) for c in COLOUR_NAMES for s in SHAPES if c in colours and s in shapes]
  one = [(c, s) for c in COLOUR_NAMES for s in SHAPES if (c in colours) != (s in shapes)]
  for pairs in (both, one):
    pairs = [p for p in pairs if p not in there and (split == "pairs" or p not in UNSEEN_PAIRS)]
    if pairs:
      return pairs[rng.integers(len(pairs))]


def vocabulary():
  """Every word that captions, questions and answers use, in texts of several."""
  relations = " ".join(CONVERSE)
  names = " ".join((*COLOUR_NAMES, *SHAPES, *SIZES, *TEXTURES, *NUMBERS, "yes", "no"))
  asked = "what colour shape is the object? how many objects are there? is there a?"
  said = " ".join((*_TWO, *_ONE, "with and"))
  return [relations, names, asked, re.sub(r"\{\w+\}", " ", said)]


_STEPS = 10  # along the image's side, and from far to near


def told(scene):
  """All of a scene that questions are about, by object: (y, x) of its centre, "red ring x3 y7".

  x counts from the left and y toward the front.
  """
  found = []
  for o in scene.objects:
    front = (FARTHEST - o.depth) / (FARTHEST - NEAREST)
    x, y = (min(int(_STEPS * share), _STEPS - 1) for share in (o.x, front))
    found.append((o.y, o.x, f"{' '.join(o.pair)} x{x} y{y}"))
  return found
