"""vit_b as LeVLJEPA+: two global and four local views of each image, 109 GFLOP a pair forward."""

from configs import vit_b


def get_config(names=""):
  return vit_b.get_config(f"plus,{names}")
