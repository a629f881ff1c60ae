"""The code on a model card opens the export in PyTorch, with the same outputs as the encoder's."""

import re

import numpy as np
import pytest
import torch_modules
from records import noise

from configs import tiny
from jepa_vl import encoder, train
from jepa_vl import export as export_lib
from jepa_vl.data import tokenizer, transforms
from jepa_vl.model import vit

pytestmark = pytest.mark.torch
torch = torch_modules.torch
CAPTIONS = ["red heart", "a cat, a dog and the sea"]


@pytest.fixture(params=["", "clip"])
def folder(request, tmp_path):
  c = tiny.get_config(request.param)
  c.mesh.data = -1
  c.steps, c.batch_size, c.evals = 2, 16, type(c)()
  c.model.scan, c.objective.num_slices = True, 64
  train.train(c, str(tmp_path / "run"))
  export_lib.export(str(tmp_path / "run"), str(tmp_path / "out"))
  return tmp_path / "out"


def test_the_code_on_the_model_card_opens_it(folder, monkeypatch):
  """Executed as it stands, in the folder as a reader would."""
  blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
  code = next(block for block in blocks if "import timm" in block)
  monkeypatch.chdir(folder)
  there = {}
  exec(compile(code, "README.md", "exec"), there)

  model = encoder.load(str(folder))
  images = [noise((20, 24), 0), noise((40, 32), 1)]
  rows = np.stack([transforms.centre_crop(image, 32, 256 / 224) for image in images])
  rows = torch.tensor(np.asarray(vit.normalise(rows, "clip"))).permute(0, 3, 1, 2)
  ids, mask, _ = tokenizer.tokenize(model.tokenizer, CAPTIONS, length=24, readout="eot")
  with torch.no_grad():
    tokens = there["image"].forward_features(rows)
    z_img = there["image"].pre_proj(tokens[:, 0])
    hidden = there["text"](torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long())
    hidden = hidden.last_hidden_state[torch.arange(2), torch.tensor(mask.sum(1) - 1)]
    z_txt = there["text"].pre_proj(hidden)
    p_img, p_txt = there["image"].projector(z_img), there["text"].projector(z_txt)
  patches = model.patch_features(images).reshape(2, 16, -1)
  pairs = [
    (tokens[:, 1:], patches), (z_img, model.encode_image(images)),
    (z_txt, model.encode_text(CAPTIONS)),
  ]  # fmt: skip
  if model.reading == "avg":
    pairs += [
      (p_img, model.predict_text_from_image(images)),
      (p_txt, model.predict_image_from_text(CAPTIONS)),
    ]
  for theirs, ours in pairs:
    assert np.abs(theirs.numpy() - ours).max() / np.abs(ours).max() < 1e-4
