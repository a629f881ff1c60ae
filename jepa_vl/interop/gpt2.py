"""Hugging Face's GPT2Model: the text tower's weights to and from its names.

Its Conv1D keeps kernels as (in, out), as ours. The number of heads stands in no file; it is that
of two_tower.SIZES for the width.
"""

import numpy as np

from jepa_vl.interop.layout import OUT, QKV, SAME, convert, invert

TABLE = (
  ("ln_f.weight", "final_norm/scale", SAME, "W"),
  ("ln_f.bias", "final_norm/bias", SAME, "W"),
  ("wte.weight", "token_embedding/embedding", SAME, "V W"),
  ("wpe.weight", "position_embedding", SAME, "L W"),
  ("h.{}.ln_1.weight", "tower/blocks/attn_norm/scale", SAME, "W"),
  ("h.{}.ln_1.bias", "tower/blocks/attn_norm/bias", SAME, "W"),
  ("h.{}.attn.c_attn.weight", "tower/blocks/attn/qkv/kernel", QKV, "W 3W"),
  ("h.{}.attn.c_attn.bias", "tower/blocks/attn/qkv/bias", QKV, "3W"),
  ("h.{}.attn.c_proj.weight", "tower/blocks/attn/out/kernel", OUT, "W W"),
  ("h.{}.attn.c_proj.bias", "tower/blocks/attn/out/bias", SAME, "W"),
  ("h.{}.ln_2.weight", "tower/blocks/mlp_norm/scale", SAME, "W"),
  ("h.{}.ln_2.bias", "tower/blocks/mlp_norm/bias", SAME, "W"),
  ("h.{}.mlp.c_fc.weight", "tower/blocks/mlp/up/kernel", SAME, "W 4W"),
  ("h.{}.mlp.c_fc.bias", "tower/blocks/mlp/up/bias", SAME, "4W"),
  ("h.{}.mlp.c_proj.weight", "tower/blocks/mlp/down/kernel", SAME, "4W W"),
  ("h.{}.mlp.c_proj.bias", "tower/blocks/mlp/down/bias", SAME, "W"),
)
# The language model's output layer, and the causal masks that old files carry.
LEFT_OUT = r"^lm_head\.weight$|^(encoder\.)?h\.\d+\.attn\.(masked_)?bias$"


def to_ours(flat):
  """GPT2Model's or GPT2LMHeadModel's {name: float32 array} -> the text tower's parameters.

  All rows of its position table are kept. The output layer and old mask buffers are left out.

  Raises:
    ValueError: it is no GPT-2 (every name that is missing, unexpected or of another shape is
      listed), or of a width that we lack.
  """
  flat = {name.removeprefix("transformer."): x for name, x in flat.items()}
  return convert(TABLE, flat, left_out=LEFT_OUT)


def from_ours(text_params, positions=1024):
  """The text tower's parameters -> GPT2Model's {name: float32 array}.

  Its position table gets zero rows up to `positions`, GPT2Config's default; more rows are kept.

  Raises:
    ValueError: the tree is no text tower.
  """
  return pad_positions(invert(TABLE, text_params), "wpe.weight", positions)


def pad_positions(flat, name, positions):
  """`flat` with the table `name` (L, W) of at least `positions` rows; new rows are zero."""
  more = max(positions - flat[name].shape[0], 0)
  return {**flat, name: np.pad(flat[name], ((0, more), (0, 0)))}
