"""ViT-B/16 and GPT-2-base by the DataComp recipe: batch 4096, 200k steps, 819M samples."""

from configs import base


def get_config():
  return base.get_config()
