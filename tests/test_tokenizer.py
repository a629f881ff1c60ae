"""Captions become tokens, EOT and mask as both readouts want them."""

import numpy as np
import pytest

from jepa_vl.data import tokenizer

LONG = " ".join(["grinning face"] * 20)


@pytest.mark.parametrize("readout", ["eot", "last"])
@pytest.mark.parametrize("caption", ["", "smile", "red heart with an arrow", LONG])
def test_tokens(tok, caption, readout):
  """Own tokens, cut to what fits, then EOT to the end; "eot" reads the first EOT, "last" none."""
  L = 9
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


def test_a_tokenizer_that_is_no_model_is_refused(tmp_path):
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(ValueError, match="no SentencePiece .model"):
    tokenizer.load(str(tmp_path / "tokenizer.json"))
  with pytest.raises(FileNotFoundError, match="text.tokenizer='' is no file"):
    tokenizer.load("")
