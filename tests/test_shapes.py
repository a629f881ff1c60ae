"""What the shapes set says of its scenes is true of the pixels, and held-out splits hold it out."""

import collections
import itertools
import re

import cv2
import msgpack
import numpy as np
import pytest

from jepa_vl.data import shapes, shapes_scene, shapes_text, sources, tokenizer
from jepa_vl.data.shapes_scene import COLOUR_NAMES, SHAPES, SPLITS, UNSEEN_PAIRS

COUNT = 150  # records that are looked at


def picture(data):
  image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
  return image[..., ::-1] if image.ndim == 3 else image


@pytest.fixture(scope="module", params=list(SPLITS))
def split(request):
  """A split's source, and its first records with their scenes."""
  source = shapes.Shapes("size=1000", request.param)
  return source, [(source[i], source.scene(i)) for i in range(COUNT)]


def test_held_out_splits_hold_their_novelty_and_train_never_does(split):
  """In every scene, every caption, negative and question."""
  source, rows = split
  for record, scene in rows:
    pairs = {o.pair for o in scene.objects}
    assert len(pairs) == len(scene.objects)
    assert bool(pairs & set(UNSEEN_PAIRS)) == (source.split == "pairs")
    assert (len(pairs) in shapes_scene.UNSEEN_COUNTS) == (source.split == "counts")
    unseen = [
      (SHAPES[a.shape], relation, SHAPES[b.shape])
      for a, b in itertools.permutations(scene.objects, 2)
      for relation in ("left of", "in front of")
      if (SHAPES[a.shape], relation, SHAPES[b.shape]) in shapes_scene.UNSEEN_RELATIONS
      and (a.x < b.x if relation == "left of" else a.depth < b.depth)
    ]
    assert bool(unseen) == (source.split == "relations")
    said = " ".join([*record["captions"], *sum(record["negatives"].values(), [])])
    named = {p for p in UNSEEN_PAIRS if f"{p[0]} {p[1]}" in said}
    assert not named or source.split == "pairs"


def test_captions_are_true_of_what_is_seen(split):
  """Read back word by word and held against the class map, the depth map and the colours."""
  for record, scene in split[1]:
    classes, depth = picture(record["segmentation"]), picture(record["depth"])
    assert record["caption"] in record["captions"] and len(set(record["captions"])) == 5
    present = {SHAPES[c - 1] for c in np.unique(classes) if c}
    for caption in record["captions"]:
      named = re.findall(rf"({'|'.join(COLOUR_NAMES)}) ({'|'.join(SHAPES)})", caption)
      assert set(named) <= {o.pair for o in scene.objects} and {s for _, s in named} <= present
      number = re.match(rf"({'|'.join(shapes_text.NUMBERS)}) ", caption)
      if number:
        assert shapes_text.NUMBERS.index(number[1]) == len(scene.objects)
    where = {o.pair: o for o in scene.objects}
    for match in re.finditer(
      r"the (\w+) (\w+) is (left of|right of|in front of|behind) the (\w+) (\w+)",
      " ".join(record["captions"]),
    ):
      a, b = where[match[1], match[2]], where[match[4], match[5]]
      true = {
        "left of": a.x < b.x, "right of": a.x > b.x,
        "in front of": a.depth < b.depth, "behind": a.depth > b.depth,
      }  # fmt: skip
      assert true[match[3]]
    assert set(np.unique(depth)) == {shapes_scene.WALL} | {o.depth for o in scene.objects}
    assert ((depth == shapes_scene.WALL) == (classes == 0)).all()


def test_negatives_are_the_captions_words_and_false(split):
  kinds = collections.Counter()
  for record, scene in split[1]:
    for kind, texts in record["negatives"].items():
      for text in texts:
        kinds[kind] += 1
        assert sorted(text.split()) == sorted(record["caption"].split())
        assert text not in record["captions"]
        named = re.findall(rf"({'|'.join(COLOUR_NAMES)}) ({'|'.join(SHAPES)})", text)
        assert kind == "relation" or not set(named) <= {o.pair for o in scene.objects}
  assert min(kinds["colour"], kinds["relation"]) > COUNT / 5


def test_exchanged_colours_that_are_both_there_make_no_negative():
  """Of four objects in two colours and two shapes the exchanged caption would name what is seen."""
  place = lambda shape, colour, x, y: shapes_scene.Object(
    shape, colour, 0, 0, x, y, shapes_scene.depth_of(y), 0.1, 0.0
  )
  seen = [
    pair for pair in itertools.product(range(len(SHAPES)), range(len(COLOUR_NAMES)))
    if (COLOUR_NAMES[pair[1]], SHAPES[pair[0]]) not in UNSEEN_PAIRS
  ]  # fmt: skip
  (s, c), (t, d) = next(
    (a, b) for a, b in itertools.combinations(seen, 2)
    if a[0] != b[0] and a[1] != b[1] and {(a[0], b[1]), (b[0], a[1])} <= set(seen)
  )  # fmt: skip
  two = (place(s, c, 0.2, 0.9), place(t, d, 0.8, 0.7))
  four = (*two, place(s, d, 0.3, 0.5), place(t, c, 0.7, 0.4))
  for objects, expected in ((two, 1), (four, 0)):
    scene = shapes_scene.Scene(objects, 0, "left of", 1)
    assert all(
      len(shapes_text.negatives(scene, n)["colour"]) == expected
      for n in range(len(shapes_text.captions(scene)))
    )


def test_answers_are_right_and_balanced(split):
  yes = collections.Counter()
  for record, scene in split[1]:
    pairs = {o.pair for o in scene.objects}
    for q in record["questions"]:
      assert q["answer"] in q["choices"]
      if q["type"] == "count":
        assert shapes_text.NUMBERS.index(q["answer"]) == len(pairs)
      elif q["type"] == "presence":
        pair = tuple(re.fullmatch(r"is there a (\w+) (\w+)\?", q["question"]).groups())
        assert (pair in pairs) == (q["answer"] == "yes")
        yes[q["answer"]] += 1
      elif q["type"] == "colour":
        shape = re.fullmatch(r"what colour is the (\w+)\?", q["question"])[1]
        assert [c for c, s in pairs if s == shape] == [q["answer"]]
      elif q["type"] == "shape":
        colour = re.fullmatch(r"what shape is the (\w+) object\?", q["question"])[1]
        assert [s for c, s in pairs if c == colour] == [q["answer"]]
  assert abs(yes["yes"] - yes["no"]) < 4 * COUNT**0.5


def slow_map(scene, side):
  """Whose each pixel's middle is, by a ray per pixel and edge; the nearest object last."""
  middle = (np.arange(side) + 0.5) / side
  x, y = np.meshgrid(middle, middle)
  found = np.zeros((side, side), int)
  for o in reversed(scene.objects):
    inside = np.zeros((side, side), bool)
    for points in shapes_scene.contours(o):
      for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        crosses = (y0 > y) != (y1 > y)
        with np.errstate(divide="ignore", invalid="ignore"):
          inside ^= crosses & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    found[inside] = o.shape + 1
  return found


def test_class_map_is_that_of_a_ray_per_pixel():
  """But for pixels whose middle lies on an edge: fillPoly takes them in."""
  source = shapes.Shapes("side=96", "val")
  for i in range(25):
    classes = picture(source[i]["segmentation"])
    assert (classes != slow_map(source.scene(i), 96)).mean() < 0.01


def test_objects_have_their_colours_and_are_seen():
  """On plain objects, hue by hue; and each shows the share that is promised."""
  source = shapes.Shapes("side=64,objects=1", "iid")
  looked = 0
  for i in range(60):
    record, (o,) = source[i], source.scene(i).objects
    inside = cv2.erode(picture(record["segmentation"]), np.ones((3, 3))) > 0
    if o.texture or inside.sum() < 10:
      continue
    looked += 1
    colour = picture(record["image"])[inside].mean(axis=0)
    unit = lambda v: np.asarray(v, float) / np.linalg.norm(v)
    names = [unit(v) @ unit(colour) for v in shapes_scene.COLOURS.values()]
    assert COLOUR_NAMES[int(np.argmax(names))] == o.pair[0]
    assert (record["shape"], record["colour"], record["count"]) == (o.shape, o.colour, 1)
  assert looked > 10
  full = shapes_scene.AREAS[o.shape] * (o.radius * 64) ** 2
  assert (picture(record["segmentation"]) > 0).sum() >= 0.6 * full


def test_nearer_is_lower_and_larger_and_hides():
  source = shapes.Shapes("", "val")
  for i in range(40):
    objects = source.scene(i).objects
    assert [o.depth for o in objects] == sorted(o.depth for o in objects)
    for o in objects:
      lowest = max(points[:, 1].max() for points in shapes_scene.contours(o))
      assert abs(shapes_scene.depth_of(lowest) - o.depth) <= 1
      scale = o.radius * o.depth / shapes_scene.NEAREST
      assert scale == pytest.approx(shapes_scene.RADII[o.size])


def test_a_record_is_a_function_of_its_place():
  a, b = shapes.Shapes("", "train"), shapes.Shapes("", "train")
  assert msgpack.packb(a[7]) == msgpack.packb(b[7])  # all of it travels
  others = [a[8], shapes.Shapes("seed=1", "train")[7], shapes.Shapes("", "val")[7]]
  assert all(other["image"] != a[7]["image"] for other in others)
  identities = {shapes.Shapes(o, s).identity for o in ("", "seed=1", "side=32") for s in SPLITS}
  assert len(identities) == 3 * len(SPLITS)


def test_every_word_is_a_token_and_captions_fit():
  tok = tokenizer.load("shapes")
  source = shapes.Shapes("", "train")
  captions = [c for i in range(100) for c in source[i]["captions"]]
  ids, mask, cut = tokenizer.tokenize(tok, captions, length=26, readout="eot")
  words = [len(re.findall(r"\w+|:", caption)) for caption in captions]
  assert not cut.any() and (mask.sum(axis=1) == np.array(words) + 1).all()


@pytest.mark.parametrize(("options", "split", "words"), [
  ("side=8", "train", "side=8 must be 16 to 1024"),
  ("colour=3", "train", "option 'colour=3' of the shapes set; expected side, size, seed, objects"),
  ("objects=4", "train", "scenes of the split 'train' have 1 or 2 or 3 or 5"),
  ("", "test", "unknown split 'test' of the shapes set; known: train, val, iid"),
])  # fmt: skip
def test_bad_options_are_named(options, split, words):
  with pytest.raises(ValueError, match=words):
    sources.open_source("shapes", options, split)
