"""Captions become tokens, EOT and mask as both readouts want; tokenizers load or say why not."""

import json
import pickle

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from jepa_vl.data import tokenizer

LONG = " ".join(["grinning face"] * 20)
EOT = "<|endoftext|>"
WORDS = ("c a", "ca t", "Ġ cat")  # merges; Ġ stands for a space


def vocabulary(merges=WORDS):
  """The vocabulary that the merges make: the bytes, the joined tokens, EOT last as in GPT-2."""
  tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(m.replace(" ", "") for m in merges)]
  return {token: i for i, token in enumerate([*dict.fromkeys(tokens), EOT])}


def write_gpt2(folder, merges=WORDS, vocab=None, names=("vocab.json", "merges.txt")):
  """A folder with GPT-2's two files."""
  folder.mkdir(exist_ok=True)
  (folder / names[0]).write_text(json.dumps(vocab or vocabulary(merges)))
  (folder / names[1]).write_text("#version: 0.2\n" + "".join(f"{m}\n" for m in merges))
  return str(folder)


@pytest.fixture
def bpe(tmp_path):
  return tokenizer.load(write_gpt2(tmp_path / "bpe"))


@pytest.fixture
def parsed(bpe):
  """A tokenizer.json as a dict."""
  return json.loads(bpe.model)


@pytest.mark.parametrize("readout", ["eot", "last"])
@pytest.mark.parametrize("caption", ["", "smile", "red heart with an arrow", LONG])
@pytest.mark.parametrize("kind", ["tok", "bpe"])
def test_tokens(request, kind, caption, readout):
  """Own tokens, cut to what fits, then EOT to the end; "eot" reads the first EOT, "last" none."""
  tok = request.getfixturevalue(kind)
  L = 30 if kind == "bpe" else 9
  ids, mask, truncated = tokenizer.tokenize(tok, ["x", caption], length=L, readout=readout)
  assert ids.shape == mask.shape == (2, L) and ids.dtype == np.int32 and mask.dtype == bool
  room = L - 1 if readout == "eot" else L
  tokens = tok.encode(caption)
  kept = tokens[:room]
  assert tok.eot not in tokens
  assert ids[1].tolist() == kept + [tok.eot] * (L - len(kept))
  covered = len(kept) + (readout == "eot")
  assert mask[1].tolist() == [True] * covered + [False] * (L - covered)
  assert truncated.tolist() == [False, len(tokens) > room]
  assert truncated[1] == (caption == LONG)


def test_a_caption_that_just_fits_is_not_truncated(tok):
  n = len(tok.encode("red heart with an arrow"))
  for readout, own in (("eot", 1), ("last", 0)):
    for length, cut in ((n + own, False), (n + own - 1, True)):
      found = tokenizer.tokenize(
        tok, ["red heart with an arrow"], length=length, readout=readout
      )
      assert found[2].tolist() == [cut]


def test_unknown_readout_is_refused(tok):
  with pytest.raises(ValueError, match="text.readout must be 'eot' or 'last', got 'mean'"):
    tokenizer.tokenize(tok, ["x"], length=4, readout="mean")


def test_byte_level_bpe(bpe):
  """GPT-2's rules: a space belongs to the word behind it, none is put before the first word."""
  vocab = vocabulary()
  assert (bpe.vocab_size, bpe.eot) == (len(vocab), vocab[EOT])
  assert bpe.encode("cat cat") == [vocab["cat"], vocab["Ġcat"]]
  assert bpe.encode("cat  cat") == [vocab["cat"], vocab["Ġ"], vocab["Ġcat"]]
  assert bpe.encode("cat's2") == [vocab[t] for t in ("cat", "'", "s", "2")]
  assert bpe.encode("") == []
  # every byte has a token, so nothing is dropped
  for text in ("\0", "\x85\t\r\n", "a\u0301 á", "\U0001f469\u200d\U0001f680", "猫", "שלום"):
    assert len(bpe.encode(text)) == len(text.encode())


@pytest.mark.parametrize("readout", ["eot", "last"])
def test_eot_written_in_a_caption_is_the_token_and_the_mask_does_not_end_at_it(bpe, readout):
  cat = bpe.encode("cat")[0]
  assert bpe.encode(f"cat{EOT}cat") == [cat, bpe.eot, cat]
  ids, mask, truncated = tokenizer.tokenize(bpe, [f"cat{EOT}cat"], length=6, readout=readout)
  assert ids.tolist() == [[cat, bpe.eot, cat, bpe.eot, bpe.eot, bpe.eot]]
  assert mask.sum() == (4 if readout == "eot" else 3) and not truncated[0]


@pytest.mark.parametrize("kind", ["tok", "bpe"])
def test_any_string_has_tokens(request, kind):
  """A megabyte of one word; half a surrogate pair, which JSON may carry and no library takes."""
  tok = request.getfixturevalue(kind)
  captions = ["x" * 2**20, "x" * 2000, "x\ud83d", "x?"]
  ids, _, truncated = tokenizer.tokenize(tok, captions, length=9, readout="eot")
  assert ids[0].tolist() == ids[1].tolist() and truncated.tolist() == [True, True, False, False]
  assert ids[2].tolist() == ids[3].tolist()


@pytest.mark.parametrize("kind", ["tok", "bpe"])
def test_bytes_and_pickle_bring_the_same_tokenizer_back(request, kind):
  tok = request.getfixturevalue(kind)
  for again in (tokenizer.from_bytes(tok.model), pickle.loads(pickle.dumps(tok))):
    assert type(again) is type(tok)
    assert (again.model, again.identity) == (tok.model, tok.identity)
    assert (again.vocab_size, again.eot) == (tok.vocab_size, tok.eot)
    assert again.encode("red cat") == tok.encode("red cat")


def test_every_layout_loads(tok, bpe, tmp_path):
  same = [write_gpt2(tmp_path / "openai", names=("encoder.json", "vocab.bpe"))]
  folder = tmp_path / "json"
  folder.mkdir()
  (folder / "tokenizer.json").write_text(json.dumps(json.loads(bpe.model), indent=2))
  same += [str(folder), str(folder / "tokenizer.json")]
  windows = tmp_path / "windows"
  write_gpt2(windows)
  merges = (windows / "merges.txt").read_bytes()
  (windows / "merges.txt").write_bytes(merges.replace(b"\n", b"\r\n"))
  same.append(str(windows))
  assert [tokenizer.load(spec).identity for spec in same] == [bpe.identity] * len(same)

  (tmp_path / "tokenizer.model").write_bytes(tok.model)
  for spec in (tmp_path, tmp_path / "tokenizer.model"):
    assert tokenizer.load(str(spec)).identity == tok.identity
  (tmp_path / "tokenizer.json").write_bytes(bpe.model)  # goes before
  assert tokenizer.load(str(tmp_path)).identity == bpe.identity


def test_identity_changes_with_the_vocabulary(bpe, parsed, tmp_path):
  swapped = vocabulary()
  swapped["cat"], swapped["ca"] = swapped["ca"], swapped["cat"]
  others = [
    tokenizer.load(write_gpt2(tmp_path / "more", (*WORDS, "d o"))),
    tokenizer.load(write_gpt2(tmp_path / "order", WORDS[::-1])),
    tokenizer.load(write_gpt2(tmp_path / "ids", vocab=swapped)),
    tokenizer.from_bytes(
      json.dumps({**parsed, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True,
                                              "trim_offsets": True, "use_regex": True}}).encode()
    ),
  ]  # fmt: skip
  assert len({bpe.identity, *(t.identity for t in others)}) == 5


def test_a_tokenizer_json_does_not_cut_pad_or_drop_by_itself(bpe, parsed):
  """Settings that its author saved for other uses are off; `tokenize` alone cuts and pads."""
  t = tokenizers.Tokenizer.from_str(bpe.model.decode())
  t.enable_truncation(3)
  t.enable_padding(length=20, pad_id=1, pad_token="!")
  t.post_processor = tokenizers.processors.TemplateProcessing(
    single=f"{EOT} $A {EOT}", special_tokens=[(EOT, bpe.eot)]
  )
  t.model.dropout = 1.0
  assert t.encode("cat cat").ids != bpe.encode("cat cat")
  loaded = tokenizer.from_bytes(t.to_str().encode())
  for text in ("cat cat", LONG):
    assert loaded.encode(text) == bpe.encode(text)
  assert loaded.identity == bpe.identity


def test_eot_that_is_only_in_the_vocabulary_is_special_all_the_same(bpe, parsed):
  loaded = tokenizer.from_bytes(json.dumps({**parsed, "added_tokens": []}).encode())
  assert (loaded.eot, loaded.vocab_size) == (bpe.eot, bpe.vocab_size)
  assert loaded.encode(f"a{EOT}") == bpe.encode(f"a{EOT}") == [*bpe.encode("a"), bpe.eot]


def test_every_id_has_its_row_of_the_embedding(parsed):
  """A token added behind a gap counts with the gap."""
  parsed["model"]["vocab"]["[PAD]"] = 400
  assert tokenizer.from_bytes(json.dumps(parsed).encode()).vocab_size == 401


def without(vocab, *tokens):
  return {t: i for t, i in vocab.items() if t not in tokens}


@pytest.mark.parametrize("vocab, merges, words", [
  (vocabulary(), (*WORDS, "d o"), "line 5, 'd o', needs 'do', .* do not belong together"),
  (vocabulary((*WORDS, "d o")), WORDS, "no merge makes 1 of .* 'do' the first: the merges are cut"),
  ({**vocabulary(), "!</w>": 999}, WORDS, "'!</w>' the first: .*CLIP's is not"),
  (vocabulary(), ("c a", "c a t"), "line 3 is 'c a t'; expected two tokens"),
  (vocabulary(), ("c a", "c "), "line 3 is 'c '; expected two tokens"),
  (without(vocabulary(), "!", "x"), WORDS, "lacks 2 of the 256 tokens of single bytes"),
  (without(vocabulary(), EOT), WORDS, "has no <.endoftext.>.*special tokens: none. Expected"),
  ({**vocabulary(), "cat": "7"}, WORDS, "a whole number as its id"),
  ({**vocabulary(), "cat": 7}, WORDS, "one id to several tokens"),
  (["cat"], WORDS, "the vocabulary holds a JSON list; expected an object"),
])  # fmt: skip
def test_vocabulary_and_merges_that_do_not_fit_are_refused(tmp_path, vocab, merges, words):
  spec = write_gpt2(tmp_path / "bad", merges, vocab)
  with pytest.raises(ValueError, match=rf"(?s)bad' \(vocab.json and merges.txt\): .*{words}"):
    tokenizer.load(spec)


@pytest.mark.parametrize("text, words", [
  ("{}", "has no 'model' and so is no tokenizer.json"),
  ('{"!": 0}', r"its keys: \['!'\]. If it is the vocabulary alone, give the folder"),
  ('{"model": {"type": "BPE"}}', "no tokenizer that the library tokenizers [0-9.]+ reads: Missing"),
  ('{"model": ', "no JSON, or was cut short"),
  ("", "neither a tokenizer.json .* nor a SentencePiece .model"),
  ("[1]", "neither a tokenizer.json .* nor a SentencePiece .model"),
  ("#version: 0.2\nc a\n", "its merges in two files, give the folder"),
])  # fmt: skip
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, text, words):
  path = tmp_path / "tokenizer.json"
  path.write_text(text)
  for spec in (path, tmp_path):
    with pytest.raises(ValueError, match=f"text.tokenizer='{spec}'.*: .*{words}"):
      tokenizer.load(str(spec))


def test_another_kind_of_tokenizer_json_is_refused(parsed):
  word_level = tokenizers.Tokenizer(models.WordLevel({"cat": 0, EOT: 1}, unk_token=EOT))
  with pytest.raises(ValueError, match="holds a WordLevel model; expected BPE"):
    tokenizer.from_bytes(word_level.to_str().encode())
  roberta = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
  roberta.add_special_tokens(["<s>", "</s>"])
  with pytest.raises(ValueError, match="no <.endoftext.>.*its special tokens: <s>, </s>. Expected"):
    tokenizer.from_bytes(roberta.to_str().encode())


def test_a_file_or_folder_that_is_not_there_is_named(tmp_path):
  with pytest.raises(ValueError, match="text.tokenizer is empty. Give --config.text.tokenizer="):
    tokenizer.load("")
  with pytest.raises(FileNotFoundError, match="text.tokenizer='/none.model' is no file and no fol"):
    tokenizer.load("/none.model")
  with pytest.raises(FileNotFoundError, match="tokenizer.json, or vocab.json and.*found none of"):
    tokenizer.load(str(tmp_path))
  (tmp_path / "vocab.json").write_text("{}")
  with pytest.raises(FileNotFoundError, match="vocab.json and merges.txt, or .*; found vocab.json"):
    tokenizer.load(str(tmp_path))
