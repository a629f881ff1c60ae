"""Scores of answers against cases worked out by hand from the published rules."""

import itertools

import numpy as np
import pytest

from jepa_vl.evals import vqa_scores


@pytest.mark.parametrize(("answer", "expected"), [
  # case and blanks
  ("Yes", "yes"), ("  yes \n", "yes"), ("ice\tcream", "ice cream"), ("", ""),
  ("Red  Car", "red car"),
  # numbers up to ten as words, and "none"; longer words stay
  ("two", "2"), ("Ten", "10"), ("zero", "0"), ("none", "0"), ("eleven", "eleven"),
  ("twenty one", "twenty 1"), ("someone", "someone"),
  # articles, wherever they stand; not within words
  ("a dog", "dog"), ("The end of the road", "end of road"), ("an", ""), ("theatre", "theatre"),
  # periods: kept before a digit alone
  ("yes.", "yes"), ("3.5", "3.5"), ("3.", "3"), (".5", ".5"), ("u.s.a.", "usa"), ("no. 7", "no 7"),
  ("v.2", "v.2"),
  # other signs: a blank between letters, nothing beside a blank
  ("t-shirt", "t shirt"), ("black/white", "black white"), ("red, white", "red white"),
  ("yes!", "yes"), ("what?!", "what"), ("(left)", "left"), ("black - white", "black white"),
  ("a-b c -d", "ab c d"), ('"stop"', "stop"), ("snow_board", "snow board"), ("3+4=7", "3 4 7"),
  ("e@mail", "e mail"), ("x; y", "x y"), ("back\\slash", "back slash"), ("{x}[y]", "x y"),
  ("<b>`c`", "b c"),
  # the apostrophe and the colon stay
  ("dog's", "dog's"), ("10:30", "10:30"), ("10:30 a.m.", "10:30 am"),
  # a comma between digits takes all signs of the answer away, without blanks
  ("1,000", "1000"), ("100,978", "100978"), ("1,000-2,000", "10002000"), ("1, 2", "1 2"),
  # contractions
  ("dont know", "don't know"), ("isnt", "isn't"), ("don't", "don't"), ("Cant", "can't"),
  ("couldnt've", "couldn't've"), ("couldn'tve", "couldn't've"), ("couldntve", "couldntve"),
  ("yall", "y'all"), ("y'allll", "y'all'll"), ("oclock", "o'clock"), ("10 oclock", "10 o'clock"),
  ("twas", "'twas"), ("'ows'at", "'ow's'at"), ("somebody'd", "somebodyd"), ("lets", "lets"),
  ("im", "im"), ("maam", "ma'am"),
  # in this order: signs, then numbers and articles, then contractions
  ("two-a", "2"), ("The three, dont!", "3 don't"),
])  # fmt: skip
def test_an_answer_is_normalised_by_the_published_rules(answer, expected):
  assert vqa_scores.normalise(answer) == expected


@pytest.mark.parametrize(("prediction", "answers", "expected"), [
  # of ten annotators n say it: leaving one of them out n - 1 are left
  ("yes", {"yes": 10}, 1.0),
  ("yes", {"yes": 4, "no": 6}, 1.0),
  ("yes", {"yes": 3, "no": 7}, 0.9),
  ("yes", {"yes": 2, "no": 8}, 0.6),
  ("yes", {"yes": 1, "no": 9}, 0.3),
  ("yes", {"no": 10}, 0.0),
  # what is compared is normalised on both sides
  ("Two.", {"2": 10}, 1.0),
  ("2", {"two": 3, "a few": 7}, 0.9),
  ("t shirt", {"t-shirt": 2, "shirt": 8}, 0.6),
  ("the dog", {"dog": 1, "a dog": 1, "cat": 8}, 0.6),
  ("shirt", {"t-shirt": 10}, 0.0),
  # one answer: that one, or not
  ("A dog!", {"dog": 1}, 1.0),
  ("dogs", {"dog": 1}, 0.0),
])  # fmt: skip
def test_vqa_accuracy_leaves_each_annotator_out(prediction, answers, expected):
  listed = [answer for answer, count in answers.items() for _ in range(count)]
  assert vqa_scores.vqa_accuracy(prediction, listed) == pytest.approx(expected)
  assert vqa_scores.vqa_accuracy(prediction, listed[::-1]) == pytest.approx(expected)


def test_vqa_accuracy_is_the_definition_s_loop():
  """Ten by ten, nothing counted together."""
  for yes in range(11):
    answers = ["yes"] * yes + ["no"] * (10 - yes)
    each = [
      min(sum(a == "yes" for a in answers[:i] + answers[i + 1 :]) / 3, 1) for i in range(10)
    ]
    assert vqa_scores.vqa_accuracy("yes", answers) == pytest.approx(np.mean(each))
  with pytest.raises(ValueError, match="without `answers`"):
    vqa_scores.vqa_accuracy("yes", [])


@pytest.mark.parametrize(("prediction", "answers", "expected"), [
  ("Traffic light.", ["traffic light"], 1), (" left ", ["left"], 1), ("yes", ["no"], 0),
  ("the left", ["left"], 0), ("two", ["2"], 0), ("", ["no"], 0), ("cat", ["dog", "cat"], 1),
  ("no", ["none"], 0), ("t-shirt", ["t shirt"], 0),
])  # fmt: skip
def test_exact_match_forgives_case_blanks_and_the_last_period(prediction, answers, expected):
  assert vqa_scores.exact_match(prediction, answers) == expected


@pytest.mark.parametrize(("answer", "expected"), [
  ("no", "no"), ("No", "no"), ("No, there is none.", "no"), ("no,", "no"), ("There is not", "no"),
  ("yes", "yes"), ("Yes. No", "yes"), ("Yes, no doubt", "no"), ("NO", "yes"), ("nothing", "yes"),
  ("None", "yes"), ("", "yes"), ("I cannot tell", "yes"), ("It is. It is not.", "yes"),
  ("no!", "yes"), (" no", "no"),
])  # fmt: skip
def test_a_free_answer_becomes_yes_or_no_by_pope_s_rule(answer, expected):
  assert vqa_scores.yes_or_no(answer) == expected


def counted(said, true):
  """The figures from a count of the four cases."""
  cases = {pair: 0 for pair in itertools.product((True, False), repeat=2)}
  for pair in zip(said, true, strict=True):
    cases[pair] += 1
  hit, false, missed = cases[True, True], cases[True, False], cases[False, True]
  precision = hit / (hit + false) if hit + false else 0
  recall = hit / (hit + missed) if hit + missed else 0
  both = precision + recall
  return {
    "accuracy": (hit + cases[False, False]) / len(said),
    "precision": precision,
    "recall": recall,
    "f1": 2 * precision * recall / both if both else 0,
    "yes_rate": (hit + false) / len(said),
  }


@pytest.mark.parametrize("seed", range(20))
def test_pope_s_figures_are_those_of_the_four_counts(seed):
  """And scikit-learn's, where it is installed."""
  rng = np.random.default_rng(seed)
  said, true = (rng.random(30) < rng.random() for _ in range(2))
  predictions = [("Yes, there is", "No, there is not")[not s] for s in said]
  found = vqa_scores.pope(predictions, [("yes", "no")[not t] for t in true])
  assert found == pytest.approx(counted(said.tolist(), true.tolist()))
  try:
    from sklearn import metrics
  except ImportError:
    return
  scores = metrics.precision_recall_fscore_support(true, said, average="binary", zero_division=0)
  assert [found[k] for k in ("precision", "recall", "f1")] == pytest.approx(list(scores[:3]))
  assert found["accuracy"] == pytest.approx(metrics.accuracy_score(true, said))


def test_pope_at_its_ends():
  always = vqa_scores.pope(["yes"] * 4, ["yes", "no"] * 2)
  assert always == {
    "accuracy": 0.5, "precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "yes_rate": 1.0
  }  # fmt: skip
  never = vqa_scores.pope(["no"] * 4, ["yes", "no"] * 2)
  assert never == {"accuracy": 0.5, "precision": 0, "recall": 0, "f1": 0, "yes_rate": 0}
  with pytest.raises(ValueError, match="answers are \"yes\" and \"no\", got 'maybe'"):
    vqa_scores.pope(["yes"], ["maybe"])
  with pytest.raises(ValueError, match="2 predictions for 1 answers"):
    vqa_scores.pope(["yes", "no"], ["yes"])


def test_the_gain_s_interval_resamples_whole_images():
  """Equal scores of an image's questions are one observation: the interval does not shrink."""
  rng = np.random.default_rng(0)
  with_vision, without = rng.integers(2, size=(2, 60)).astype(float)
  images = np.array([f"image {i}" for i in range(60)])
  mean, low, high = vqa_scores.gain(with_vision, without, images, seed=0, draws=2000)
  assert mean == pytest.approx(np.mean(with_vision - without)) and low < mean < high
  half = 1.96 * np.std(with_vision - without) / 60**0.5
  assert (high - low) / 2 == pytest.approx(half, rel=0.15)
  many = [np.repeat(x, 9) for x in (with_vision, without, images)]
  assert vqa_scores.gain(*many, seed=0, draws=2000) == pytest.approx((mean, low, high))
  apart = [*many[:2], np.arange(540)]
  _, low_apart, high_apart = vqa_scores.gain(*apart, seed=0, draws=2000)
  assert high_apart - low_apart < 0.5 * (high - low)


def test_the_gain_is_paired():
  """Where vision adds the same to every question nothing is left to chance."""
  without = np.random.default_rng(0).random(50)
  found = vqa_scores.gain(without + 0.25, without, np.arange(50), seed=0, draws=100)
  assert found == pytest.approx((0.25, 0.25, 0.25))
  with pytest.raises(ValueError, match="got 2, 2 and 1"):
    vqa_scores.gain([0, 1], [0, 1], [0], seed=0, draws=10)


def test_the_gain_s_interval_holds_the_truth_as_often_as_it_says():
  """Images of unequal many questions whose scores hang together."""
  held = 0
  for seed in range(200):
    rng = np.random.default_rng(seed)
    images = np.repeat(np.arange(40), rng.integers(1, 8, 40))
    without = rng.random(len(images))
    rise = 0.1 + rng.normal(0, 0.2, 40)[images] + rng.normal(0, 0.1, len(images))
    _, low, high = vqa_scores.gain(without + rise, without, images, seed=seed, draws=200)
    held += low <= 0.1 <= high
  assert 176 <= held <= 198  # 95% of 200, and the percentile interval of 40 images is a bit short
