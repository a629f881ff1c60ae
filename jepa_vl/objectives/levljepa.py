"""LeVLJEPA: cross-modal prediction of stop-gradient embeddings, and SIGReg on each modality."""

import jax
import jax.numpy as jnp

from jepa_vl.objectives.sigreg import sigreg


def mse(prediction, target):
  """Mean over rows and dimensions of the squared difference; (B, D), or one of them (V, B, D)."""
  return jnp.mean((prediction - target) ** 2)


def mse_sum(prediction, target):
  """Squared distance, mean over rows only: D times `mse` (one reading of the paper's equation)."""
  return jnp.mean(jnp.sum((prediction - target) ** 2, axis=-1))


def cosine(prediction, target):
  """2 - 2 cos between rows, averaged; both (B, D)."""
  norm = lambda x: x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)
  return jnp.mean(2 - 2 * jnp.sum(norm(prediction) * norm(target), axis=-1))


ALIGN = {"mse": mse, "mse_sum": mse_sum, "cosine": cosine}


def levljepa(out, rng, *, align, stop_gradient, num_slices, knots, t_max, group_size, scale_rows):
  """The four terms of LeVLJEPA (arXiv 2607.00784) from z and p of both modalities, (B, D).

  Of several views, z_img is the mean of the global ones, p_img may be (V, B, D), every view's
  prediction of the caption, and SIGReg tests each of `views` (V, B, D) over B and averages.
  `stop_gradient=False` exists for the ablation that shows what it is for.

  Raises:
    ValueError: unknown `align`, or `group_size` does not divide B.
  """
  if align not in ALIGN:
    raise ValueError(f"objective.align must be one of {', '.join(ALIGN)}, got {align!r}")
  target = jax.lax.stop_gradient if stop_gradient else lambda x: x
  rng_img, rng_txt = jax.random.split(rng)
  cfg = dict(
    num_slices=num_slices, knots=knots, t_max=t_max, group_size=group_size, scale_rows=scale_rows
  )
  return {
    "align/img_to_txt": ALIGN[align](out["p_img"], target(out["z_txt"])),
    "align/txt_to_img": ALIGN[align](out["p_txt"], target(out["z_img"])),
    "sigreg/img": sigreg(rng_img, out.get("views", out["z_img"]), **cfg),
    "sigreg/txt": sigreg(rng_txt, out["z_txt"], **cfg),
  }


def levljepa_plus(out, rng, **cfg):
  """LeVLJEPA+: `levljepa`'s terms and `multi`, which pulls every view to the mean of the global
  ones. That mean is not stopped.

  Raises:
    ValueError: as `levljepa`, or `out` has no views.
  """
  if "views" not in out:
    raise ValueError("objective.name='levljepa_plus' needs several views: data.augment='dino'")
  return levljepa(out, rng, **cfg) | {"multi": mse(out["views"], out["z_img"])}
