"""Tokenizers and the one function that turns captions into token arrays, in training and after."""

import hashlib
import json
import os

import numpy as np

from jepa_vl.data import embedded, shapes

END_OF_TEXT = "<|endoftext|>"  # GPT-2's one special token
# Those that ship, by name.
EMBEDDED = {"emoji": embedded.DIRECTORY / "tokenizer.model", "shapes": shapes.TOKENIZER}
# What a folder may hold, the first that is complete is taken; the third are OpenAI's own names.
LAYOUTS = (
  ("tokenizer.json",),
  ("vocab.json", "merges.txt"),
  ("encoder.json", "vocab.bpe"),
  ("tokenizer.model",),
)


class SentencePiece:
  """A SentencePiece model, held as bytes so that a checkpoint can carry it."""

  filename = "tokenizer.model"  # of `model` in a folder that `load` opens

  def __init__(self, model):
    import sentencepiece

    self.model = model
    try:
      if not model:  # sentencepiece takes no bytes for no model yet, and goes on without
        raise RuntimeError("empty")
      self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as e:
      raise ValueError(
        "neither a tokenizer.json (JSON text) nor a SentencePiece .model; of a vocabulary and its "
        "merges in two files, give the folder"
      ) from e
    self.vocab_size = self._processor.vocab_size()
    self.eot = self._processor.eos_id()
    if self.eot < 0:
      raise ValueError("the SentencePiece model has no end-of-sentence piece; train it with eos_id")

  def encode(self, text):
    """Token ids of one caption, without EOT."""
    return self._processor.encode(text)

  @property
  def identity(self):
    """Changes when the vocabulary does."""
    return f"sentencepiece of {self.vocab_size}, {_digest(self.model)}"

  def __reduce__(self):
    return SentencePiece, (self.model,)


class GPT2BPE:
  """GPT-2's tokenizer or another BPE with its EOT, held as the bytes of a tokenizer.json.

  As in transformers, "<|endoftext|>" written in a caption is the EOT token itself.

  Raises:
    ValueError: the bytes are no tokenizer.json, of no BPE, or without EOT.
  """

  filename = "tokenizer.json"  # of `model` in a folder that `load` opens

  def __init__(self, model):
    import tokenizers

    self.model = _canonical(model)
    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(self.model.decode())
    except Exception as e:  # a bare Exception is what the library raises
      raise ValueError(
        f"the JSON is no tokenizer that the library tokenizers {tokenizers.__version__} reads: {e}"
      ) from e
    kind = type(self._tokenizer.model).__name__
    if kind != "BPE":
      raise ValueError(f"the tokenizer.json holds a {kind} model; expected BPE, as GPT-2's")
    self.eot = self._tokenizer.token_to_id(END_OF_TEXT)
    special = [t.content for t in self._tokenizer.get_added_tokens_decoder().values()]
    if self.eot is None:
      raise ValueError(
        f"the vocabulary has no {END_OF_TEXT}, the token that ends and pads captions; its special "
        f"tokens: {', '.join(special[:5]) or 'none'}. Expected GPT-2's tokenizer or a BPE trained "
        f"with special_tokens=[{END_OF_TEXT!r}]; a SentencePiece .model brings an EOT of its own"
      )
    if END_OF_TEXT not in special:
      self._tokenizer.add_special_tokens([END_OF_TEXT])
    # Not the count: ids may have gaps, and every id needs its row of the embedding.
    self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

  def encode(self, text):
    """Token ids of one caption, without EOT."""
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  @property
  def identity(self):
    """Changes when the vocabulary does."""
    return f"bpe of {self.vocab_size}, {_digest(self.model)}"

  def __reduce__(self):
    return GPT2BPE, (self.model,)


def load(spec):
  """The tokenizer `text.tokenizer`: a name of EMBEDDED, a file or a folder.

  A file is a SentencePiece .model or a tokenizer.json; a folder holds one of LAYOUTS.

  Raises:
    FileNotFoundError: no such file, or a folder without one of LAYOUTS.
    ValueError: none is given, the files are no tokenizer, do not belong together or have no EOT.
  """
  if not spec:
    raise ValueError(
      "text.tokenizer is empty. Give --config.text.tokenizer=configs/captions.model (README, 'Your "
      "own data', shows how to make one of your captions) or GPT-2's tokenizer.json"
    )
  path = EMBEDDED.get(spec) or os.path.expanduser(spec)
  where = f"text.tokenizer={spec!r}"
  if os.path.isdir(path):
    names = _layout(where, path)
    where += f" ({' and '.join(names)})"
    paths = [os.path.join(path, name) for name in names]
  elif os.path.isfile(path):
    paths = [path]
  else:
    raise FileNotFoundError(
      f"{where} is no file and no folder; expected 'emoji' or 'shapes' (embedded), a SentencePiece "
      ".model, a tokenizer.json, or a folder with GPT-2's vocab.json and merges.txt"
    )
  contents = []
  for path in paths:
    with open(path, "rb") as f:
      contents.append(f.read())
  try:
    return from_bytes(contents[0]) if len(contents) == 1 else GPT2BPE(_gpt2_json(*contents))
  except ValueError as e:
    raise ValueError(f"{where}: {e}") from e


def from_bytes(model):
  """The tokenizer of the bytes that a checkpoint keeps, or of a file: JSON or SentencePiece.

  Raises:
    ValueError: the bytes are neither.
  """
  is_json = model.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")
  return GPT2BPE(model) if is_json else SentencePiece(model)


def _digest(model):
  return hashlib.sha256(model).hexdigest()[:16]


def _layout(where, folder):
  """The names of the files to read in `folder`."""
  has = {name for names in LAYOUTS for name in names if os.path.isfile(os.path.join(folder, name))}
  for names in LAYOUTS:
    if has.issuperset(names):
      return names
  expected = ", or ".join(" and ".join(names) for names in LAYOUTS)
  raise FileNotFoundError(
    f"{where} is a folder without a tokenizer; expected in it {expected}; found "
    f"{' and '.join(sorted(has)) or 'none of them'}"
  )


def _parse(content, what):
  """The JSON object in `content`."""
  try:
    parsed = json.loads(content)
  except (ValueError, RecursionError) as e:
    raise ValueError(f"{what} is no JSON, or was cut short: {e}") from e
  if not isinstance(parsed, dict):
    raise ValueError(f"{what} holds a JSON {type(parsed).__name__}; expected an object")
  return parsed


def _canonical(model):
  """The bytes of a tokenizer.json with what must not touch a caption's tokens switched off.

  `tokenize` alone cuts and pads, and dropout would give a caption other tokens each time. Keys
  are sorted: two files that differ in spacing and order are one tokenizer with one identity.
  """
  parsed = _parse(model, "the tokenizer.json")
  if not isinstance(parsed.get("model"), dict):
    raise ValueError(
      f"the JSON has no 'model' and so is no tokenizer.json; its keys: {str(list(parsed)[:5])}. If "
      "it is the vocabulary alone, give the folder that holds it and merges.txt (or vocab.bpe)"
    )
  off = dict.fromkeys(("truncation", "padding", "post_processor"))
  parsed = {**parsed, **off, "model": {**parsed["model"], "dropout": None}}
  return json.dumps(parsed, sort_keys=True, separators=(",", ":")).encode()


def _gpt2_json(vocab, merges):
  """The bytes of GPT-2's vocabulary and merges files -> those of the tokenizer.json they mean.

  Written here and not by the library, whose versions write the same tokenizer in different ways.
  """
  vocab = _parse(vocab, "the vocabulary")
  if not all(type(i) is int and i >= 0 for i in vocab.values()):
    raise ValueError("the vocabulary must give every token a whole number as its id")
  if len(set(vocab.values())) < len(vocab):
    raise ValueError("the vocabulary gives one id to several tokens")
  pairs = _merges(merges, vocab)
  _check_reachable(vocab, pairs)
  special = {"content": END_OF_TEXT, "id": vocab.get(END_OF_TEXT), "special": True}
  special |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
  byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
  tokenizer = {
    "version": "1.0",
    "added_tokens": [special] if END_OF_TEXT in vocab else [],
    "normalizer": None,
    "pre_tokenizer": {**byte_level, "add_prefix_space": False},
    "decoder": {**byte_level, "add_prefix_space": True},
    "model": {
      "type": "BPE",
      "unk_token": None,
      "continuing_subword_prefix": "",
      "end_of_word_suffix": "",
      "fuse_unk": False,
      "byte_fallback": False,
      "ignore_merges": False,
      "vocab": vocab,
      "merges": pairs,
    },
  }
  return json.dumps(tokenizer).encode()


def _merges(content, vocab):
  """The pairs of a merges file, in order; each must join two tokens of `vocab` to a third."""
  try:
    lines = content.decode().split("\n")  # splitlines() would also split at other characters
  except UnicodeDecodeError as e:
    raise ValueError(f"the merges are no UTF-8 text: {e}") from e
  pairs = []
  for number, line in enumerate(lines, 1):
    line = line.rstrip("\r")
    if not line or line.startswith("#version"):
      continue
    pair = line.split(" ")
    if len(pair) != 2 or not all(pair):
      raise ValueError(f"the merges' line {number} is {line[:60]!r}; expected two tokens")
    missing = [token for token in (*pair, "".join(pair)) if token not in vocab]
    if missing:
      raise ValueError(
        f"the merges' line {number}, {line[:60]!r}, needs {missing[0]!r}, which the vocabulary "
        "does not have: the two files do not belong together; take both from one tokenizer"
      )
    pairs.append(pair)
  return pairs


def _check_reachable(vocab, pairs):
  """Refuses a vocabulary that the merges do not make: text would silently get other tokens.

  Merges cut short are found here, and CLIP's files, whose tokens end in "</w>".
  """
  from tokenizers import pre_tokenizers

  bytes_ = set(pre_tokenizers.ByteLevel.alphabet())
  if not bytes_ <= vocab.keys():
    raise ValueError(
      f"the vocabulary lacks {len(bytes_ - vocab.keys())} of the 256 tokens of single bytes, so "
      "some text would be dropped; expected a byte-level BPE as GPT-2's (trained with "
      "initial_alphabet=ByteLevel.alphabet()); give another kind as its tokenizer.json"
    )
  made = bytes_ | {a + b for a, b in pairs}
  special = {t for t in vocab if (t[:1], t[-1:]) in {("<", ">"), ("[", "]")}}
  lost = sorted(vocab.keys() - made - special, key=vocab.get)
  if lost:
    raise ValueError(
      f"no merge makes {len(lost)} of the vocabulary's {len(vocab)} tokens, {lost[0]!r} the first: "
      "the merges are cut short or belong to another tokenizer, or it is no BPE as GPT-2's (CLIP's "
      "is not); take both files from one tokenizer, or give its tokenizer.json"
    )


def tokenize(tokenizer, captions, *, length, readout):
  """Captions -> token ids (B, L) int32, mask (B, L) bool, truncated (B,) bool.

  Both readouts pad with EOT. "eot": at most L - 1 caption tokens, then the EOT that is read, and
  the mask covers it. "last": at most L caption tokens; position L - 1 is read. The mask goes by
  the count of tokens: a caption may hold EOT itself.

  Raises:
    ValueError: `readout` is neither.
  """
  if readout not in ("eot", "last"):
    raise ValueError(f"text.readout must be 'eot' or 'last', got {readout!r}")
  own = 1 if readout == "eot" else 0
  ids = np.full((len(captions), length), tokenizer.eot, np.int32)
  mask = np.zeros((len(captions), length), bool)
  truncated = np.zeros(len(captions), bool)
  for row, caption in enumerate(captions):
    # Half a surrogate pair, which JSON can carry, is no text to either library: "?" in its place.
    tokens = tokenizer.encode(caption.encode("utf-8", "replace").decode())
    truncated[row] = len(tokens) > length - own
    tokens = tokens[: length - own]
    ids[row, : len(tokens)] = tokens
    mask[row, : len(tokens) + own] = True
  return ids, mask, truncated
