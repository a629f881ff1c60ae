"""Objectives by name. Each maps arrays to named terms; weights are applied here, once."""

import math

from jepa_vl.objectives.contrastive import clip, siglip
from jepa_vl.objectives.levljepa import levljepa, levljepa_plus


def _levljepa_weights(cfg, *more):
  lambdas = {k: cfg[k] for k in ("lambda_img", "lambda_txt", *more)}
  if sum(lambdas.values()) >= 1:
    raise ValueError(
      ", ".join(f"objective.{k}={v}" for k, v in lambdas.items()) + " must sum to less than 1, the "
      "alignment's weight is the rest"
    )
  cross = (1 - sum(lambdas.values())) / 2
  return {
    "align/img_to_txt": cross,
    "align/txt_to_img": cross,
    "sigreg/img": cfg.lambda_img,
    "sigreg/txt": cfg.lambda_txt,
  }


def _plus_weights(cfg):
  return _levljepa_weights(cfg, "lambda_multi") | {"multi": cfg.lambda_multi}


def _clip_weights(cfg):
  return {"contrast/img_to_txt": 0.5, "contrast/txt_to_img": 0.5}


_SIGREG_KEYS = ("num_slices", "knots", "t_max", "group_size", "scale_rows")
_LEVLJEPA_KEYS = ("align", "stop_gradient", *_SIGREG_KEYS)

# name: (function, the config keys that it takes, weights of its terms from the config)
OBJECTIVES = {
  "levljepa": (levljepa, _LEVLJEPA_KEYS, _levljepa_weights),
  "levljepa_plus": (levljepa_plus, _LEVLJEPA_KEYS, _plus_weights),
  "clip": (clip, ("scale_max",), _clip_weights),
  "siglip": (siglip, ("chunk_size",), lambda cfg: {"sigmoid": 1.0}),
}

# name: what it learns beside the model, as functions from the config to the initial value
LEARNED_SCALARS = {
  "clip": {"log_scale": lambda cfg: math.log(cfg.scale)},
  "siglip": {"log_scale": lambda cfg: math.log(cfg.scale), "bias": lambda cfg: cfg.bias},
}


def learned_scalars(cfg):
  """{name: initial value} of the scalars that the objective learns and expects in `out`."""
  return {name: float(value(cfg)) for name, value in LEARNED_SCALARS.get(cfg.name, {}).items()}


def from_config(cfg):
  """Returns objective(out, rng) -> (loss, terms) for the config's `objective` sub-tree.

  Raises:
    ValueError: unknown `objective.name`, or weights that leave none for the alignment.
  """
  if cfg.name not in OBJECTIVES:
    raise ValueError(f"objective.name must be one of {', '.join(OBJECTIVES)}, got {cfg.name!r}")
  function, keys, weights_of = OBJECTIVES[cfg.name]
  kwargs, weights = {k: cfg[k] for k in keys}, weights_of(cfg)

  def objective(out, rng):
    terms = function(out, rng, **kwargs)
    return sum(weights[name] * term for name, term in terms.items()), terms

  return objective
