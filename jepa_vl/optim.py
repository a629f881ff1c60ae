"""Learning-rate schedules, the decay mask and the optimizer, from the config's `optim` sub-tree."""

import math
import re

import jax
import jax.numpy as jnp
import optax

from jepa_vl import sharding


def cosine(cfg, steps):
  """Linear warm-up, then a cosine to lr * final at `steps`."""
  return optax.warmup_cosine_decay_schedule(
    cfg.lr * cfg.warmup_from, cfg.lr, warmup_steps(cfg, steps), steps, cfg.lr * cfg.final
  )


def warmup_stable_decay(cfg, steps):
  """Linear warm-up, constant, then a cosine to lr * final over the last `decay` of the steps."""
  warmup = warmup_steps(cfg, steps)
  decay_from = max(steps - round(cfg.decay * steps), warmup)
  return optax.join_schedules(
    [
      optax.linear_schedule(cfg.lr * cfg.warmup_from, cfg.lr, warmup),
      optax.constant_schedule(cfg.lr),
      optax.cosine_decay_schedule(cfg.lr, max(steps - decay_from, 1), alpha=cfg.final),
    ],
    [warmup, decay_from],
  )


def warmup_steps(cfg, steps):
  # A shortened run (--config.steps=100) keeps its shape: never more warm-up than half of it.
  return min(cfg.warmup, steps // 2)


SCHEDULES = {"cosine": cosine, "wsd": warmup_stable_decay}


def make_schedule(cfg, steps):
  """step -> learning rate.

  Raises:
    ValueError: unknown `optim.schedule`.
  """
  if cfg.schedule not in SCHEDULES:
    raise ValueError(f"optim.schedule must be one of {', '.join(SCHEDULES)}, got {cfg.schedule!r}")
  return SCHEDULES[cfg.schedule](cfg, steps)


def decay_mask(which):
  """params -> tree of bool: "all" parameters decay (the reference), or only "matrices".

  Matrices are kernels and the token table; biases, norms, CLS and positions are not. A learned
  scalar (temperature, bias of the contrastive baselines) never decays: zero means nothing for it.
  """
  if which not in ("all", "matrices"):
    raise ValueError(f"optim.decay_on must be 'all' or 'matrices', got {which!r}")

  def is_decayed(path, x):
    return x.ndim > 0 and (which == "all" or path[-1].key in ("kernel", "embedding"))

  return lambda params: jax.tree_util.tree_map_with_path(is_decayed, params)


def adamw(cfg, schedule):
  """AdamW with decoupled weight decay, scaled by the learning rate as in PyTorch."""
  return optax.adamw(
    schedule,
    b1=cfg.b1,
    b2=cfg.b2,
    eps=cfg.eps,
    weight_decay=cfg.weight_decay,
    mask=decay_mask(cfg.decay_on),
    mu_dtype=moment_dtype(cfg),
  )


def moment_dtype(cfg):
  """The type in which the first moment is kept between steps; it is computed in float32."""
  dtypes = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
  if cfg.mu_dtype not in dtypes:
    raise ValueError(f"optim.mu_dtype must be one of {', '.join(dtypes)}, got {cfg.mu_dtype!r}")
  return dtypes[cfg.mu_dtype]


# The kernels that Muon orthogonalises: axes that the layer sums over, axes of what it gives. Every
# index of the others is a matrix of its own: each layer's, and of qkv each of the three.
MATRICES = (
  (r"blocks/attn/qkv/kernel", (1,), (3, 4)),  # (layer, W, 3, H, K)
  (r"blocks/attn/out/kernel", (1, 2), (3,)),  # (layer, H, K, W)
  (r"blocks/mlp/(up|down)/kernel", (1,), (2,)),  # (layer, W, 4W), (layer, 4W, W)
)


def muon(cfg, schedule):
  """Muon on the kernels of the towers' blocks, AdamW on all else, under one schedule and decay.

  Momentum 0.95 and updates of root mean square 0.2, about AdamW's own, are those of Moonlight
  (arXiv 2502.16982), so that `optim.lr` means the same as under AdamW.
  """
  by_muon = optax.chain(
    optax.contrib.scale_by_muon(
      beta=0.95, mu_dtype=moment_dtype(cfg), weight_dimension_numbers=_matrices
    ),
    optax.stateless(lambda updates, _: jax.tree.map(_to_rms, updates, _matrices(updates))),
  )
  by_adam = optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, mu_dtype=moment_dtype(cfg))
  is_matrix = lambda path, _: "muon" if _axes(path) else "adam"
  return optax.chain(
    optax.partition(
      {"muon": by_muon, "adam": by_adam},
      lambda params: jax.tree_util.tree_map_with_path(is_matrix, params),
    ),
    optax.add_decayed_weights(cfg.weight_decay, decay_mask(cfg.decay_on)),
    optax.scale_by_learning_rate(schedule),
  )


def _axes(path):
  name = sharding.path_name(path)
  return next((axes for pattern, *axes in MATRICES if re.search(pattern, name)), None)


def _matrices(kernels):
  as_dimensions = lambda path, _: optax.contrib.MuonDimensionNumbers(*_axes(path))
  return jax.tree_util.tree_map_with_path(as_dimensions, kernels)


def _to_rms(update, axes):
  # An orthogonal (m, n) matrix has root mean square 1 / sqrt(max(m, n)).
  sides = (math.prod(update.shape[a] for a in some) for some in axes)
  return 0.2 * max(sides) ** 0.5 * update


def muon_flops(params):
  """FLOPs of Muon's matrix products in one step, whatever the batch; mesh.data splits none of them.

  Five times, of an (m, n) matrix X with m <= n: X X^T, its square, and their sum times X.
  """
  total = 0
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    if axes := _axes(path):
      m, n = sorted(math.prod(x.shape[a] for a in some) for some in axes)
      total += x.size // (m * n) * 5 * (4 * m**2 * n + 2 * m**3)
  return total


OPTIMIZERS = {"adamw": adamw, "muon": muon}


def make_optimizer(cfg, steps):
  """Gradient transformation: clip by global norm (0 = off), then the optimizer.

  Raises:
    ValueError: unknown `optim.name`, `optim.schedule`, `optim.decay_on` or `optim.mu_dtype`.
  """
  if cfg.name not in OPTIMIZERS:
    raise ValueError(f"optim.name must be one of {', '.join(OPTIMIZERS)}, got {cfg.name!r}")
  # One structure with and without clipping, so that a checkpoint opens under either.
  clip = optax.clip_by_global_norm(cfg.clip) if cfg.clip else optax.identity()
  return optax.chain(clip, OPTIMIZERS[cfg.name](cfg, make_schedule(cfg, steps)))
