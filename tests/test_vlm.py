"""Questions answered over a frozen encoder: the figures, their floors, and what is left out."""

import cv2
import jax
import numpy as np
import pytest
from made_up import make_encode, make_variables

from jepa_vl import evals, sharding
from jepa_vl.data import sources
from jepa_vl.data.transforms import DamagedRecord
from jepa_vl.evals import bridge_fit, scratch_language, vlm
from jepa_vl.model import language

COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}
KEYS = dict(
  source="plates", path="", splits=("test",), train_source="", train_path="", train_split="train",
  language="", template="image : {image} question : {question} answer :", score="exact",
  questions=0, pool=1, hidden=16, answer_tokens=2, steps=150, batch_size=16, lr=1e-2, warmup=5,
  weight_decay=0.0, keep=0.01, dtype="float32", seed=0,
)  # fmt: skip


class Plates:
  """A plate of one colour, and two questions about each: its colour, and whether it is red."""

  def __init__(self, split, count):
    self.split, self.count = split, count
    self.identity = f"plates {split} {count}"

  def __len__(self):
    return 2 * self.count

  def colour(self, index):
    return list(COLOURS)[np.random.default_rng((len(self.split), index // 2)).integers(3)]

  def asked(self, index):
    if index == 5:
      raise DamagedRecord("no such question", "malformed")
    colour = self.colour(index)
    question, answer = [
      ("what colour is it ?", colour), ("is it red ?", "yes" if colour == "red" else "no")
    ][index % 2]  # fmt: skip
    return {
      "question": question, "answers": [answer], "kind": ("colour", "yes")[index % 2],
      "question_id": str(index), "image_id": str(index // 2),
    }  # fmt: skip

  def __getitem__(self, index):
    pixels = np.zeros((16, 16, 3), np.uint8) + np.uint8(COLOURS[self.colour(index)])
    image = cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()
    return self.asked(index) | {"image": b"damaged" if index == 8 else image}

  def told(self, index):
    return [(0.3, 0.8, f"plate {self.colour(index)}")]

  def where(self, index):
    return f"plate {index}"


@pytest.fixture(autouse=True)
def small(monkeypatch):
  monkeypatch.setitem(
    sources.SOURCES, "plates", lambda path, split, keys: Plates(split, {"train": 60}.get(split, 24))
  )
  for name, value in dict(WIDTH=32, DEPTH=2, HEAD=16, STEPS=120, BATCH=32).items():
    monkeypatch.setattr(scratch_language, name, value)


@pytest.fixture(scope="module")
def found():
  """The result on one device, and the Encode that it came from."""
  mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
  encode, patch = make_encode(mesh), pytest.MonkeyPatch()
  with patch.context() as m:
    small.__wrapped__(m)
    return vlm.run(encode, make_variables(), mesh, **KEYS), encode


def test_colours_are_seen_and_without_vision_guessed(found):
  """The model was never trained on images, and the bridge never on its weights."""
  figures = found[0]["figures"]
  assert figures["test/accuracy"] > 0.95
  assert figures["test/colour/accuracy@no_vision"] < 0.7
  assert figures["test/gain"] == pytest.approx(
    figures["test/accuracy"] - figures["test/accuracy@no_vision"]
  )
  assert figures["test/gain@low"] > 0
  for key in ("test/colour/accuracy", "test/yes/gain"):
    assert figures[f"{key}@low"] <= figures[key] <= figures[f"{key}@high"]
  assert figures["test/colour/accuracy@majority"] < 0.6


def test_what_cannot_be_read_is_left_out_and_counted(found):
  """One question is damaged, and one image that two questions are about."""
  assert found[0]["sizes"]["test"] == {"questions": 45, "images": 23, "left_out": 3}
  assert found[0]["sizes"]["train"]["left_out"] == 3


def test_slots_hold_what_is_told_where_it_is():
  """Of two things in one slot the words of both; at the far edge, the last slot."""
  told = [[(0.0, 0.6, "red ring"), (0.4, 0.9, "red"), (1.0, 0.0, "ring")], []]
  tokenizer, size = scratch_language.words(["red ring", "nothing"])
  found = scratch_language.slots(told, tokenizer, size, side=2)
  red, ring, nothing = (tokenizer.encode(w, start=False)[0] for w in ("red", "ring", "nothing"))
  expected = np.zeros((2, 4, size))
  expected[0, 1, red], expected[0, 1, ring], expected[0, 2, ring] = 2, 1, 1
  expected[0, [0, 3], nothing] = expected[1, :, nothing] = 1
  np.testing.assert_array_equal(found, expected)
  table = np.random.default_rng(0).normal(size=(size, 3)).astype(np.float32)
  vectors = scratch_language.spoken({"token_embedding": {"embedding": table}}, found)
  np.testing.assert_allclose(vectors[0, 1], 2 * table[red] + table[ring], rtol=1e-6)


def test_a_source_that_tells_nothing_is_named(mesh, monkeypatch):
  monkeypatch.delattr(Plates, "told")
  with pytest.raises(ValueError, match="which plate 0 has none of; give a Hugging Face folder"):
    vlm.run(make_encode(mesh), make_variables(), mesh, **KEYS)


def test_half_a_surrogate_pair_in_a_question_is_read_as_a_question_mark(monkeypatch):
  asked = Plates.asked
  odd = {"question": "what \ud83d ?", "answers": ["sun \ud83d", "sun"]}
  monkeypatch.setattr(Plates, "asked", lambda self, index: asked(self, index) | odd)
  found = vlm._asked(Plates("test", 1), 0)
  assert (found["question"], found["answers"]) == ("what ? ?", ["sun ?", "sun"])


def test_the_report_shows_questions(found):
  (table,) = found[0]["details"]
  assert len(table["rows"]) == 24 and len(table["columns"]) == len(table["rows"][0])


def test_no_vision_and_the_language_model_are_fitted_once(found, monkeypatch):
  """They are the same of every encoder: the untrained network's column reuses them."""
  fitted = []
  train = bridge_fit.train
  monkeypatch.setattr(bridge_fit, "train", lambda *a, **k: fitted.append(a[6]) or train(*a, **k))
  result, encode = found
  blank = {k: 0 * v for k, v in make_variables().items()}
  again = vlm.run(encode, blank, encode.mesh, **KEYS)
  assert fitted == ["a bridge"]
  key = "test/accuracy@no_vision"
  assert again["figures"][key] == result["figures"][key]


def test_pope_has_its_own_figures():
  test = vlm.Questions(
    source=None, records=[{"kind": "a", "answers": ["yes"]}] * 2,
    image=np.array([0, 1]), left_out=0, bank=None, shape=(1, 1),
  )  # fmt: skip
  figures = vlm._figures("random", test, ["Yes.", "no"], ["no", "no"], {None: "yes"}, "pope", 0)
  assert figures["random/accuracy"] == 0.5 and figures["random/accuracy@majority"] == 1.0
  assert figures["random/recall"] == 0.5 and figures["random/recall@no_vision"] == 0.0
  assert figures["random/yes_rate"] == 0.5


@pytest.mark.parametrize(
  "change, words",
  [
    ({"score": "bleu"}, "score must be one of vqa, exact, pope, got 'bleu'"),
    ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, got 'int8'"),
    ({"pool": 3}, "pool=3 does not divide the grid of 2 x 2 patches"),
    ({"language": "/nowhere"}, "/nowhere/config.json is no file"),
  ],
)
def test_wrong_keys_are_said_in_words(mesh, change, words):
  with pytest.raises((ValueError, FileNotFoundError), match=words):
    vlm.run(make_encode(mesh), make_variables(), mesh, **KEYS | change)


def test_a_prompt_longer_than_learned_positions_is_said(mesh):
  """One that just fits is answered by numbers; one token more would be NaN."""
  records = [{"question": "what is it ?", "answers": ["a ring"], "kind": "a"}] * 2
  tokenizer, size = scratch_language.words(["look : so : what is it ? a ring"])
  x = np.ones((2, 4, 6), np.float16)
  asked = vlm.Questions(None, records, np.arange(2), 0, x, x.shape[1:])
  how = bridge_fit.Fit(1, 2, 1e-2, 0, 0.0, 0)

  def ask(length):
    c = language.Config(
      vocab_size=size, width=16, depth=1, heads=2, kv_heads=2, head_dim=8, hidden=16,
      length=length, norm="layer", norm_eps=1e-5, positions="learned", mlp="gelu", qkv_bias=True,
      out_bias=True, mlp_bias=True, tied=True,
    )  # fmt: skip
    model = language.LanguageModel(c, True, "none", np.float32)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), language.abstract_params(model))
    speaker = bridge_fit.Speaker(model, params, tokenizer)
    template = "look : {image} {question} so :"
    return vlm.Ask(speaker, template, 3, 8, how, mesh, asked, {"test": asked}), model, params

  fits, model, params = ask(2 + 4 + 6 + 3)
  batch, opening = fits._prompts[""].batch(np.arange(2)), fits._prompts[""].opening
  assert np.isfinite(bridge_fit.loss(model, params, np.ones((2, 4, 16)), batch, opening))
  words = "has 14 positions, .* takes 15: 2 of the template .*, 4 of the image, 6 of the .*tokens=3"
  with pytest.raises(ValueError, match=words):
    ask(14)


def test_every_split_is_opened_at_the_start(mesh, monkeypatch):
  """The train split's, too, of a source and path of its own."""
  from ml_collections import ConfigDict

  opened = []
  monkeypatch.setitem(
    sources.SOURCES, "plates", lambda path, split, keys: opened.append((path, split))
    or Plates(split, 12),
  )  # fmt: skip
  keys = KEYS | {"evaluation": "vlm", "source": "plates", "train_path": "/other"}
  cfg = ConfigDict({"asked": keys})
  evals.check(cfg)
  evals.prepare(make_encode(mesh), cfg)
  assert opened == [("", "test"), ("/other", "train")]
