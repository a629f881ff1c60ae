"""vit_b with CLIP's objective and nothing else changed."""

from configs import vit_b


def get_config():
  return vit_b.get_config("clip")
