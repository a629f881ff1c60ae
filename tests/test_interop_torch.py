"""The same numbers as timm, Hugging Face, PyTorch and the authors' files, in both directions."""

import os
import pickle
import shutil

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_modules as modules

from jepa_vl import interop
from jepa_vl.interop import files, gpt2, levljepa, timm
from jepa_vl.model import gpt, heads, two_tower, vit

torch = modules.torch
pytestmark = pytest.mark.torch

SIZES = ("tiny", "small", "base")
VOCAB, LENGTH, EOT = 97, 77, 96
HIDDEN, DIM = 256, 64
TOLERANCE = 1e-5  # ten times what is measured


def error(found, expected, what):
  """max|a - b| / max|b|, printed under -s."""
  expected = expected.detach().numpy()
  assert found.shape == expected.shape
  value = np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()
  print(f"  {what}: {value:.1e}")
  return value


def arrays(state_dict):
  return {name: x.numpy() for name, x in state_dict.items()}


def tensors(flat):
  return {name: torch.from_numpy(np.array(x)) for name, x in flat.items()}


def scanned(size):
  width, depth, n = two_tower.SIZES[size]
  return dict(
    width=width, depth=depth, heads=n, scan=True, remat="none", attention="short", pointwise="xla",
    dtype=jnp.float32,
  )  # fmt: skip


def pixels(side, rows=2):
  return np.random.default_rng(side).standard_normal((rows, side, side, 3)).astype(np.float32)


def channels_first(images):
  return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def captions(readout):
  """Ragged token ids and mask as the tokenizer gives them, full and one-token captions included."""
  rng = np.random.default_rng(0)
  text = np.full((5, LENGTH), EOT, np.int32)
  mask = np.zeros((5, LENGTH), bool)
  own = 1 if readout == "eot" else 0
  for row, n in enumerate((1, 7, 30, 75, LENGTH - own)):
    text[row, :n] = rng.integers(0, EOT, n)
    mask[row, : n + own] = True
  return text, mask


def read_out(model, text, mask, readout):
  """The reference's sentence vector: GPT2Model's hidden state at EOT, or at position 76."""
  ids, keys = torch.from_numpy(text).long(), torch.from_numpy(mask).long()
  if readout == "last":
    positions = torch.arange(LENGTH).expand(len(text), -1)
    hidden = model(ids, attention_mask=keys, position_ids=positions).last_hidden_state
    return hidden[:, LENGTH - 1]
  hidden = model(ids, attention_mask=keys).last_hidden_state
  return hidden[torch.arange(len(text)), keys.sum(1) - 1]


# Towers.


@pytest.mark.parametrize("size", SIZES)
def test_image_tower_equals_timm(size):
  model = modules.timm_vit(size, 16, 224, seed=1)
  params = timm.to_ours(arrays(model.state_dict()))
  images = pixels(224)
  cls, patches = jax.jit(vit.ViT(patch_size=16, image_size=224, **scanned(size)).apply)(
    {"params": params}, images
  )
  with torch.no_grad():
    expected = model.forward_features(channels_first(images))
  assert error(cls, expected[:, 0], f"{size} cls") < TOLERANCE
  assert error(patches, expected[:, 1:], f"{size} patches") < TOLERANCE


@pytest.mark.parametrize("side", [96, 160, 224, 384])
def test_positions_are_interpolated_as_timm_does(side):
  model = modules.timm_vit("tiny", 16, 224, seed=2)
  params = timm.to_ours(arrays(model.state_dict()))
  images = pixels(side)
  tower = vit.ViT(patch_size=16, image_size=224, **scanned("tiny"))
  cls, patches = jax.jit(tower.apply)({"params": params}, images)
  with torch.no_grad():
    expected = model.forward_features(channels_first(images))
  assert error(cls, expected[:, 0], f"{side} px, cls") < TOLERANCE
  assert error(patches, expected[:, 1:], f"{side} px, patches") < TOLERANCE


def test_fitting_to_another_image_size_is_timms_interpolation(config):
  """What `fit` resamples once is what timm resamples on every call."""
  config.model.size, config.model.image_size = "tiny", 24  # 3x3 patches of 8
  model = modules.timm_vit("tiny", 8, 64, seed=3)
  loaded = {"params": {"image": timm.to_ours(arrays(model.state_dict()))}, "batch_stats": {}}
  fitted = interop.fit(loaded, abstract(config))[0]["params"]["image"]
  images = pixels(24)
  tower = vit.ViT(patch_size=8, image_size=24, **scanned("tiny"))
  cls, _ = jax.jit(tower.apply)({"params": fitted}, images)
  with torch.no_grad():
    assert error(cls, model(channels_first(images)), "fitted to 24 px, cls") < TOLERANCE


@pytest.mark.parametrize("size, readout", [
  ("tiny", "eot"), ("tiny", "last"), ("small", "eot"), ("small", "last"), ("base", "last"),
])  # fmt: skip
def test_text_tower_equals_gpt2(size, readout):
  width, depth, n = two_tower.SIZES[size]
  model = modules.gpt2(width, depth, n, seed=4, vocab_size=VOCAB)
  params = gpt2.to_ours(arrays(model.state_dict()))
  params["position_embedding"] = params["position_embedding"][:LENGTH]
  text, mask = captions(readout)
  tower = gpt.GPT(vocab_size=VOCAB, length=LENGTH, readout=readout, **scanned(size))
  found = jax.jit(tower.apply)({"params": params}, text, mask)
  with torch.no_grad():
    expected = read_out(model, text, mask, readout)
  assert error(found, expected, f"{size} {readout}") < TOLERANCE


@pytest.mark.parametrize("silent", [False, True])
def test_norms_have_the_references_epsilon(silent):
  """Tokens so small that it shows: before the first norm, with silent blocks before the last."""
  n = dict(
    width=192, depth=1, heads=3, scan=True, remat="none", attention="short", pointwise="xla",
    dtype=jnp.float32,
  )
  image, text = modules.timm_vit("tiny", 8, 16, 5, depth=1), modules.gpt2(192, 1, 3, 5)
  with torch.no_grad():
    for name, x in (*image.named_parameters(), *text.named_parameters()):
      if name.startswith(("cls", "pos", "patch", "wte", "wpe")):
        x.mul_(0.01)
      if silent and any(part in name for part in ("attn.proj", "fc2", "c_proj")):
        x.zero_()
    images, tokens = pixels(16), np.arange(24, dtype=np.int32).reshape(2, 12)
    expected = image(channels_first(images)), text(torch.from_numpy(tokens).long())[0][:, -1]
  params = timm.to_ours(arrays(image.state_dict())), gpt2.to_ours(arrays(text.state_dict()))
  tower = vit.ViT(patch_size=8, image_size=16, **n)
  assert error(tower.apply({"params": params[0]}, images)[0], expected[0], "timm") < TOLERANCE
  tower = gpt.GPT(vocab_size=VOCAB, length=1024, readout="eot", **n)
  found = tower.apply({"params": params[1]}, tokens, np.ones((2, 12), bool))
  assert error(found, expected[1], "GPT2Model") < TOLERANCE


# Heads.


def parts(size, depth, seed, *, image_size=224, patch=16, width=HIDDEN, dim=DIM, layers=None):
  """The authors' six modules by modality and part; `layers` cuts the towers short."""
  w, d, n = two_tower.SIZES[size]
  d = layers or d
  encoders = {
    "vision": modules.timm_vit(size, patch, image_size, seed, depth=d),
    "text": modules.gpt2(w, d, n, seed + 1, vocab_size=VOCAB),
  }
  return {
    modality: {
      "encoder": encoder,
      "pre_proj": modules.pre_proj(w, width, dim, seed + 2 + i),
      "projector": modules.projector(dim, width, depth, seed + 4 + i) if depth else None,
    }
    for i, (modality, encoder) in enumerate(encoders.items())
  }


def states(modality_parts):
  """What the authors save of one modality; a contrastive baseline's projector is empty."""
  return {name: m.state_dict() if m else {} for name, m in modality_parts.items()}


def flatten(state):
  return {k: x.contiguous() for k, x in flax.traverse_util.flatten_dict(state, sep=".").items()}


@pytest.mark.parametrize("size, depth", [("tiny", 4), ("small", 2), ("base", 1)])
def test_heads_equal_pytorch_in_training_and_evaluation(size, depth):
  """Also the running statistics: PyTorch's variance is unbiased, ours is not."""
  B, modality = 8, parts(size, depth, seed=5, layers=1)["vision"]
  for name, x in (*modality["pre_proj"].named_buffers(), *modality["projector"].named_buffers()):
    if name.endswith("running_var"):
      x[::2] *= 1e-4  # so that BatchNorm's epsilon shows
  tree = levljepa.read_file(arrays(flatten(states(modality))))
  for name, part, hidden_layers in (
    ("image_head", "pre_proj", 1),
    ("image_predictor", "projector", depth),
  ):
    module = modality[part]
    linears = [m for m in module if isinstance(m, torch.nn.Linear)]
    norms = [m for m in module if isinstance(m, torch.nn.BatchNorm1d)]
    x = np.random.default_rng(1).standard_normal((B, linears[0].in_features)).astype(np.float32)
    head = heads.Head(hidden_layers, HIDDEN, DIM, 0.0, jnp.float32)
    variables = {kind: tree[kind][name] for kind in ("params", "batch_stats")}
    apply = lambda train: head.apply(variables, x, train=train, mutable="batch_stats")  # noqa: B023
    assert error(apply(False)[0], module.eval()(torch.from_numpy(x)), f"{name} eval") < TOLERANCE

    before = [norm.running_var.numpy().copy() for norm in norms]
    found, new = apply(True)
    assert error(found, module.train()(torch.from_numpy(x)), f"{name} train") < TOLERANCE
    for i, (linear, norm) in enumerate(zip(linears, norms, strict=False)):
      stats = new["batch_stats"][f"bn_{i}"]
      mean = norm.running_mean - linear.bias
      assert error(stats["mean"], mean, f"{name} running mean {i}") < TOLERANCE
      of_batch = (stats["var"] - 0.9 * before[i]) * B / (B - 1)
      assert (
        error(0.9 * before[i] + of_batch, norm.running_var, f"{name} running var {i}") < TOLERANCE
      )


# The authors' files.


def abstract(config):
  model = two_tower.from_config(
    config.model, config.text, vocab_size=VOCAB, dtype=jnp.float32, scalars={}
  )
  init = lambda: model.init(jax.random.key(0), two_tower.dummy_batch(model, 1), train=False)
  return jax.eval_shape(init)


@pytest.fixture
def folder(tmp_path):
  """A folder that does not outlive its test: pytest would keep gigabytes of three runs."""
  yield tmp_path
  shutil.rmtree(tmp_path)


@pytest.fixture
def canonical(config):
  """The authors' geometry: 224 px, patches of 16, 77 tokens."""
  config.model.image_size, config.model.patch_size = 224, 16
  config.model.embed_dim, config.model.hidden_dim = DIM, HIDDEN
  config.model.predictor_depth = 4
  config.text.length = LENGTH
  return config


def expected_out(modules_, images, text, mask, readout):
  """The reference's outputs under our names, in evaluation mode."""
  with torch.no_grad():
    tokens = modules_["vision"]["encoder"].forward_features(channels_first(images))
    sentence = read_out(modules_["text"]["encoder"], text, mask, readout)
    out = {"cls": tokens[:, 0], "patches": tokens[:, 1:]}
    for name, modality, x in (("img", "vision", tokens[:, 0]), ("txt", "text", sentence)):
      out[f"z_{name}"] = modules_[modality]["pre_proj"](x)
      projector = modules_[modality]["projector"]
      out[f"p_{name}"] = projector(out[f"z_{name}"]) if projector else out[f"z_{name}"]
  return out


def compare(config, variables, modules_, readout, what):
  model = two_tower.from_config(
    config.model, config.text, vocab_size=VOCAB, dtype=jnp.float32, scalars={}
  )
  text, mask = captions(readout)
  images = pixels(config.model.image_size)
  batch = {"image": images, "text": text, "mask": mask}
  found = jax.jit(lambda v, b: model.apply(v, b, train=False))(variables, batch)
  expected = expected_out(modules_, images, text, mask, readout)
  assert found.keys() == expected.keys()
  worst = {k: error(found[k], expected[k], f"{what} {k}") for k in expected}
  assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize("size, form, readout, depth", [
  ("tiny", "safetensors", "last", 4), ("small", "pt", "eot", 4), ("base", "safetensors", "eot", 4),
  ("tiny", "pt", "eot", 0), ("tiny", "comma", "eot", 2),
])  # fmt: skip
def test_whole_model_from_the_authors_files(canonical, folder, size, form, readout, depth):
  canonical.model.size, canonical.text.readout = size, readout
  canonical.model.predictor_depth = depth
  reference = parts(size, depth, seed=10)
  paths = []
  for modality, modality_parts in reference.items():
    state = states(modality_parts)
    if form == "safetensors":
      path = folder / f"{modality}_encoder.safetensors"
      modules.safetensors.torch.save_file(flatten(state), path)
    else:
      path = folder / f"run_a_{modality}_step50000.pt"
      torch.save(state, path)
    paths.append(str(path))
  loaded = levljepa.load(",".join(paths) if form == "comma" else str(folder))
  said = interop.shapes(loaded)
  assert said.pop("vocab_size") == VOCAB and said.pop("text_positions") == 1024
  assert said == {k: canonical.model[k.split(".")[1]] for k in said}
  variables, left_out, left_alone = interop.fit(loaded, abstract(canonical))
  assert not left_out and not left_alone
  compare(canonical, variables, reference, readout, f"{size} {form}")


def authors_snippet(folder, size, image_size=224, patch=16):
  """The authors' published way of opening their safetensors, and the projectors likewise."""
  width, depth, n = two_tower.SIZES[size]
  timm_model = modules.timm.create_model(
    f"vit_{size}_patch{patch}_{image_size}", pretrained=False, num_classes=0, dynamic_img_size=True
  )
  config = modules.transformers.GPT2Config(
    n_embd=width, n_layer=depth, n_head=n, n_inner=width * 4, vocab_size=VOCAB,
    attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
  )  # fmt: skip
  encoders = {"vision": timm_model, "text": modules.transformers.GPT2Model(config)}
  opened = {}
  for modality, encoder in encoders.items():
    weights = modules.safetensors.torch.load_file(
      os.path.join(folder, f"{modality}_encoder.safetensors")
    )
    opened[modality] = {
      "encoder": encoder,
      "pre_proj": modules.pre_proj(width, HIDDEN, DIM, seed=0),
      "projector": modules.projector(DIM, HIDDEN, 4, seed=0),
    }
    for name, module in opened[modality].items():
      prefix = f"{name}."
      own = {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}
      module.load_state_dict(own)  # strict
      module.eval()
  return opened


def trained_like(config):
  """Our own variables with no number left at its initial value."""
  rng = np.random.default_rng(3)

  def draw(path, x):
    name = jax.tree_util.keystr(path)
    noise = rng.standard_normal(x.shape).astype(np.float32)
    if name.endswith("['var']"):
      return 0.5 + np.abs(noise)
    if "kernel" in name:
      fan_in = x.size / x.shape[-1] / (x.shape[0] if "blocks" in name else 1)
      fan_in = x.shape[1] if "qkv" in name else fan_in
      return noise * np.float32(fan_in**-0.5)
    return (1 if name.endswith("['scale']") else 0) + 0.3 * noise

  return jax.tree_util.tree_map_with_path(draw, abstract(config))


@pytest.mark.parametrize("size", SIZES)
def test_what_we_save_opens_with_the_authors_snippet(canonical, folder, size):
  canonical.model.size = size
  variables = trained_like(canonical)
  variables["params"] |= {"log_scale": np.float32(2.6), "bias": np.float32(-10)}
  levljepa.save(folder, variables, step=12)
  opened = authors_snippet(folder, size)
  assert opened["text"]["projector"][1].num_batches_tracked == 12
  del variables["params"]["log_scale"], variables["params"]["bias"]
  compare(canonical, variables, opened, "eot", f"saved {size}")


def test_towers_alone_load_strictly(config):
  config.model.size = "tiny"
  params = trained_like(config)["params"]
  model = modules.timm_vit("tiny", 8, 16, seed=0)
  model.load_state_dict(tensors(timm.from_ours(params["image"])), strict=True)
  images = pixels(16)
  tower = vit.ViT(patch_size=8, image_size=16, **scanned("tiny"))
  cls, _ = jax.jit(tower.apply)({"params": params["image"]}, images)
  with torch.no_grad():
    assert error(cls, model(channels_first(images)), "to timm, cls") < TOLERANCE
  model = modules.empty_gpt2(*two_tower.SIZES["tiny"], VOCAB)
  model.load_state_dict(tensors(gpt2.from_ours(params["text"])), strict=True)
  text = np.arange(24, dtype=np.int32).reshape(2, 12)
  tower = gpt.GPT(vocab_size=VOCAB, length=12, readout="eot", **scanned("tiny"))
  found = jax.jit(tower.apply)({"params": params["text"]}, text, np.ones((2, 12), bool))
  with torch.no_grad():
    expected = model(torch.from_numpy(text).long()).last_hidden_state[:, -1]
  assert error(found, expected, "to GPT2Model") < TOLERANCE


# PyTorch files that are not what they should be.


class Malicious:
  """Unpickling it would make a folder."""

  def __init__(self, path):
    self.path = str(path)

  def __reduce__(self):
    return os.mkdir, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, legacy):
  trace, bad = tmp_path / "trace", tmp_path / "bad.pt"
  content = {"encoder": {"cls_token": torch.zeros(1, 1, 192)}, "extra": Malicious(trace)}
  torch.save(content, bad, _use_new_zipfile_serialization=not legacy)
  with pytest.raises(ValueError, match=r"bad\.pt holds more than tensors: .*mkdir.*state_dict"):
    interop.read(str(bad))
  (tmp_path / "plain.bin").write_bytes(pickle.dumps(Malicious(trace), protocol=2))
  with pytest.raises(ValueError, match=r"plain\.bin"):
    interop.read(str(tmp_path / "plain.bin"))
  assert not trace.exists()


def test_a_pickled_module_is_refused(tmp_path):
  torch.save(modules.pre_proj(8, 8, 8, seed=0), tmp_path / "module.pt")
  with pytest.raises(
    ValueError, match=r"module\.pt holds more than tensors: .*Sequential.*state_dict"
  ):
    files.read(str(tmp_path / "module.pt"))


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_pytorch_files_are_refused_in_words(tmp_path, legacy):
  path = tmp_path / "x.pt"
  torch.save({"a": torch.randn(500)}, path, _use_new_zipfile_serialization=not legacy)
  whole = path.read_bytes()
  assert files.read(str(path))["a"].shape == (500,)
  for content in (*(whole[: len(whole) * i // 12] for i in range(1, 12)), b"text", b"\x80\x02."):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.pt cannot be read .*copy or download it again"):
      files.read(str(path))


def test_what_is_no_state_dict_is_refused(tmp_path):
  path = tmp_path / "x.pth"
  itself = {}
  itself["a"] = itself
  for content, words in (
    (torch.zeros(3), "cannot be read"),
    ({"step": 3, "name": "x"}, "no tens"),
    ([torch.zeros(3)], "cannot be read"),
    (itself, "cannot be read"),
  ):
    torch.save(content, path)
    with pytest.raises(ValueError, match=words):
      files.read(str(path))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_pytorch_files_become_float32(tmp_path, dtype):
  x = torch.arange(-3.0, 3).reshape(2, 3).to(getattr(torch, dtype)) / 4
  content = {"a": {"b": torch.nn.Parameter(x.T)}, "n": torch.tensor(3), "step": 5, "name": "x"}
  torch.save(content, tmp_path / "x.bin")
  flat = files.read(str(tmp_path / "x.bin"))
  assert {k: (v.dtype, v.shape) for k, v in flat.items()} == {
    "a.b": (np.float32, (3, 2)), "n": (np.int64, ()),
  }  # fmt: skip
  np.testing.assert_array_equal(flat["a.b"], np.arange(-3, 3).reshape(2, 3).T / 4)


def test_every_key_of_the_authors_file_that_does_not_fit_is_named(tmp_path):
  state = states(parts("tiny", 2, seed=20, layers=2)["text"])
  del state["pre_proj"]["0.bias"], state["encoder"]["h.1.ln_2.weight"]
  state["projector"]["9.weight"] = torch.zeros(3, 3)
  state["encoder"]["wpe.weight"] = torch.zeros(1024, 100)
  state["other"] = {"x": torch.zeros(2)}
  torch.save(state, tmp_path / "a_text_step1.pt")
  with pytest.raises(ValueError, match=r"a_text_step1\.pt: ") as e:
    interop.read(str(tmp_path / "a_text_step1.pt"))
  told = str(e.value)
  for line in (
    "missing: pre_proj.0.bias", "missing: encoder.h.1.ln_2.weight",
    "unexpected: projector.9.weight (3, 3)", "unexpected: other.x (2,)",
    "other shape: encoder.wpe.weight (1024, 100), expected (1024, 192)",
  ):  # fmt: skip
    assert line in told, told
  assert len(told.splitlines()) == 6


def test_layer_scale_and_register_tokens_are_refused_by_name(tmp_path):
  model = modules.timm_vit("tiny", 16, 32, seed=0, depth=1, init_values=0.1, reg_tokens=2)
  torch.save(model.state_dict(), tmp_path / "x.pt")
  with pytest.raises(ValueError) as e:
    interop.read(str(tmp_path / "x.pt"))
  for name in ("reg_token (1, 2, 192)", "blocks.0.ls1.gamma (192,)", "blocks.0.ls2.gamma (192,)"):
    assert f"unexpected: {name}" in str(e.value)
