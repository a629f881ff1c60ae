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


class GPT(nn.Module):
  """Tokens (B, L) int32 and mask (B, L) bool -> the readout token's hidden state, (B, W).

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
  dtype: Any

  @nn.compact
  def __call__(self, text, mask):
    L = text.shape[1]
    if self.length < L:
      raise ValueError(f"{L} tokens, but the text tower has text.length={self.length} positions")
    init = nn.initializers.normal(0.02)
    out_init = nn.initializers.normal(0.02 / (2 * self.depth) ** 0.5)
    embed = nn.Embed(
      self.vocab_size, self.width, embedding_init=init, dtype=self.dtype, name="token_embedding"
    )
    positions = self.param("position_embedding", init, (self.length, self.width))
    x = embed(text) + positions[:L].astype(self.dtype)
    x = constrain(x, "batch", None, None)  # (B, L, W)

    block = dict(
      heads=self.heads, causal=True, gelu_tanh=True, norm_eps=1e-5,
      kernel_init=init, out_init=out_init, dtype=self.dtype,
    )  # fmt: skip
    # Padding lies behind the EOT readout, which causal attention never sees: no mask is needed.
    keys = None if self.readout == "eot" else mask[:, None, None, :]
    with jax.named_scope("gpt"):
      x = Blocks(self.depth, self.scan, self.remat, block, name="tower")(x, keys)
    # The norm acts on each token alone, so only the readout token is normalised.
    x = x[jnp.arange(x.shape[0]), readout_positions(mask, self.readout)]
    return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="final_norm")(x)
