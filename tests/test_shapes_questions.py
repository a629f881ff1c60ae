"""The shapes set's questions: their answers are true, and language alone does not know them."""

import collections
import itertools
import re

import msgpack
import numpy as np
import pytest
import scipy.stats

from jepa_vl.data import shapes, shapes_questions, shapes_scene, shapes_text, sources, tokenizer
from jepa_vl.data.shapes_questions import CHANCE, KINDS
from jepa_vl.data.shapes_scene import COLOUR_NAMES, SHAPES, SPLITS, UNSEEN_PAIRS

COUNT = 100  # records that are looked at
_PAIR = rf"({'|'.join(COLOUR_NAMES)}) ({'|'.join(SHAPES)})"
_RELATION = f"({'|'.join(shapes_scene.CONVERSE)})"


def asked(split, count, seed=0):
  source = shapes_questions.ShapesQuestions(f"size={count},seed={seed}", split)
  return [source.asked(i) for i in range(count)]


def holds(a, relation, b):
  """Whether it is so by the objects' places."""
  return {
    "left of": a.x < b.x, "right of": a.x > b.x,
    "in front of": a.depth < b.depth, "behind": a.depth > b.depth,
  }[relation]  # fmt: skip


def truth(question, kind, scene):
  """The answer, from the question's words and the objects alone."""
  where = {o.pair: o for o in scene.objects}
  assert len(where) == len(scene.objects)
  if kind == "count":
    return shapes_text.NUMBERS[len(where)]
  if kind == "relation":
    match = re.fullmatch(f"is the {_PAIR} {_RELATION} the {_PAIR}\\?", question)
    a, b = where[match[1], match[2]], where[match[4], match[5]]
    return "yes" if holds(a, match[3], b) else "no"
  if kind == "presence":
    return "yes" if re.fullmatch(f"is there a {_PAIR}\\?", question).groups() in where else "no"
  what = re.fullmatch(r"what colour is the (\w+)\?|what shape is the (\w+) object\?", question)
  (found,) = [pair for pair in where if (what[1] or what[2]) == pair[kind == "colour"]]
  return found[kind == "shape"]


@pytest.mark.parametrize("split", list(SPLITS))
def test_answers_are_true_and_held_out_splits_hold_their_novelty(split):
  source = sources.open_source("shapes_questions", f"size={COUNT}", split)
  for i in range(COUNT):
    record, scene = source.asked(i), source.scene(i)
    question, kind, (answer,) = record["question"], record["kind"], record["answers"]
    assert kind == KINDS[i % len(KINDS)] and answer in record["choices"]
    assert answer == truth(question, kind, scene)
    pairs = {o.pair for o in scene.objects}
    assert bool(pairs & set(UNSEEN_PAIRS)) == (split == "pairs")
    assert (len(pairs) in shapes_scene.UNSEEN_COUNTS) == (split == "counts")
    unseen = [
      (a, b) for a, b in itertools.permutations(scene.objects, 2)
      for relation in ("left of", "in front of")
      if holds(a, relation, b) and shapes_scene.is_unseen(a.pair[1], relation, b.pair[1])
    ]  # fmt: skip
    assert bool(unseen) == (split == "relations")
    if split != "pairs":
      assert not any(" ".join(pair) in question for pair in UNSEEN_PAIRS)
    elif kind in ("colour", "shape"):
      (novel,) = pairs & set(UNSEEN_PAIRS)
      assert answer in novel and novel[KINDS.index(kind) == 0] in question
    if kind == "relation":
      a, relation, b = re.search(f"{_PAIR} {_RELATION} the {_PAIR}", question).group(2, 3, 5)
      told = shapes_scene.is_unseen(a, relation, b) or shapes_scene.is_unseen(b, relation, a)
      assert told == (split == "relations")


def test_absent_pairs_have_their_colour_and_their_shape_in_the_scene():
  """Whichever is true, so that neither word alone tells."""
  source = shapes_questions.ShapesQuestions("size=300", "iid")
  answers = collections.Counter()
  for i in range(KINDS.index("presence"), 300, len(KINDS)):
    record = source.asked(i)
    colours, names = zip(*(o.pair for o in source.scene(i).objects), strict=True)
    colour, shape = re.search(_PAIR, record["question"]).groups()
    assert colour in colours and shape in names
    answers[record["answers"][0]] += 1
  assert min(answers.values()) > 15


def question_only(train, test):
  """{kind: (right, asked)} of the commonest answer to each question of `train`, on `test`."""
  seen, found = collections.defaultdict(collections.Counter), {}
  for record in train:
    seen[record["question"]][record["answers"][0]] += 1
  for kind in KINDS:
    some = [r for r in test if r["kind"] == kind]
    best = [max(seen[r["question"]] or ["?"], key=seen[r["question"]].get) for r in some]
    right = sum(b == r["answers"][0] for b, r in zip(best, some, strict=True))
    found[kind] = right, len(some)
  return found


def check_chance(found):
  for kind, (right, count) in found.items():
    sigma = (count * CHANCE[kind] * (1 - CHANCE[kind])) ** 0.5
    assert abs(right - count * CHANCE[kind]) < 4 * sigma, (kind, right / count)


def by_shapes(records):
  """Relation questions without their colours, of which few are asked twice."""
  plain = lambda text: re.sub(rf"({'|'.join(COLOUR_NAMES)}) ", "", text)
  return [r | {"question": plain(r["question"])} if r["kind"] == "relation" else r for r in records]


def test_language_alone_is_at_chance():
  train, test = asked("train", 4000), asked("iid", 2000)
  check_chance(question_only(by_shapes(train), by_shapes(test)))


@pytest.mark.slow
def test_language_alone_is_at_chance_after_many_questions():
  """Questions about scenes as they fall were found out at 52% of relations by 40,000 of these."""
  train, test = asked("train", 150_000), asked("iid", 75_000)
  check_chance(question_only(train, test))
  check_chance(question_only(by_shapes(train), by_shapes(test)))


def test_every_answer_to_a_question_is_as_frequent():
  """Chi-square over all pairs of question and answer; yes against no where not all are asked as
  often, of relations between shapes and of relations alone."""
  records = asked("train", 5000, seed=1)
  of = lambda kind: [(r["question"], r["answers"][0]) for r in records if r["kind"] == kind]
  for kind, cells in {"colour": 36, "shape": 36, "count": 4, "presence": 72}.items():
    counts = collections.Counter(of(kind))
    assert len(counts) == cells and scipy.stats.chisquare(list(counts.values())).pvalue > 1e-4
  for words, texts in ((COLOUR_NAMES, 104), ((*COLOUR_NAMES, *SHAPES), 4)):
    plain = lambda text, words=words: re.sub(rf"\b({'|'.join(words)})\b", "", text)
    counts = collections.Counter((plain(q), a) for q, a in of("relation"))
    pairs = [(counts[q, "yes"], counts[q, "no"]) for q in {q for q, _ in counts}]
    statistic = sum((a - b) ** 2 / (a + b) for a, b in pairs)
    assert len(pairs) == texts and scipy.stats.chi2.sf(statistic, texts) > 1e-4


def test_the_question_does_not_hang_on_how_easily_its_scene_is_found(monkeypatch):
  """The layouts that fail, here most of them, change the picture and nothing else."""
  source = shapes_questions.ShapesQuestions("size=50", "iid")
  expected = [source.asked(i) for i in range(10)]
  of_scenes = [source.scene(i) for i in range(10)]
  lay_out, calls = shapes_scene.lay_out, itertools.count()

  def rarely(*args):
    scene = lay_out(*args)
    return scene if next(calls) % 5 == 4 else None

  monkeypatch.setattr(shapes_scene, "lay_out", rarely)
  found = [source[i] for i in range(10)]
  assert [{k: v for k, v in r.items() if k != "image"} for r in found] == expected
  assert [source.scene(i) for i in range(10)] != of_scenes


def test_the_picture_is_that_of_the_scene(monkeypatch):
  source, drawn = shapes_questions.ShapesQuestions("", "val"), []
  picture = shapes.picture
  keep = lambda rng, scene, samples: drawn.append(scene) or picture(rng, scene, samples)
  monkeypatch.setattr(shapes, "picture", keep)
  for i in range(5):
    assert source[i]["image"].startswith(b"\x89PNG")
  assert drawn == [source.scene(i) for i in range(5)]


def test_a_record_is_a_function_of_its_place():
  make = shapes_questions.ShapesQuestions
  a, b = make("", "train"), make("", "train")
  assert len(a) == 100_000 and a[3] == b[3] == a[3 - len(a)]
  assert msgpack.unpackb(msgpack.packb(a[7])) == a[7]  # all of it travels
  others = [a[8], make("seed=1", "train")[7], make("", "val")[7]]
  others.append(shapes.Shapes("", "train")[7])
  assert all(other["image"] != a[7]["image"] for other in others)
  known = {make(o, s).identity for o in ("", "seed=1", "side=32") for s in SPLITS}
  assert len(known | {shapes.Shapes("", "train").identity}) == 3 * len(SPLITS) + 1


def test_every_word_is_a_token():
  tok = tokenizer.load("shapes")
  texts = [f"{r['question']} {r['answers'][0]}" for r in asked("train", 200)]
  _, mask, cut = tokenizer.tokenize(tok, texts, length=26, readout="eot")
  words = np.array([len(re.findall(r"\w+|\?", text)) for text in texts])
  assert not cut.any() and (mask.sum(axis=1) == words + 1).all()


@pytest.mark.parametrize(("options", "split", "words"), [
  ("objects=2", "train", "`objects` in 'objects=2' is not for the shapes set's questions"),
  ("side=8", "train", "side=8 must be 16 to 1024"),
  ("", "test", "unknown split 'test' of the shapes set"),
])  # fmt: skip
def test_bad_options_are_named(options, split, words):
  with pytest.raises(ValueError, match=words):
    sources.open_source("shapes_questions", options, split)


def test_a_scene_told_in_words_holds_every_answer():
  """All objects where they are, with words that tell left from right and near from far."""
  source = shapes_questions.ShapesQuestions("size=200", "train")
  for i in range(200):
    scene, told = source.scene(i), source.told(i)
    assert [(y, x) for y, x, _ in told] == [(o.y, o.x) for o in scene.objects]
    parts = [words.split() for *_, words in told]
    assert [tuple(p[:2]) for p in parts] == [o.pair for o in scene.objects]
    xs, fronts = ([(p[k][0], int(p[k][1:])) for p in parts] for k in (2, 3))
    assert {name for name, _ in xs} == {"x"} and {name for name, _ in fronts} == {"y"}
    assert all(0 <= place <= 9 for _, place in xs + fronts)
    by_x = np.argsort([o.x for o in scene.objects])
    assert [xs[k] for k in by_x] == sorted(xs)
    assert fronts == sorted(fronts, reverse=True)  # objects come nearest first
