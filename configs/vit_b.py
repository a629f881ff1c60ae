"""ViT-B/16 and GPT-2-base by the DataComp recipe: batch 4096, 200k steps, 819M samples."""

from configs import base, presets


def get_config(names=""):
  return presets.apply(base.get_config(), names)
