"""A linear probe that learns beside the encoder and never touches it."""

import dataclasses

import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class OnlineProbe:
  """A linear layer on the CLS feature, (B, width) -> (B, classes), trained by Adam.

  The features are normalised as by a LayerNorm without parameters, so that `lr` means the same
  early and late. Its state, {"weights", "opt"}, is part of the TrainState.
  """

  width: int
  classes: int
  lr: float

  @property
  def _tx(self):
    return optax.adam(self.lr)

  def init(self):
    """The first state: zero weights, of which the last row is the bias."""
    weights = jnp.zeros((self.width + 1, self.classes), jnp.float32)
    return {"weights": weights, "opt": self._tx.init(weights)}

  def loss(self, weights, features, labels):
    """Mean cross-entropy over rows that have a label.

    Args:
      weights: (width + 1, classes); features: (B, width), stop-gradient; labels: (B,) int, -1 for
        rows without one.

    Returns:
      The loss, and float32 scalars `probe/loss`, `probe/top1` (share of labelled rows that are
      right, before the step learns from them) and `probe/labelled` (share of all rows).
    """
    x = features.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    logits = x @ weights[:-1] + weights[-1]
    known = labels >= 0
    mean = lambda v: jnp.sum(jnp.where(known, v, 0)) / jnp.maximum(jnp.sum(known), 1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    right = jnp.argmax(logits, axis=-1) == labels
    loss = mean(losses)
    terms = {"loss": loss, "top1": mean(right), "labelled": jnp.mean(known)}
    return loss, {f"probe/{name}": v.astype(jnp.float32) for name, v in terms.items()}

  def update(self, state, grads):
    """The state after one step of Adam."""
    updates, opt = self._tx.update(grads, state["opt"])
    return {"weights": state["weights"] + updates, "opt": opt}


def from_config(cfg, width):
  """The probe of the config's `probe` sub-tree on features of that width; None without a label."""
  return OnlineProbe(width, cfg.classes, cfg.lr) if cfg.label else None
