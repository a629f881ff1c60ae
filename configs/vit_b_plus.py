"""vit_b as LeVLJEPA+: two global and four local views of each image, 3.1 times the image FLOPs."""

from configs import vit_b


def get_config():
  return vit_b.get_config("plus")
