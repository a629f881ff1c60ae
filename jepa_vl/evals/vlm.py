"""Questions about images, answered by a frozen language model that sees a frozen encoder's patches.

Between the two a small MLP, the bridge, learns on a train split; nothing else does. The same bridge
on zeroed features says what the language model and the questions alone give.
"""

import dataclasses
import hashlib
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from jepa_vl import checkpoint
from jepa_vl.data import pipeline
from jepa_vl.data.transforms import DamagedRecord
from jepa_vl.evals import bridge_fit, common, fit, scratch_language, vqa_scores
from jepa_vl.interop import language as files
from jepa_vl.model import bridge as bridge_lib
from jepa_vl.model import language as language_lib

PROTOCOL = """
A frozen language model answers greedily from a template with the image's tokens in it. Those are
the frozen encoder's patch tokens through an MLP of one hidden layer, the bridge, trained by AdamW
on the answers' tokens of one split; test splits choose nothing. no_vision: the same bridge trained
and read on zeroed features. majority: the train split's commonest answer to questions of the kind.
Intervals resample images, with all their questions.
"""

_AT_ONCE = 256  # images that are decoded and encoded in one go
_EXAMPLES = 24  # in the report
_DRAWS = 1000

# What a prediction scores by the answers, 0 to 1.
SCORES = {"vqa": vqa_scores.vqa_accuracy, "exact": vqa_scores.exact_match}
SCORES["pope"] = lambda prediction, answers: float(vqa_scores.yes_or_no(prediction) == answers[0])

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}  # of the language model's weights


@dataclasses.dataclass
class Questions:
  """The questions of one split.

  records: without images; image: (N,) each one's place in `bank`, a fit.Bank of features by image,
  or None where nothing is to be seen.
  """

  source: Any
  records: list
  image: np.ndarray
  left_out: int
  bank: Any
  shape: tuple  # of an image's features, (n, F)

  def features(self, rows):
    """(len(rows), n, F) float32."""
    if self.bank is None:
      return np.zeros((len(rows), *self.shape), np.float32)
    return self.bank[self.image[rows]].astype(np.float32)

  def blind(self):
    """The same questions with zeroed features."""
    return dataclasses.replace(self, bank=None)


def run(
  encode, variables, mesh, *, source, path, splits, train_source, train_path, train_split,
  language, template, score, questions, pool, hidden, answer_tokens, steps, batch_size, lr, warmup,
  weight_decay, keep, dtype, seed,
):  # fmt: skip
  """Keys "SPLIT/accuracy", "SPLIT/KIND/accuracy", and "SPLIT/gain" over no vision.

  Args:
    train_source, train_path, train_split: what the bridge learns on; "" for either of the first
      two is the test splits' own.
    language: a Hugging Face folder (interop/language.py), its weights held as `dtype`; "" for a
      small model trained on all questions of the train split and their images in words, as far as
      the source can tell those (scratch_language.py).
    template: text with {image} and {question}. score: of SCORES; "pope" also gives precision,
      recall, f1 and yes_rate of each split.
    questions: at most so many of the train split for the bridge, picked by `seed`; 0: all.
    pool: the mean of pool x pool patches is one image token; hidden: units of the bridge.
    answer_tokens: an answer's most. steps to weight_decay, and seed: bridge_fit.Fit.
    keep: GiB of features held in memory, of more the rest is made again when asked for.

  Raises:
    ValueError: an unknown score or dtype, or a split that cannot be used.
  """
  _check(score, dtype)
  learn = (train_source or source, train_path or path, train_split)
  see = lambda where, most: _open(encode, variables, where, most, seed, pool, keep)
  train = see(learn, questions)
  speaker = encode.once(
    ("speaker", language, dtype, template, learn, train.shape[0], seed),
    lambda: _speaker(encode, language, dtype, template, train, answer_tokens, mesh, seed),
  )
  how = bridge_fit.Fit(steps, batch_size, lr, warmup, weight_decay, seed)
  tests = {split: see((source, path, split), 0) for split in splits}
  ask = Ask(speaker, template, answer_tokens, hidden, how, mesh, train, tests)
  what = (template, answer_tokens, hidden, how)
  fitted = (language, dtype, learn, encode.version(train.source), questions, what)
  # Zeroed features are the same of every encoder.
  blind = encode.once(
    ("blind", train.shape, source, path, splits, *fitted),
    lambda: ask(
      train.blind(), {s: t.blind() for s, t in tests.items()},
      _folder(encode, ("blind", train.shape, *fitted)),
    ),
  )  # fmt: skip
  mine = (checkpoint.fingerprint(variables), encode.model, pool) if encode.cache else ()
  seen = ask(train, tests, _folder(encode, ("seen", *mine, *fitted)))
  figures, sizes, examples = {}, {}, []
  prior = _prior(train.records)
  for split, test in tests.items():
    figures |= _figures(split, test, seen[split], blind[split], prior, score, seed)
    sizes[split] = {"questions": len(test.records), "images": len(np.unique(test.image))}
    sizes[split]["left_out"] = test.left_out
    examples += _examples(split, test, seen[split], blind[split])
  sizes[train_split] = {"questions": len(train.records), "left_out": train.left_out, "seed": seed}
  return common.result(figures, protocol=PROTOCOL, sizes=sizes, details=[_table(examples)])


def check(encode, keys):
  """Raises ValueError or FileNotFoundError for keys that `run` would stop at."""
  _check(keys.score, keys.dtype)
  if keys.language:
    folder = os.path.expanduser(keys.language)
    files.read_config(folder)
    files.read_tokenizer(folder)
  else:
    where = (keys.train_source or keys.source, keys.train_path or keys.path, keys.train_split)
    _check_told(encode.source(*where))


def _check(score, dtype):
  for name, value, known in (("score", score, SCORES), ("dtype", dtype, DTYPES)):
    if value not in known:
      raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


# --- data


def _open(encode, variables, where, most, seed, pool, keep):
  """The Questions of a split; features of all its images are made once."""
  source = encode.source(*where)
  places = np.arange(len(source))
  if 0 < most < len(places):
    places = np.sort(np.random.default_rng(seed).choice(len(places), most, replace=False))
  rows = [(i, record) for i in places.tolist() if (record := _asked(source, i)) is not None]
  by_image = {}  # image: the first place that shows it
  for i, record in rows:
    by_image.setdefault(_name(record, i), i)
  bank, number = _encode(encode, variables, source, where[-1], list(by_image.items()), pool, keep)
  kept = [(r, number[_name(r, i)]) for i, r in rows if _name(r, i) in number]
  if not kept:
    raise ValueError(f"split {where[-1]!r}: no question with its image can be read")
  records, images = map(list, zip(*kept, strict=True))
  left_out, shape = len(places) - len(kept), bank[np.arange(1)].shape[1:]
  return Questions(source, records, np.array(images), left_out, bank, shape)


def _asked(source, index):
  """The record at `index` without its image, or None."""
  try:
    record = source.asked(index) if hasattr(source, "asked") else source[index]
  except DamagedRecord:
    return None
  # Half a surrogate pair, which JSON can carry, is no text to a tokenizer: "?" in its place.
  text = lambda value: value.encode("utf-8", "replace").decode()
  texts = {"question": text(record["question"]), "answers": [*map(text, record["answers"])]}
  return {k: v for k, v in record.items() if not isinstance(v, bytes)} | texts


def _name(record, index):
  return record.get("image_id", index)


def _encode(encode, variables, source, split, images, pool, keep):
  """A Bank of the images' features, and {name: place in it} of those that can be read."""

  def read(indices):
    return pipeline.evaluation_rows(
      source, [int(i) for i in indices], image_size=encode.image_size,
      resize_ratio=encode.resize_ratio,
    )  # fmt: skip

  of = lambda pixels: bridge_lib.pool(encode.patches(variables, np.stack(pixels)), pool)
  bank, number = fit.Bank(lambda indices: of(read(indices)[1]), keep), {}
  silent = True if jax.process_index() or len(images) < 8 * _AT_ONCE else None
  for start in tqdm.trange(0, len(images), _AT_ONCE, desc=split, disable=silent, leave=False):
    some = images[start : start + _AT_ONCE]
    _, pixels, left_out = read([i for _, i in some])
    some = [(name, i) for name, i in some if i not in left_out]
    if some:
      number |= {name: len(bank) + k for k, (name, _) in enumerate(some)}
      bank.add([i for _, i in some], of(pixels))
  return bank, number


# --- language


def _speaker(encode, folder, dtype, template, train, answer_tokens, mesh, seed):
  if not folder:
    side = math.isqrt(train.shape[0])
    what = ("language", encode.version(train.source), side, template, answer_tokens, seed)
    return scratch_language.train(
      *_told(train.source), template, mesh, side=side, answer_tokens=answer_tokens, seed=seed,
      folder=_folder(encode, what),
    )  # fmt: skip
  folder = os.path.expanduser(folder)
  config, params = files.read(folder, mesh, DTYPES[dtype])
  # Scanned layers keep one layer's activations at a time on their way to the bridge's gradient.
  model = language_lib.LanguageModel(config, True, "full", DTYPES[dtype])
  return bridge_fit.Speaker(model, params, files.read_tokenizer(folder))


def _check_told(source):
  if not hasattr(source, "told"):
    raise ValueError(
      "language='' trains a language model on the questions and their images in words, which "
      f"{source.where(0)} has none of; give a Hugging Face folder as `language`"
    )


def _told(source):
  """All its records without images, and what is told of each. ValueError if nothing is."""
  _check_told(source)
  records = {i: r for i in range(len(source)) if (r := _asked(source, i)) is not None}
  return list(records.values()), [source.told(i) for i in records]


class Ask:
  """(train, {split: test}, folder for checkpoints) -> {split: answers} of a bridge trained so.

  Compiled once, for what is seen and for zeros.

  Raises:
    ValueError: the language model's learned positions are too few.
  """

  def __init__(self, speaker, template, answer_tokens, hidden, how, mesh, train, tests):
    width = speaker.model.config.width
    self._speaker, self._how, self._mesh, self._shape = speaker, how, mesh, train.shape
    self._prompts = {}
    for name, data in {"": train, **tests}.items():
      asked = [r["question"] for r in data.records]
      said = [_commonest(r["answers"]) for r in data.records]
      self._prompts[name] = bridge_fit.Prompts(
        speaker.tokenizer, template, asked, said, answer_tokens
      )
    length = max(p.length for p in self._prompts.values())
    for prompts in self._prompts.values():
      prompts.widen(length)  # one length for all, so that one program serves all
    _check_length(speaker.model.config, self._prompts[""], train.shape[0])
    self._bridge = bridge_lib.Bridge(width, hidden, speaker.scale, speaker.model.dtype)
    self._tx = how.optimizer()
    opening = self._prompts[""].opening
    self._step = bridge_fit.make_step(self._bridge, speaker.model, self._tx, opening)
    self._answer = bridge_fit.make_answer(self._bridge, speaker, self._prompts[""])

  def __call__(self, train, tests, folder):
    how, prompts = self._how, self._prompts[""]
    init = lambda key: self._bridge.init(key, jnp.zeros((1, *self._shape)))["params"]
    state = bridge_fit.start(init, self._tx, self._mesh, how.seed)

    def take(k):
      rows = how.rows(k, len(prompts))
      return {**prompts.batch(rows), "features": train.features(rows)}

    what = "a bridge" if train.bank is not None else "a bridge without vision"
    state = bridge_fit.train(
      self._step, state, self._speaker.params, take, how, self._mesh, what, folder
    )
    return {
      split: bridge_fit.answer(
        self._answer, state.params, self._speaker, self._prompts[split], test.features,
        self._mesh, how.batch_size,
      )
      for split, test in tests.items()
    }  # fmt: skip


def _check_length(c, prompts, image):
  opening, answer = len(prompts.opening), prompts.answer.shape[1]
  total = opening + image + prompts.length + answer
  # Beyond them the model would say NaN; rotary positions go on.
  if c.positions == "learned" and total > c.length:
    raise ValueError(
      f"the language model has {c.length} positions, and a prompt with its answer takes {total}: "
      f"{opening} of the template before {{image}}, {image} of the image, {prompts.length} of the "
      f"longest question and the template around it, answer_tokens={answer}. Raise pool, shorten "
      "template or answer_tokens, or take a model with more positions"
    )


def _commonest(answers):
  return max(answers, key=answers.count)  # the first of equals


def _folder(encode, what):
  """Where checkpoints of what is fitted go: beside the features that are kept, if any are."""
  name = hashlib.sha256(repr(what).encode()).hexdigest()[:20]
  return os.path.join(encode.cache, f"fitted-{name}") if encode.cache else ""


# --- figures


def _prior(records):
  """{kind: the commonest answer}, and of all kinds together under None."""
  found = {}
  for record in records:
    for kind in (record["kind"], None):
      counts = found.setdefault(kind, {})
      answer = _commonest(record["answers"])
      counts[answer] = counts.get(answer, 0) + 1
  return {kind: max(counts, key=counts.get) for kind, counts in found.items()}


def _figures(split, test, seen, blind, prior, score, seed):
  of = lambda predictions: np.array([
    SCORES[score](p, r["answers"]) for p, r in zip(predictions, test.records, strict=True)
  ])  # fmt: skip
  kinds = np.array([r["kind"] for r in test.records])
  mine, none = of(seen), of(blind)
  majority = of([prior.get(kind, prior[None]) for kind in kinds])
  figures = {}
  rows_of = {split: np.ones(len(kinds), bool)}
  if len(set(kinds)) > 1:
    rows_of |= {f"{split}/{kind}": kinds == kind for kind in sorted(set(kinds))}
  for name, rows in rows_of.items():
    images, zero = test.image[rows], np.zeros(rows.sum())
    how = {"seed": seed, "draws": _DRAWS}
    for key, over in ((f"{name}/accuracy", zero), (f"{name}/gain", none[rows])):
      value, low, high = vqa_scores.gain(mine[rows], over, images, **how)
      figures |= {key: value, f"{key}@low": low, f"{key}@high": high}
    floors = {"no_vision": none[rows].mean(), "majority": majority[rows].mean()}
    figures |= {f"{name}/accuracy@{floor}": value for floor, value in floors.items()}
  if score == "pope":
    answers = [r["answers"][0] for r in test.records]
    found, without = (vqa_scores.pope(p, answers) for p in (seen, blind))
    for key in ("precision", "recall", "f1", "yes_rate"):
      figures |= {f"{split}/{key}": found[key], f"{split}/{key}@no_vision": without[key]}
  return figures


def _examples(split, test, seen, blind):
  """Rows of the report's table, from all over the split."""
  some = np.linspace(0, len(seen) - 1, min(_EXAMPLES, len(seen))).astype(int)
  return [
    (split, r["kind"], r["question"], ", ".join(dict.fromkeys(r["answers"])), seen[i], blind[i])
    for i, r in ((i, test.records[i]) for i in some.tolist())
  ]


def _table(rows):
  return {
    "kind": "table", "title": "Questions answered", "rows": rows,
    "hint": "From all over each split, right or wrong.",
    "columns": ("split", "kind", "question", "answers", "said", "said without vision"),
  }  # fmt: skip
