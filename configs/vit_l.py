"""ViT-L/16 and a text tower of its size, otherwise as vit_b."""

from configs import base, presets


def get_config(names=""):
  c = base.get_config()
  c.model.size = "large"
  return presets.apply(c, names)
