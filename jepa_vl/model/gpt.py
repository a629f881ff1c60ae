"""Causal text tower as Hugging Face's GPT2Model, read out at one token."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jepa_vl.model.layers import Blocks
from jepa_vl.sharding import constrain


def readout_positions(mask, how):
  """Which token stands for the sentence. mask: (B, L) bool, True on caption tokens -> (B,) int32.

  Raises:
    ValueError: `how` is neither "eot" nor "last".
  """
  if how == "eot":
    return mask.sum(axis=1).astype(jnp.int32) - 1
  if how == "last":
    return jnp.full(mask.shape[0], mask.shape[1] - 1, jnp.int32)
  raise ValueError(f"text.readout must be 'eot' or 'last', got {how!r}")


def own_caption(position):
  """The place where each token's caption begins, (B, L) int32; what lies behind the token, causal
  attention does not see.

  position: (B, L) int32, the place of each token in its caption; 0 in padding, which so sees
  nothing but itself.
  """
  return jnp.arange(position.shape[1]) - position


class GPT(nn.Module):
  """Tokens (B, L) int32 and mask (B, L) bool -> the readout token's hidden state, (B, W).

  Or captions packed several to a row, in G groups of g captions in R rows: tokens (G, R, L), the
  position of each in its caption, and `readout`, (G, g), the place r L + t of each caption's EOT
  -> (G g, W), what the captions give one by one.

  Initialisation as GPT-2: normal 0.02, residual projections scaled by 1/sqrt(2 depth).
  """

  width: int
  depth: int
  heads: int
  vocab_size: int
  length: int
  readout: str
  scan: bool
  remat: str
  attention: str
  pointwise: str
  dtype: Any

  @nn.compact
  def __call__(self, text, mask=None, *, position=None, readout=None):
    L = text.shape[-1]
    if self.length < L:
      raise ValueError(f"{L} tokens, but the text tower has text.length={self.length} positions")
    init = nn.initializers.normal(0.02)
    out_init = nn.initializers.normal(0.02 / (2 * self.depth) ** 0.5)
    embed = nn.Embed(
      self.vocab_size, self.width, embedding_init=init, dtype=self.dtype, name="token_embedding"
    )
    positions = self.param("position_embedding", init, (self.length, self.width))
    if position is None:  # one caption to a row
      positions = positions[:L]
      # Padding lies behind the EOT readout, which causal attention never sees: no mask is needed.
      keys = None if self.readout == "eot" else mask[:, None, None, :]
      readout = readout_positions(mask, self.readout)[:, None]
    else:
      text, position = text.reshape(-1, L), position.reshape(-1, L)  # (G R, L)
      positions = positions[position]
      keys = own_caption(position)
    # Whole over fsdp, which splits the tokens too; a table split otherwise than what it gives
    # would have XLA make every token's row on every device.
    table = constrain(embed.embedding, None, "tensor")  # (V, W)
    # Taken in float32, in which the gradients of a frequent token, EOT first, are then added up.
    x = (jnp.take(table, text, axis=0) + positions).astype(self.dtype)
    x = constrain(x, "batch", None, None)  # (B, L, W), or (G R, L, W)

    block = dict(
      heads=self.heads, causal=True, attention=self.attention, pointwise=self.pointwise,
      gelu_tanh=True, norm_eps=1e-5, kernel_init=init, out_init=out_init, dtype=self.dtype,
    )  # fmt: skip
    # All that is wanted is the readout tokens. Taken along an axis, and not by indices of rows, no
    # token leaves its device.
    def select(x):
      x = x.reshape(len(readout), -1, x.shape[-1])
      return jnp.take_along_axis(x, readout[..., None], axis=1)

    with jax.named_scope("gpt"):
      x = Blocks(self.depth, self.scan, self.remat, block, name="tower")(x, keys, select)
    x = x.reshape(-1, self.width)
    return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="final_norm")(x)
