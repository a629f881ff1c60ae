"""The LeVLJEPA authors' checkpoints: one file per modality with encoder, pre_proj and projector.

Two forms hold the same names: `{run}_vision_step{N}.pt` with `{run}_text_step{N}.pt`, each a
dictionary of three state dicts, and `vision_encoder.safetensors` with `text_encoder.safetensors`
and a `config.json`, the form that `save` writes. `pre_proj` is an nn.Sequential, `projector` a
torchvision.ops.MLP, empty in a contrastive baseline.
"""

import glob
import json
import os
import re

import numpy as np
import safetensors.numpy

from jepa_vl.interop import files, gpt2, timm
from jepa_vl.interop.layout import LINEAR, SAME, convert, invert, prefixed
from jepa_vl.interop.variables import merge, shapes
from jepa_vl.model.two_tower import SIZES

FILES = {"image": "vision_encoder.safetensors", "text": "text_encoder.safetensors"}
TOWERS = {"image": timm.TABLE, "text": gpt2.TABLE}
SCALARS = ("log_scale", "bias")  # ours alone: what a contrastive baseline learns beside
LEFT_OUT = rf"\.num_batches_tracked$|{timm.LEFT_OUT}|{gpt2.LEFT_OUT}"
POSITIONS = 1024  # rows that the authors' loading code expects: GPT2Config's default
# What the authors' files do not say of themselves: how the released weights were trained (release
# 2, and its zero-shot preprocessing), and how we compute. The rest of a config is in the shapes.
CONFIG = {
  "model": {
    "statistics": "clip", "predictor_dropout": 0.0, "predict_from": "views",
    "patch_dropout": 0.0, "scan": True, "remat": "none", "attention": "auto",
    "pointwise": "auto", "dtype": "auto",
  },
  "text": {"length": 77, "readout": "eot"},
  "data": {"eval_resize": 256 / 224},
}  # fmt: skip
NEEDED = ("image", "image_head", "text", "text_head")


def _head(theirs, ours, depth, *, last, width):
  """Rows of a head of `depth` hidden layers: Linear 4i and BatchNorm 4i + 1; the last at `last`.

  `width` is the letter of its input. Our Dense before a BatchNorm has no bias; theirs goes to
  `folded`, and from there into the running mean.
  """
  rows = []
  for i in range(depth):
    dense, norm = f"{theirs}.{4 * i}", f"{theirs}.{4 * i + 1}"
    rows += [
      (f"{dense}.weight", f"params/{ours}/dense_{i}/kernel", LINEAR, f"F {'F' if i else width}"),
      (f"{dense}.bias", f"folded/{ours}/bn_{i}", SAME, "F"),
      (f"{norm}.weight", f"params/{ours}/bn_{i}/scale", SAME, "F"),
      (f"{norm}.bias", f"params/{ours}/bn_{i}/bias", SAME, "F"),
      (f"{norm}.running_mean", f"batch_stats/{ours}/bn_{i}/mean", SAME, "F"),
      (f"{norm}.running_var", f"batch_stats/{ours}/bn_{i}/var", SAME, "F"),
    ]
  return (
    *rows,
    (f"{theirs}.{last}.weight", f"params/{ours}/out/kernel", LINEAR, "D F"),
    (f"{theirs}.{last}.bias", f"params/{ours}/out/bias", SAME, "D"),
  )


def _table(modality, depth, scalars):
  """The rows of one file: tower, head, a predictor of `depth` hidden layers if any, scalars."""
  table = prefixed(TOWERS[modality], "encoder.", f"params/{modality}/")
  table += _head("pre_proj", f"{modality}_head", 1, last=3, width="W")
  if depth:
    table += _head("projector", f"{modality}_predictor", depth, last=4 * depth, width="D")
  return table + tuple((name, f"params/{name}", SAME, "") for name in scalars)


def modality_of(flat):
  """Whose file it is by its names, "image" or "text"; None if it is neither of the authors'."""
  for modality, pattern in (("image", r"(cls_token|patch_embed|blocks)\b"), ("text", r"(wte|h)\.")):
    if any(re.match(rf"encoder\.{pattern}", name) for name in flat):
      return modality
  return None


def read_file(flat):
  """The flat weights of one of the authors' files -> {"params": ..., "batch_stats": ...}.

  Raises:
    ValueError: it is neither file, or names are missing, unexpected or of another shape.
  """
  modality = modality_of(flat)
  if modality is None:
    raise ValueError(
      f"neither of the LeVLJEPA authors' files; its names begin {', '.join(list(flat)[:8])}"
    )
  projector = [name for name in flat if name.startswith("projector.")]
  depth = sum(name.endswith(".running_mean") for name in projector)
  depth = max(depth, bool(projector))  # without any BatchNorm it is refused by name below
  scalars = [name for name in SCALARS if modality == "image" and name in flat]
  tree = convert(_table(modality, depth, scalars), flat, left_out=LEFT_OUT)
  for head, biases in tree.pop("folded").items():
    for norm, bias in biases.items():
      stats = tree["batch_stats"][head][norm]
      stats["mean"] = stats["mean"] - bias
  return tree


def pair(folder):
  """The two files of a folder that holds the authors' checkpoint, in either form; else [].

  Raises:
    ValueError: several pairs, or half of one.
  """
  of = lambda pattern: sorted(glob.glob(os.path.join(glob.escape(folder), pattern)))
  found = [of(name) for name in FILES.values()]
  if not any(found):
    found = [of("*_vision_step*.pt"), of("*_text_step*.pt")]
  if any(found) and any(len(paths) != 1 for paths in found):
    names = ", ".join(os.path.basename(path) for paths in found for path in paths)
    raise ValueError(
      f"{folder} holds {names}, which is no pair of one vision and one text file; give the two "
      "files, joined by a comma"
    )
  return [path for paths in found for path in paths]


def load(path):
  """The variables of the authors' checkpoint: a folder with either pair, or "vision.pt,text.pt".

  Returns {"params": {component: tree}, "batch_stats": {component: tree}}, float32 NumPy arrays; the
  text tower has all rows of the position table in the file.

  Raises:
    FileNotFoundError: no such file.
    ValueError: there is no such pair, or a file cannot be read or does not fit.
  """
  paths = [os.path.expanduser(p.strip()) for p in str(path).split(",")]
  if len(paths) == 1 and os.path.isdir(paths[0]):
    paths = pair(paths[0])
  if len(paths) != 2:
    raise ValueError(
      f"{path} is no LeVLJEPA checkpoint: expected a folder with {' and '.join(FILES.values())} or "
      "with one *_vision_step*.pt and one *_text_step*.pt, or two such files joined by a comma"
    )
  return merge({p: files.read_as(p, read_file) for p in paths})


def save(folder, variables, *, step, config=None, beside=None):
  """Writes vision_encoder.safetensors, text_encoder.safetensors and config.json into `folder`.

  They are written under other names and renamed once all are whole. `step` becomes BatchNorm's
  num_batches_tracked; `config` is merged over the authors' keys of config.json; `beside`, names to
  bytes, are further files.

  Raises:
    ValueError: a tower or head is missing from the variables, or they are no model of ours.
    OSError: the folder cannot be written.
  """
  missing = [name for name in NEEDED if name not in variables["params"]]
  if missing:
    raise ValueError(f"the authors' files need {', '.join(missing)}, which the variables lack")
  writers = {}
  for modality, name in FILES.items():
    flat = to_file(variables, modality, step=step)
    writers[name] = lambda path, flat=flat: safetensors.numpy.save_file(
      flat, path, {"format": "pt"}
    )
  described = json.dumps({**describe(variables), **(config or {})}, indent=2) + "\n"
  for name, content in {**(beside or {}), "config.json": described.encode()}.items():
    writers[name] = lambda path, content=content: _write_bytes(path, content)
  _write_all(folder, writers)


def to_file(variables, modality, *, step):
  """The flat weights of the authors' vision ("image") or text file, num_batches_tracked included.

  Raises:
    ValueError: the variables are no model of ours.
  """
  own = (modality, f"{modality}_head", f"{modality}_predictor", *SCALARS * (modality == "image"))
  tree = {
    kind: {name: x for name, x in variables[kind].items() if name in own}
    for kind in ("params", "batch_stats")
  }
  tree["folded"] = {
    head: {norm: np.zeros(stats["mean"].shape, np.float32) for norm, stats in norms.items()}
    for head, norms in tree["batch_stats"].items()
  }
  depth = len(tree["batch_stats"].get(f"{modality}_predictor", ()))
  scalars = [name for name in SCALARS if name in tree["params"]]
  flat = invert(_table(modality, depth, scalars), tree)
  for name in [name for name in flat if name.endswith(".running_mean")]:
    flat[name.replace("running_mean", "num_batches_tracked")] = np.array(step, np.int64)
  if modality == "text":
    flat = gpt2.pad_positions(flat, "encoder.wpe.weight", POSITIONS)
  return flat


def describe(variables):
  """The authors' config.json of these variables, as a dictionary.

  Raises:
    ValueError: the variables are no model of ours.
  """
  found = shapes(variables)
  size, patch = found["model.size"], found["model.patch_size"]
  width, depth, heads = SIZES[size]
  common = {"hidden_size": width, "num_layers": depth, "num_heads": heads}
  return {
    "model_type": "levljepa",
    "model_size": size,
    "vision_encoder": {
      "architecture": f"vit_{size}_patch{patch}_{found['model.image_size']}",
      **common,
    },
    "text_encoder": {
      "architecture": "gpt2",
      **common,
      "vocab_size": found["vocab_size"],
      "n_positions": max(found["text_positions"], POSITIONS),
    },
    "embed_dim": found["model.embed_dim"],
    "projector_width": found["model.hidden_dim"],
    "projector_depth": found["model.predictor_depth"],
  }


def read_config(path):
  """config.json of a folder, as a dictionary; {} if there is none. Raises ValueError if damaged."""
  file = os.path.join(os.path.expanduser(path), "config.json")
  if not os.path.isfile(file):
    return {}
  try:
    with open(file, encoding="utf-8") as f:
      config = json.load(f)
  except ValueError as e:  # no JSON, or no text
    raise ValueError(f"{file} is no JSON ({e}); export or download it again") from e
  if not isinstance(config, dict):
    raise ValueError(f"{file} holds no JSON object; export or download it again")
  return config


def _write_all(folder, writers):
  """Fills a temporary name per file and renames them when all are whole: all are new, or none."""
  os.makedirs(folder, exist_ok=True)
  temporaries = {name: os.path.join(folder, f"{name}.tmp") for name in writers}
  try:
    for name, path in temporaries.items():
      with open(path, "wb"):
        mode = os.stat(path).st_mode
      writers[name](path)
      os.chmod(path, mode)  # safetensors lets nobody else read what it writes
    for name, path in temporaries.items():
      os.replace(path, os.path.join(folder, name))
  finally:
    for path in temporaries.values():
      if os.path.exists(path):
        os.remove(path)


def _write_bytes(path, content):
  with open(path, "wb") as f:
    f.write(content)
