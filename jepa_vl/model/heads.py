"""Embedding heads and predictors: Dense - BatchNorm - GELU stacks ending in a Dense."""

from typing import Any

import flax.linen as nn

from jepa_vl.sharding import constrain


class Head(nn.Module):
  """(B, .) -> (B, out_dim) float32 through `depth` hidden layers; depth 0 is the identity.

  Depth 1 is the reference's embedding head ("pre-projection"), 4 its predictor ("projector").
  `dropout` acts after each hidden layer, in training alone.
  BatchNorm statistics are those of the global batch, as SyncBatchNorm's. A Dense before a
  BatchNorm has no bias: BatchNorm removes any constant, so the reference's bias there has exactly
  zero gradient and Adam would turn its round-off into steps (an imported bias is folded into the
  running mean). Initialisation as PyTorch's Linear, uniform in 1/sqrt(fan_in).
  """

  depth: int
  hidden_dim: int
  out_dim: int
  dropout: float
  dtype: Any

  @nn.compact
  def __call__(self, x, *, train):
    if not self.depth:
      return x
    init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    for i in range(self.depth):
      x = nn.Dense(
        self.hidden_dim, use_bias=False, kernel_init=init, dtype=self.dtype, name=f"dense_{i}"
      )(x)
      # Else XLA rematerialises whole rows around the statistics. Whole over tensor: they are
      # a thousandth of the FLOPs, and XLA (jax 0.10) then gave dense_0 a wrong gradient on 2x2x2.
      x = constrain(x, "batch", None)
      x = nn.BatchNorm(
        use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype, name=f"bn_{i}"
      )(x)
      x = nn.gelu(x, approximate=False)
      x = nn.Dropout(self.dropout, deterministic=not train)(x)
    bound = self.hidden_dim**-0.5
    bias_init = lambda key, shape, dtype: nn.initializers.uniform(2 * bound)(key, shape) - bound
    x = nn.Dense(
      self.out_dim, kernel_init=init, bias_init=bias_init, dtype=self.dtype, name="out"
    )(x)
    return constrain(x.astype("float32"), "batch", None)
