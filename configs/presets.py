"""Named differences to any configuration: --config=configs/vit_b.py:clip, configs/tiny.py:plus.

Several are joined by commas and applied in order: configs/vit_b.py:release1,plus. Those of
configs/evals.py add evaluations.
"""

from configs import evals


def plus(c):
  """LeVLJEPA+ (release 1): two global and four local views in DINO's augmentation."""
  c.objective.name = "levljepa_plus"
  c.data.augment = "dino"
  c.data.crop_scale = (0.4, 1.0)
  c.data.flip = 0.5
  c.data.jitter_prob = 0.8
  c.data.jitter = (0.4, 0.4, 0.2, 0.1)
  c.data.grey_prob = 0.2


def clip(c):
  """CLIP's symmetric cross-entropy on the embeddings: nothing else of the run changes."""
  c.objective.name = "clip"
  c.objective.scale = 1 / 0.07
  c.model.predictor_depth = 0


def siglip(c):
  """SigLIP's pairwise sigmoid on the embeddings: nothing else of the run changes."""
  c.objective.name = "siglip"
  c.objective.scale = 10.0
  c.objective.bias = -10.0
  c.model.predictor_depth = 0


def release1(c):
  """The model, text and images of the authors' first script; its 50k steps of 256 rows per process
  are for the user to set."""
  c.model.embed_dim = 768
  c.text.readout = "last"
  c.data.augment = "resize"


def release2(c):
  """The same of the authors' second script, with its warm-up."""
  c.model.embed_dim = 768
  c.optim.warmup_from = 0.01


def paper(c):
  """The paper as a summary of it reads, where it differs from both scripts."""
  c.objective.align = "mse_sum"
  c.objective.lambda_img = 0.01
  c.objective.lambda_txt = 0.01
  c.model.predictor_dropout = 0.1


PRESETS = {f.__name__: f for f in (plus, clip, siglip, release1, release2, paper)}
PRESETS |= evals.PROTOCOLS


def apply(c, names):
  """Applies presets, joined by commas, to a configuration; returns it. "" applies none.

  Raises:
    ValueError: a name that does not exist.
  """
  for name in filter(None, names.split(",")):
    if name not in PRESETS:
      raise ValueError(f"no preset {name!r} (after the config's name); known: {', '.join(PRESETS)}")
    PRESETS[name](c)
  return c
