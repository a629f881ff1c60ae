"""Learning-rate schedules, the decay mask and the optimizer, from the config's `optim` sub-tree."""

import jax
import optax


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
  )


OPTIMIZERS = {"adamw": adamw}


def make_optimizer(cfg, steps):
  """Gradient transformation: clip by global norm (0 = off), then the optimizer.

  Raises:
    ValueError: unknown `optim.name`, `optim.schedule` or `optim.decay_on`.
  """
  if cfg.name not in OPTIMIZERS:
    raise ValueError(f"optim.name must be one of {', '.join(OPTIMIZERS)}, got {cfg.name!r}")
  # One structure with and without clipping, so that a checkpoint opens under either.
  clip = optax.clip_by_global_norm(cfg.clip) if cfg.clip else optax.identity()
  return optax.chain(clip, OPTIMIZERS[cfg.name](cfg, make_schedule(cfg, steps)))
