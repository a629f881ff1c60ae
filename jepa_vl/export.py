"""--mode=export: a trained model as PyTorch users open it, with its tokenizer and a model card."""

import json
import logging
import os

import jax
import numpy as np
from etils import epath

from jepa_vl import checkpoint, encoder, evals
from jepa_vl.interop import levljepa
from jepa_vl.model.two_tower import SIZES
from jepa_vl.model.vit import STATISTICS
from jepa_vl.workdir import is_address

log = logging.getLogger(__name__)


def export(path, folder):
  """Writes the model at `path` (what `encoder.load` takes) into `folder`; returns the exit code.

  The folder holds the authors' layout (vision_encoder.safetensors, text_encoder.safetensors,
  config.json), the tokenizer and a model card (README.md), and `encoder.load` opens it too.

  Raises:
    ValueError, FileNotFoundError: as `encoder.load`.
    OSError: the folder cannot be written.
  """
  folder = _target(folder)
  path = checkpoint.find(path) or path
  model = encoder.load(path)
  config, tokenizer = model.config.to_dict(), model.tokenizer
  variables = jax.tree.map(np.asarray, model.variables)
  described = {
    **levljepa.describe(variables),
    "model_type": config.get("objective", {}).get("name", "levljepa"),
    "preprocessing": _preprocessing(config),
    "jepa_vl": {
      "config": config,
      "step": getattr(model.description, "step", None),
      "data_identity": getattr(model.description, "data_identity", None),
      "tokenizer_identity": tokenizer.identity if tokenizer else None,
      "tokenizer_file": tokenizer.filename if tokenizer else None,
    },
  }
  step = described["jepa_vl"]["step"]
  beside = {"README.md": model_card(described, evaluations(path, step)).encode()}
  if tokenizer:
    beside[tokenizer.filename] = tokenizer.model
  levljepa.save(folder, variables, step=step or 0, config=described, beside=beside)
  log.info("exported %s to %s; README.md there shows how to open it", path, folder)
  return 0


def _target(folder):
  """The folder's path. Raises ValueError if it holds what is no earlier export."""
  if is_address(folder):
    raise ValueError(f"--workdir={folder} is an address; exports are written to local folders")
  folder = os.path.abspath(os.path.expanduser(folder))
  used = os.path.isdir(folder) and os.listdir(folder)
  if used and "jepa_vl" not in levljepa.read_config(folder):
    raise ValueError(
      f"--workdir={folder} holds files that no earlier export wrote, and an export would replace "
      "config.json and README.md there; give a new or empty folder"
    )
  return folder


def _preprocessing(config):
  """How images are prepared, in torchvision's terms."""
  size = config["model"]["image_size"]
  mean, std = STATISTICS[config["model"]["statistics"]]
  resize = round(size * config["data"]["eval_resize"])
  return {"resize": resize, "centre_crop": size, "mean": mean, "std": std}


def evaluations(path, step):
  """The rows of results.json beside the checkpoint at `path`, if they are of that step; else []."""
  found = checkpoint.find(path)
  if not found:
    return []
  results = epath.Path(found).parent.parent / "results.json"
  if not results.exists():
    return []
  try:
    content = json.loads(results.read_text())
    return content["rows"] if content["step"] == step else []
  except (ValueError, KeyError) as e:
    raise ValueError(f"{results} is damaged ({e}); move it away to export without figures") from e


def model_card(described, rows):
  """The text of the export's README.md, from its config.json and rows of `evals.table`."""
  own = described["jepa_vl"]
  config = own["config"]
  objective = described["model_type"]
  data = config.get("data", {})
  width, depth, heads = SIZES[described["model_size"]]
  crop = described["preprocessing"]
  facts = {
    "Image tower": f"ViT-{described['model_size']}, patch {config['model']['patch_size']}, "
    f"{config['model']['image_size']} px (timm's names)",
    "Text tower": f"GPT-2 with {depth} layers, {heads} heads, width {width}, "
    f"{config['text']['length']} tokens, readout `{config['text']['readout']}`",
    "Embedding": f"{described['embed_dim']} dimensions",
    "Predictors": f"{described['projector_depth']} hidden layers of {described['projector_width']}"
    if described["projector_depth"]
    else "none: embeddings are compared directly",
    "Objective": f"`{objective}`",
    "Data": f"`{data.get('source', 'not said')}` {data.get('path', '')}: {own['data_identity']}",
    "Steps, batch": f"{own['step']}, {config.get('batch_size')}",
    "Tokenizer": own["tokenizer_identity"] or "GPT-2's, not in this folder",
    "Images": f"shorter side to {crop['resize']} px, centre crop of {crop['centre_crop']} px, "
    f"normalised by mean {_rounded(crop['mean'])} and std {_rounded(crop['std'])}",
  }
  predictor = "MLP({embed_dim}, [{projector_width}] * {projector_depth} + [{embed_dim}], "
  predictor = predictor.format_map(described) + "nn.BatchNorm1d, nn.GELU)"
  if not described["projector_depth"]:
    predictor = "nn.Sequential()  # none"
  table = "\n".join(f"| {k} | {v} |" for k, v in facts.items())
  figures = f"```{evals.format_table(rows)}\n```" if rows else "None at this step."
  return _CARD.format(
    name=f"{objective} {described['vision_encoder']['architecture']}", facts=table, figures=figures,
    config=json.dumps(config, indent=2, sort_keys=True), width=width, depth=depth, heads=heads,
    image_size=config["model"]["image_size"], patch=config["model"]["patch_size"],
    hidden=described["projector_width"], embed=described["embed_dim"],
    predictor=predictor, vocab=described["text_encoder"]["vocab_size"],
    positions=described["text_encoder"]["n_positions"],
  )  # fmt: skip


def _rounded(values):
  return ", ".join(f"{v:.4f}" for v in values)


_CARD = """\
# {name}

A vision-language encoder trained with `jepa_vl` (LeVLJEPA, arXiv 2607.00784).

| | |
|---|---|
{facts}

## Evaluation

{figures}

## Use

```python
from jepa_vl import encoder

model = encoder.load("this folder")
model.encode_image(["image.jpg"]), model.patch_features(["image.jpg"])
```

In PyTorch (the tokenizer and the images' preparation are above):

```python
import timm, torch
from safetensors.torch import load_file
from torch import nn
from torchvision.ops import MLP
from transformers import GPT2Config, GPT2Model

def part(weights, prefix):
  return {{k[len(prefix):]: v for k, v in weights.items() if k.startswith(prefix)}}

def head():
  return nn.Sequential(
    nn.Linear({width}, {hidden}), nn.BatchNorm1d({hidden}), nn.GELU(), nn.Linear({hidden}, {embed}))

image = timm.models.VisionTransformer(
  img_size={image_size}, patch_size={patch}, embed_dim={width}, depth={depth}, num_heads={heads},
  num_classes=0, dynamic_img_size=True)
text = GPT2Model(GPT2Config(
  n_embd={width}, n_layer={depth}, n_head={heads}, vocab_size={vocab}, n_positions={positions},
  attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0))
for file, tower in (("vision_encoder", image), ("text_encoder", text)):
  weights = load_file(f"{{file}}.safetensors")
  tower.load_state_dict(part(weights, "encoder."))
  tower.pre_proj, tower.projector = head(), {predictor}
  tower.pre_proj.load_state_dict(part(weights, "pre_proj."))
  tower.projector.load_state_dict(part(weights, "projector."))
  tower.eval()
```

## Configuration

```json
{config}
```
"""
