"""A folder of images through PyTorch's towers and through --mode=eval: the same figures."""

import json
import re

import cv2
import numpy as np
import pytest
import torch_modules
from ml_collections import ConfigDict

from configs import tiny
from jepa_vl import export, train
from jepa_vl import state as state_lib
from jepa_vl.build import build
from jepa_vl.data import embedded, tokenizer, transforms
from jepa_vl.evals import common
from jepa_vl.interop import timm
from jepa_vl.model import two_tower, vit

pytestmark = pytest.mark.torch
torch = torch_modules.torch
COUNT, SIDE = 60, 32


def write_pairs(folder):
  """COUNT pictures of SIDE pixels, so that none is resized, with their captions."""
  folder.mkdir()
  for i, record in enumerate(embedded.read_records("val")[::4][:COUNT]):
    image = transforms.resize(transforms.decode(record["image"]), SIDE, SIDE)
    cv2.imwrite(str(folder / f"{i:03d}.png"), image[..., ::-1])
    (folder / f"{i:03d}.txt").write_text(record["caption"])


def torch_features(there, folder):
  """What the model card's code gives for the folder: z_img, p_img, z_txt, p_txt."""
  images = [cv2.imread(str(p))[..., ::-1] for p in sorted(folder.glob("*.png"))]
  rows = torch.tensor(np.asarray(vit.normalise(np.stack(images), "clip"))).permute(0, 3, 1, 2)
  captions = [p.read_text() for p in sorted(folder.glob("*.txt"))]
  ids, mask, _ = tokenizer.tokenize(tokenizer.load("emoji"), captions, length=24, readout="eot")
  with torch.no_grad():
    cls = there["image"].forward_features(rows)[:, 0]
    z_img = there["image"].pre_proj(cls)
    hidden = there["text"](torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long())
    last = hidden.last_hidden_state[torch.arange(len(ids)), torch.tensor(mask.sum(1) - 1)]
    z_txt = there["text"].pre_proj(last)
    return {
      "z_img": z_img, "z_txt": z_txt, "p_img": there["image"].projector(z_img),
      "p_txt": there["text"].projector(z_txt), "captions": captions,
    }  # fmt: skip


def test_blocks_and_attention_are_those_of_timm(config):
  """What the report shows of the image tower: tokens after each block, CLS's last attention."""
  config.model.size, config.model.image_size, config.model.patch_size = "micro", 32, 8
  config.mesh.data = -1
  run = build(config, training=False)
  model = torch_modules.timm_vit("tiny", 8, 32, 7, depth=6)
  state = {k: v.numpy() for k, v in model.state_dict().items()}
  variables = dict(state_lib.init_variables(run.model, run.mesh, 0))
  variables["params"] = {**variables["params"], "image": timm.to_ours(state)}
  images = np.random.default_rng(0).normal(size=(3, 32, 32, 3)).astype(np.float32)
  found = two_tower.look_inside(run.model, variables, images)
  blocks, qkv = [], []
  for block in model.blocks:
    block.register_forward_hook(lambda module, args, out: blocks.append(out[:, 1:].numpy()))
  model.blocks[-1].attn.qkv.register_forward_hook(lambda module, args, out: qkv.append(out))
  with torch.no_grad():
    model.forward_features(torch.from_numpy(images.transpose(0, 3, 1, 2)))
  layers = np.stack(blocks, axis=1)
  assert found["layers"].shape == layers.shape == (3, 6, 16, 192)
  assert np.abs(found["layers"] - layers).max() < 1e-4 * np.abs(layers).max()
  q, k, _ = qkv[0].double().reshape(3, 17, 3, 3, 64).permute(2, 0, 3, 1, 4)
  expected = ((q[:, :, :1] @ k.mT) / 8).softmax(dim=-1)[:, :, 0, 1:].numpy()
  np.testing.assert_allclose(found["attention"], expected, atol=1e-5)


def test_a_folder_has_the_same_figures_in_pytorch(tmp_path, monkeypatch):
  """timm's ViT and transformers' GPT2Model with our random weights; ranks counted in a loop."""
  write_pairs(tmp_path / "pairs")
  c = tiny.get_config()
  c.mesh.data, c.steps, c.batch_size, c.objective.num_slices, c.model.scan = -1, 2, 16, 64, True
  c.evals, c.data.eval_resize = ConfigDict(), 1.0  # so that no image is resized
  train.train(c, str(tmp_path / "run"))
  export.export(str(tmp_path / "run"), str(tmp_path / "out"))
  where = {"source": "folder", "path": str(tmp_path / "pairs"), "splits": ("all",)}
  c.evals = ConfigDict({"retrieval": {**where, "ranks": (1, 10), "folds": 0}})
  train.evaluate_checkpoint(c, str(tmp_path / "out"), str(tmp_path / "eval"))
  rows = json.loads((tmp_path / "eval" / "results.json").read_text())["rows"]
  found = {row["metric"]: row["value"] for row in rows}

  blocks = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.S)
  monkeypatch.chdir(tmp_path / "out")
  there = {}
  exec(compile(next(b for b in blocks if "import timm" in b), "README.md", "exec"), there)
  features = torch_features(there, tmp_path / "pairs")
  assert len(set(features["captions"])) == COUNT
  unit = lambda x: torch.nn.functional.normalize(x.double(), dim=-1).numpy()
  for reading, pairs in common.READINGS.items():
    scores = sum(unit(features[a]) @ unit(features[b]).T for a, b in pairs)
    for way, s in (("i2t", scores), ("t2i", scores.T)):
      for k in (1, 10):
        hits = [i in np.argsort(-row)[:k] for i, row in enumerate(s)]
        assert found[f"{way}/{reading}/R@{k}"] == pytest.approx(np.mean(hits)), (way, reading, k)
  # Of the trained model, and of the untrained one that it is compared with.
  saved = [np.load(path) for path in (tmp_path / "eval" / "features").glob("features-*.npz")]
  saved = min(saved, key=lambda x: np.abs(x["z_img"] - features["z_img"].numpy()).max())
  for name in ("z_img", "z_txt", "p_img", "p_txt"):
    np.testing.assert_allclose(saved[name], features[name].numpy(), rtol=1e-4, atol=1e-5)
