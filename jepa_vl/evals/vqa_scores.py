"""How answers to questions are scored: VQA accuracy, exact match, POPE's yes and no, gains.

The rules are those that the data sets publish: visualqa.org/evaluation, GQA (arXiv 1902.09506),
POPE (arXiv 2305.10355).
"""

import re

import numpy as np

from jepa_vl.evals import common

# Each stands for itself without one of its apostrophes: "couldnt've" and "couldn'tve" are the
# first's. The list is the public evaluation's, which lacks "lets" and all that begins with "I".
_CONTRACTIONS = """
couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's
something'd something'll that's there'd there're there's they'd they'll they're they've 'twas
wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_APOSTROPHES = {
  word[:i] + word[i + 1 :]: word
  for word in _CONTRACTIONS.split()
  for i, letter in enumerate(word)
  if letter == "'"
} | {"somebody'd": "somebodyd"}  # so in the public table
_DIGITS = {
  "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
  "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ";/[]\"{}()=+\\_-><@`,?!"  # neither the apostrophe nor the colon


def normalise(answer):
  """An answer as the public VQA evaluation compares it.

  Punctuation goes: to nothing where a blank is beside that sign, or where a comma is between digits
  anywhere in the answer ("1,000"), else to a blank ("t-shirt"). A period goes unless a digit
  follows it. Then, word by word in lower case: numbers up to ten as digits and "none" as 0, no
  articles, and the apostrophes that a contraction lacks.
  """
  answer = re.sub(r"[\n\t]", " ", answer).strip()
  thousands = re.search(r"\d,\d", answer)
  found = answer
  for sign in _PUNCTUATION:
    beside = f"{sign} " in answer or f" {sign}" in answer
    found = found.replace(sign, "" if beside or thousands else " ")
  found = re.sub(r"\.(?!\d)", "", found)
  words = [_DIGITS.get(word, word) for word in found.lower().split()]
  return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction, answers):
  """VQA accuracy of a prediction, 0 to 1: min(annotators who said it / 3, 1), averaged over leaving
  each annotator out; of one answer, whether it is that one.

  All are normalised, as the evaluation's description has it. (Its script leaves answers on which
  all annotators agree as they are, and normalises others in part: of the released answers, which
  were normalised before, hardly any differ.)

  Raises ValueError without answers.
  """
  if not answers:
    raise ValueError("an answer cannot be scored without `answers`: the record has none")
  prediction, count = normalise(prediction), len(answers)
  matches = sum(normalise(answer) == prediction for answer in answers)
  if count == 1:
    return float(matches)
  left_out_of = matches * min((matches - 1) / 3, 1) + (count - matches) * min(matches / 3, 1)
  return left_out_of / count


def exact_match(prediction, answers):
  """1.0 if a prediction is one of the answers but for case, blanks and periods at its end: GQA's
  score. Numbers and articles count as they are written."""
  plain = lambda text: " ".join(text.lower().split()).rstrip(". ")
  return float(plain(prediction) in map(plain, answers))


def yes_or_no(answer):
  """POPE's reading of a free answer: "no" if the first sentence has the word "no", "No" or "not",
  else "yes", whatever it says."""
  words = answer.partition(".")[0].replace(",", "").split(" ")
  return "no" if {"no", "No", "not"} & set(words) else "yes"


def pope(predictions, answers):
  """POPE's figures, of which "yes" is the positive class; 0 where a ratio has nothing below it.

  Args:
    predictions: N free answers, read by `yes_or_no`; answers: N of "yes" and "no".

  Returns:
    {"accuracy", "precision", "recall", "f1", "yes_rate"}, 0 to 1.

  Raises:
    ValueError: none, not as many of both, or an answer that is neither.
  """
  if wrong := set(answers) - {"yes", "no"}:
    raise ValueError(f'POPE\'s answers are "yes" and "no", got {sorted(wrong)[0]!r}')
  if len(predictions) != len(answers) or not len(answers):
    raise ValueError(f"{len(predictions)} predictions for {len(answers)} answers")
  said = np.array([yes_or_no(prediction) == "yes" for prediction in predictions])
  true = np.array([answer == "yes" for answer in answers])
  share = lambda part, whole: float(part / whole) if whole else 0.0
  hits = np.sum(said & true)
  return {
    "accuracy": float(np.mean(said == true)),
    "precision": share(hits, np.sum(said)),
    "recall": share(hits, np.sum(true)),
    "f1": share(2 * hits, np.sum(said) + np.sum(true)),
    "yes_rate": float(np.mean(said)),
  }


def gain(with_vision, without, images, *, seed, draws):
  """By how much scores rise with vision, and the 95% interval of a paired bootstrap.

  Images are resampled, each with all its questions and both scores of each: questions about one
  image are not independent, and of one question per image it is the same as resampling questions.

  Args:
    with_vision, without: (N,) scores of the same questions; images: (N,) whose image each is of.

  Returns:
    mean, low, high.

  Raises:
    ValueError: none, or lengths that differ.
  """
  if not len(with_vision) == len(without) == len(images) > 0:
    raise ValueError(
      "a paired gain needs both scores and the image of every question, got "
      f"{len(with_vision)}, {len(without)} and {len(images)}"
    )
  rises = np.asarray(with_vision, np.float64) - np.asarray(without, np.float64)
  _, owner = np.unique(np.asarray(images), return_inverse=True)
  sums, counts = np.bincount(owner, rises), np.bincount(owner)
  low, high = common.bootstrap([sums, counts], lambda total, n: total / n, seed, draws)
  return float(rises.mean()), float(low), float(high)
