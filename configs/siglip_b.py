"""vit_b with SigLIP's objective and nothing else changed."""

from configs import vit_b


def get_config(names=""):
  return vit_b.get_config(f"siglip,{names}")
