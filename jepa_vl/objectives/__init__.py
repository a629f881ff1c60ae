"""Objectives by name. Each maps arrays to named terms; weights are applied here, once."""

from jepa_vl.objectives.levljepa import levljepa


def _levljepa_weights(cfg):
  if cfg.lambda_img + cfg.lambda_txt >= 1:
    raise ValueError(
      f"objective.lambda_img={cfg.lambda_img} and lambda_txt={cfg.lambda_txt} must sum to less "
      "than 1, the alignment's weight is the rest"
    )
  cross = (1 - cfg.lambda_img - cfg.lambda_txt) / 2
  return {
    "align/img_to_txt": cross,
    "align/txt_to_img": cross,
    "sigreg/img": cfg.lambda_img,
    "sigreg/txt": cfg.lambda_txt,
  }


_SIGREG_KEYS = ("num_slices", "knots", "t_max", "group_size", "scale_rows")

# name: (function, the config keys that it takes, weights of its terms from the config)
OBJECTIVES = {
  "levljepa": (levljepa, ("align", "stop_gradient", *_SIGREG_KEYS), _levljepa_weights),
}


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
