"""ViT-S/16 and a text tower of its size, otherwise as vit_b."""

from configs import base


def get_config():
  c = base.get_config()
  c.model.size = "small"
  return c
