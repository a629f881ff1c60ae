"""What carries patch tokens into a frozen language model, and the loss that it learns from."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import optax

from jepa_vl.model import language


def pool(patches, side):
  """Patch tokens on their grid (B, h, w, F) -> means of side x side patches, (B, n, F) by rows.

  Raises:
    ValueError: `side` does not divide the grid.
  """
  B, h, w, F = patches.shape
  if h % side or w % side:
    raise ValueError(f"pool={side} does not divide the grid of {h} x {w} patches")
  return patches.reshape(B, h // side, side, w // side, side, F).mean(axis=(2, 4)).reshape(B, -1, F)


class Bridge(nn.Module):
  """Patch tokens (B, n, F) -> image tokens (B, n, width), each by itself.

  The first LayerNorm makes encoders of other scales alike; the last gives the tokens a root mean
  square of `scale` to begin with, which is to be that of the language model's own token vectors.
  """

  width: int
  hidden: int
  scale: float
  dtype: Any

  @nn.compact
  def __call__(self, patches):
    norm = lambda name: nn.LayerNorm(dtype=self.dtype, name=name)
    x = norm("norm")(patches.astype(jnp.float32))
    x = nn.gelu(nn.Dense(self.hidden, dtype=self.dtype, name="up")(x))
    x = nn.Dense(self.width, dtype=self.dtype, name="down")(x)
    return norm("out_norm")(x) * self.scale


def splice(model, params, image, text):
  """One row of columns: what opens the prompt, the image's tokens, the rest of the text.

  image: (B, n, W); text: {"opening" (p,), "tokens" (B, t), "mask" (B, t)}; the mask is False on
  padding, which stands between the image and what follows it.

  Returns:
    embedded (B, p + n + t, W), mask (B, p + n + t).
  """
  B, n, _ = image.shape
  opening = jnp.broadcast_to(text["opening"], (B, *text["opening"].shape))
  embed = lambda tokens: model.apply({"params": params}, tokens, method="embed")
  parts = [embed(opening), image.astype(model.dtype), embed(text["tokens"])]
  known = jnp.ones((B, opening.shape[1] + n), bool)
  return jnp.concatenate(parts, axis=1), jnp.concatenate([known, text["mask"]], axis=1)


def answer_loss(model, params, image, text, answer, answer_mask):
  """Mean cross-entropy of the answers' tokens; nothing else of the row is predicted.

  text: the prompt, as `splice` takes it; answer (B, a) int32; answer_mask (B, a) bool. An answer
  begins right behind the prompt.
  """
  count = answer.shape[1]
  text = {
    **text, "tokens": jnp.concatenate([text["tokens"], answer], axis=1),
    "mask": jnp.concatenate([text["mask"], answer_mask], axis=1),
  }  # fmt: skip
  x, mask = splice(model, params, image, text)
  # The last prompt column predicts the first token of the answer, and so on.
  logits, _ = model.apply({"params": params}, x, mask, last=count + 1)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], answer)
  return jnp.sum(losses * answer_mask) / jnp.maximum(answer_mask.sum(), 1)


def answer(model, params, image, text, *, steps, ends):
  """Greedy answers, (B, steps) int32, as language.greedy."""
  x, mask = splice(model, params, image, text)
  return language.greedy(model, params, x, mask, steps=steps, ends=ends)
