"""Tokenizers and the one function that turns captions into token arrays, in training and after."""

import hashlib
import os

import numpy as np

from jepa_vl.data import embedded


class SentencePiece:
  """A SentencePiece model, held as bytes so that a checkpoint can carry it."""

  def __init__(self, model):
    import sentencepiece

    self.model = model
    try:
      self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as e:
      raise ValueError("text.tokenizer: the file is no SentencePiece .model") from e
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
    digest = hashlib.sha256(self.model).hexdigest()[:16]
    return f"sentencepiece of {self.vocab_size}, {digest}"

  def __reduce__(self):
    return SentencePiece, (self.model,)


def load(spec):
  """The tokenizer `text.tokenizer`: "emoji" (embedded) or the path of a SentencePiece .model.

  Raises:
    FileNotFoundError: no such file.
    ValueError: the file is no SentencePiece model, or one without EOT.
  """
  path = embedded.DIRECTORY / "tokenizer.model" if spec == "emoji" else os.path.expanduser(spec)
  if not spec or not os.path.isfile(path):
    raise FileNotFoundError(
      f"text.tokenizer={spec!r} is no file; expected 'emoji' (the embedded one) or the path of a "
      "SentencePiece .model"
    )
  with open(path, "rb") as f:
    return SentencePiece(f.read())


def tokenize(tokenizer, captions, *, length, readout):
  """Captions -> token ids (B, L) int32, mask (B, L) bool, truncated (B,) bool.

  Both readouts pad with EOT. "eot": at most L - 1 caption tokens, then the EOT that is read, and
  the mask covers it. "last": at most L caption tokens; position L - 1 is read.

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
    tokens = tokenizer.encode(caption)
    truncated[row] = len(tokens) > length - own
    tokens = tokens[: length - own]
    ids[row, : len(tokens)] = tokens
    mask[row, : len(tokens) + own] = True
  return ids, mask, truncated
