"""ViT-L/16 and a text tower of its size, otherwise as vit_b, with activations recomputed."""

from configs import base, presets


def get_config(names=""):
  c = base.get_config()
  c.model.size = "large"
  c.model.remat = "dots"
  return presets.apply(c, names)
