"""timm's vit_{size}_patch{p}_{S}: the image tower's weights to and from its names.

Only the plain ViT: CLS token, learned positions, qkv bias, final norm. What other variants add
(register tokens, layer scale, qk-norm, fc_norm) is refused by name. The number of heads stands in
no file; it is that of two_tower.SIZES for the width.
"""

from jepa_vl.interop.layout import (
  FIRST,
  LINEAR,
  OUT_LINEAR,
  PATCHES,
  QKV,
  QKV_LINEAR,
  SAME,
  convert,
  invert,
)

TABLE = (
  ("norm.weight", "final_norm/scale", SAME, "W"),
  ("norm.bias", "final_norm/bias", SAME, "W"),
  ("cls_token", "cls", SAME, "1 1 W"),
  ("pos_embed", "position_embedding", FIRST, "1 N W"),
  ("patch_embed.proj.weight", "patch_embedding/kernel", PATCHES, "W 3 P P"),
  ("patch_embed.proj.bias", "patch_embedding/bias", SAME, "W"),
  ("blocks.{}.norm1.weight", "tower/blocks/attn_norm/scale", SAME, "W"),
  ("blocks.{}.norm1.bias", "tower/blocks/attn_norm/bias", SAME, "W"),
  ("blocks.{}.attn.qkv.weight", "tower/blocks/attn/qkv/kernel", QKV_LINEAR, "3W W"),
  ("blocks.{}.attn.qkv.bias", "tower/blocks/attn/qkv/bias", QKV, "3W"),
  ("blocks.{}.attn.proj.weight", "tower/blocks/attn/out/kernel", OUT_LINEAR, "W W"),
  ("blocks.{}.attn.proj.bias", "tower/blocks/attn/out/bias", SAME, "W"),
  ("blocks.{}.norm2.weight", "tower/blocks/mlp_norm/scale", SAME, "W"),
  ("blocks.{}.norm2.bias", "tower/blocks/mlp_norm/bias", SAME, "W"),
  ("blocks.{}.mlp.fc1.weight", "tower/blocks/mlp/up/kernel", LINEAR, "4W W"),
  ("blocks.{}.mlp.fc1.bias", "tower/blocks/mlp/up/bias", SAME, "4W"),
  ("blocks.{}.mlp.fc2.weight", "tower/blocks/mlp/down/kernel", LINEAR, "W 4W"),
  ("blocks.{}.mlp.fc2.bias", "tower/blocks/mlp/down/bias", SAME, "W"),
)
LEFT_OUT = r"^(encoder\.)?head\."  # the classifier


def to_ours(flat):
  """timm's {name: float32 array} -> the image tower's parameters; the classifier is left out.

  Raises:
    ValueError: it is no plain ViT (every name that is missing, unexpected or of another shape is
      listed), or of a width that we lack.
  """
  return convert(TABLE, flat, left_out=LEFT_OUT)


def from_ours(image_params):
  """The image tower's parameters -> timm's {name: float32 array}, without classifier.

  Raises:
    ValueError: the tree is no image tower.
  """
  return invert(TABLE, image_params)
