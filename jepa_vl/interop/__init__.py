"""Weights from and to PyTorch: timm's ViT, Hugging Face's GPT2Model, the LeVLJEPA authors' files.

`read` takes files of any of these forms, and our own checkpoints, and gives variables in our names
and layouts, `shapes` says which config builds their model, `fit` puts them into a model's
variables; `levljepa.save` writes the authors' form. PyTorch itself is needed for .pt, .pth and .bin
files alone.
"""

import base64
import dataclasses
import os
import pathlib
import re
from typing import Any

from etils import epath

from jepa_vl import checkpoint
from jepa_vl.interop import files, gpt2, levljepa, timm
from jepa_vl.interop.variables import fit, merge, shapes
from jepa_vl.workdir import is_address, resolve

__all__ = ["Description", "describe", "fit", "paths", "read", "shapes"]

HUGGING_FACE = ("model.safetensors", "pytorch_model.bin")  # also timm's folders


def _component(name, to_ours):
  return lambda flat: {"params": {name: to_ours(flat)}}


# What one name in a file tells of the file, and what reads it; first match wins.
FORMS = (
  (r"encoder\.", levljepa.read_file),
  (r"cls_token$|pos_embed$|patch_embed\.|blocks\.\d", _component("image", timm.to_ours)),
  (r"(transformer\.)?(wte\.|wpe\.|h\.\d)", _component("text", gpt2.to_ours)),
)


def paths(spec):
  """The paths that `spec` joins by commas; one that exists as it stands is itself."""
  spec = os.path.expanduser(str(spec))
  joined = [spec] if os.path.exists(spec) else spec.split(",")
  return [os.path.expanduser(path.strip()) for path in joined]


def read(spec):
  """Weight files -> {"params": {component: tree}, "batch_stats": {component: tree}}.

  `spec` is a path or several joined by commas: weight files, or folders with the authors' pair or
  with Hugging Face's or timm's single file, or a checkpoint of ours or its workdir. A file is
  recognised by its names of tensors. The result is float32 NumPy arrays in our names and layouts,
  and holds only what the files hold.

  Raises:
    FileNotFoundError: no such file or folder.
    ValueError: a file cannot be read, is of none of these forms or does not fit its form (every
      name is listed), or two files hold the same component.
  """
  parts = {}
  for path in paths(spec):
    found = checkpoint.find(path)
    if found:
      parts[found] = checkpoint.read(found, None, check=lambda meta: None)
      continue
    _check_step(path)
    for file in _files(path) if os.path.isdir(path) else [path]:
      if file in parts:
        raise ValueError(f"{file} is given twice")
      parts[file] = files.read_as(file, _read_flat)
  return merge(parts)


@dataclasses.dataclass
class Description:
  """What our own files hold beside the weights: how the model was made."""

  config: dict
  step: Any
  data_identity: Any
  tokenizer_identity: Any
  tokenizer: Any  # its bytes, or None


def describe(path):
  """The Description of a checkpoint, workdir or export of ours at `path`; None of other files.

  Of an export the two files, joined by a comma, do as well.

  Raises:
    ValueError: what stands beside the weights is damaged.
  """
  found = checkpoint.find(path)
  if found:
    meta = checkpoint.read_meta(found)
    return Description(
      meta["config"], int(os.path.basename(found)), meta["data_identity"],
      meta["tokenizer_identity"], base64.b64decode(meta["tokenizer"]),
    )  # fmt: skip
  folders = {os.path.dirname(p) if os.path.isfile(p) else p for p in paths(path)}
  folder = folders.pop()
  own = levljepa.read_config(folder).get("jepa_vl") if not folders else None
  if own is None:
    return None
  try:
    file = own["tokenizer_file"]
    tokenizer = pathlib.Path(folder, os.path.basename(file)).read_bytes() if file else None
    return Description(
      dict(own["config"]), own["step"], own["data_identity"], own["tokenizer_identity"], tokenizer
    )
  except (KeyError, TypeError, ValueError) as e:
    raise ValueError(
      f"{folder}/config.json: its part 'jepa_vl' is damaged ({type(e).__name__}: {e}); export again"
    ) from e


def _read_flat(flat):
  for pattern, reader in FORMS:
    if any(re.match(pattern, name) for name in flat):
      return reader(flat)
  raise ValueError(
    "neither timm's ViT, Hugging Face's GPT2Model nor the LeVLJEPA authors' vision or text file; "
    f"its names begin {', '.join(list(flat)[:8])}"
  )


def _check_step(path):
  found = epath.Path(resolve(path))
  if found.parent.name == "checkpoints" and found.parent.is_dir() and not found.exists():
    steps = sorted(int(p.name) for p in found.parent.iterdir() if p.name.isdigit())
    raise FileNotFoundError(f"{path} does not exist; the steps there are {steps}")
  if is_address(path):
    raise FileNotFoundError(
      f"{path} is no checkpoint of ours and no workdir; other weights are read from local files "
      "alone: copy them"
    )


def _files(folder):
  """The weight files of one folder."""
  pair = levljepa.pair(folder)
  single = [p for p in (os.path.join(folder, name) for name in HUGGING_FACE) if os.path.exists(p)]
  if not pair and not single:
    raise ValueError(
      f"{folder} holds no weights that are known by name: expected a checkpoint of ours, "
      f"{' and '.join(levljepa.FILES.values())}, *_vision_step*.pt and *_text_step*.pt, or one of "
      f"{', '.join(HUGGING_FACE)}; or give the weight files themselves, joined by commas"
    )
  return pair or single[:1]
