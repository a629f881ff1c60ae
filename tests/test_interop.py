"""Weights to and from other layouts: nothing is lost, nothing wrong is taken, all of it is said."""

import json
import os
import pathlib
import sys

import flax
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jepa_vl import interop
from jepa_vl.interop import files, gpt2, levljepa, timm
from jepa_vl.interop.layout import HEADS
from jepa_vl.model import layers, two_tower

VOCAB = 50


def shapes(config, *, vocab=VOCAB, **changes):
  """The model's variables as ShapeDtypeStructs."""
  c = config.copy_and_resolve_references()
  c.update_from_flattened_dict({key.replace("__", "."): x for key, x in changes.items()})
  model = two_tower.from_config(
    c.model, c.text, vocab_size=vocab, dtype=jnp.float32, scalars={}
  )
  init = lambda: model.init(jax.random.key(0), two_tower.dummy_batch(model, 1), train=False)
  return jax.eval_shape(init)


def fill(tree, seed=0):
  """Random float32 arrays in place of shapes; a negative zero among them."""
  rng = np.random.default_rng(seed)
  tree = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), tree)
  for x in jax.tree.leaves(tree):
    x.reshape(-1)[:1] = -0.0
  return tree


def bits(tree):
  """{path: bytes}: what is equal only if every bit is."""
  flat = flax.traverse_util.flatten_dict(tree, sep="/")
  return {path: (x.shape, str(x.dtype), np.asarray(x).tobytes()) for path, x in flat.items()}


def write(path, flat):
  safetensors.numpy.save_file(flat, path)
  return str(path)


@pytest.fixture
def model(config):
  config.model.predictor_depth = 4
  return shapes(config)


@pytest.fixture
def variables(model):
  return fill(model)


@pytest.fixture
def saved(variables, tmp_path):
  """A folder with the authors' safetensors pair."""
  levljepa.save(tmp_path / "saved", variables, step=5)
  return tmp_path / "saved"


# Reading files.


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_safetensors_become_float32_and_integers_stay(tmp_path, dtype):
  x = np.arange(-3, 3).reshape(2, 3).astype(getattr(ml_dtypes, dtype, dtype)) / 4
  path = write(tmp_path / "x.safetensors", {"a.b": x, "n": np.array(7), "s": x[:1, :1].reshape(())})
  flat = files.read(path)
  assert {k: (v.dtype, v.shape) for k, v in flat.items()} == {
    "a.b": (np.float32, (2, 3)), "n": (np.int64, ()), "s": (np.float32, ()),
  }  # fmt: skip
  np.testing.assert_array_equal(flat["a.b"], np.arange(-3, 3).reshape(2, 3) / 4)


def test_files_that_are_no_weights_are_refused_in_words(tmp_path):
  write(tmp_path / "whole.safetensors", {"a": np.ones((40, 40), np.float32)})
  content = (tmp_path / "whole.safetensors").read_bytes()
  damage = {
    "short": content[:-100],
    "header": content[:20],
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "zip": b"PK\x03\x04" + content,
    "other_header": content.replace(b'"dtype"', b'"dtypo"'),
    "other_dtype": content.replace(b'"F32"', b'"Z32"'),
  }
  for name, data in damage.items():
    path = tmp_path / f"{name}.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name}\.safetensors cannot be read .*copy or download"):
      files.read(str(path))


def test_empty_missing_and_other_files_are_refused_in_words(tmp_path):
  (tmp_path / "empty.safetensors").touch()
  (tmp_path / "x.txt").write_text("x")
  none = write(tmp_path / "none.safetensors", {})
  for path, words in {
    str(tmp_path / "empty.safetensors"): "is empty",
    str(tmp_path / "x.txt"): "no weight file by its name; expected one of .safetensors, .pt",
    none: "holds no tensors",
  }.items():
    with pytest.raises(ValueError, match=words):
      files.read(path)
  with pytest.raises(FileNotFoundError, match="missing.pt: no weights there; expected a run"):
    files.read(str(tmp_path / "missing.pt"))


def test_a_pytorch_file_without_pytorch_says_what_to_do(tmp_path, monkeypatch):
  (tmp_path / "x.pt").write_bytes(b"anything")
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(ValueError, match=r"x\.pt .*pip install torch, or convert .*safetensors"):
    files.read(str(tmp_path / "x.pt"))


# Their layouts.


def test_heads_of_a_width_are_one_number():
  """What a file does not say must follow from the width."""
  assert all(HEADS[width] == heads for width, _, heads in two_tower.SIZES.values())


@pytest.mark.parametrize("predictor_depth", [0, 1, 4])
@pytest.mark.parametrize("scalars", [(), ("log_scale", "bias")])
def test_the_authors_layout_keeps_every_bit(config, tmp_path, predictor_depth, scalars):
  variables = fill(shapes(config, model__predictor_depth=predictor_depth))
  variables["params"] |= {name: np.array(i - 3, np.float32) for i, name in enumerate(scalars)}
  levljepa.save(tmp_path, variables, step=5)
  assert sorted(os.listdir(tmp_path)) == [
    "config.json", "text_encoder.safetensors", "vision_encoder.safetensors",
  ]  # fmt: skip
  for loaded in (levljepa.load(str(tmp_path)), interop.read(str(tmp_path))):
    assert loaded["params"]["text"]["position_embedding"].shape == (1024, 128)
    back, left_out, left_alone = interop.fit(loaded, variables)
    assert bits(back) == bits(variables) and (left_out, left_alone) == ([], [])


def test_both_towers_alone_keep_every_bit(variables):
  image, text = variables["params"]["image"], variables["params"]["text"]
  assert bits(timm.to_ours(timm.from_ours(image))) == bits(image)
  assert bits(gpt2.to_ours(gpt2.from_ours(text, positions=0))) == bits(text)
  padded = gpt2.from_ours(text, positions=20)["wpe.weight"]
  assert padded.shape == (20, 128) and not padded[12:].any()
  assert bits({"x": padded[:12]}) == bits({"x": text["position_embedding"]})


def test_a_bias_before_batch_norm_goes_into_the_running_mean(variables):
  """Ours has none; b - mean is all that BatchNorm sees of it."""
  flat = levljepa.to_file(variables, "image", step=5)
  assert not flat["pre_proj.0.bias"].any() and flat["projector.5.num_batches_tracked"] == 5
  bias = flat["projector.4.bias"] = np.arange(32, dtype=np.float32)
  found = levljepa.read_file(flat)["batch_stats"]["image_predictor"]
  mean = variables["batch_stats"]["image_predictor"]["bn_1"]["mean"]
  np.testing.assert_array_equal(found["bn_1"]["mean"], mean - bias)


def test_config_json_has_the_authors_keys(variables, tmp_path):
  levljepa.save(tmp_path, variables, step=5, config={"training": {"steps": 5}, "model_type": "x"})
  assert json.loads((tmp_path / "config.json").read_text()) == {
    "model_type": "x",
    "model_size": "nano",
    "vision_encoder": {
      "architecture": "vit_nano_patch8_16", "hidden_size": 128, "num_layers": 4, "num_heads": 2,
    },
    "text_encoder": {
      "architecture": "gpt2", "hidden_size": 128, "num_layers": 4, "num_heads": 2,
      "vocab_size": VOCAB, "n_positions": 1024,
    },
    "embed_dim": 16, "projector_width": 32, "projector_depth": 4,
    "training": {"steps": 5},
  }  # fmt: skip


@pytest.mark.parametrize("file", levljepa.FILES.values())
def test_a_save_that_fails_leaves_what_was_there(variables, saved, monkeypatch, file):
  """Also when the first file was whole already: never one tower of two models."""
  before = {name: (saved / name).read_bytes() for name in os.listdir(saved)}
  save_file = safetensors.numpy.save_file

  def fail(flat, path, metadata):
    if file not in str(path):
      return save_file(flat, path, metadata)
    pathlib.Path(path).write_bytes(b"half")
    raise OSError("no space left")

  monkeypatch.setattr(safetensors.numpy, "save_file", fail)
  other = jax.tree.map(lambda x: x + 1, variables)
  with pytest.raises(OSError, match="no space"):
    levljepa.save(saved, other, step=6)
  assert {name: (saved / name).read_bytes() for name in os.listdir(saved)} == before


def test_saving_half_a_model_is_refused(variables, tmp_path):
  del variables["params"]["text"]
  with pytest.raises(ValueError, match="need text, which"):
    levljepa.save(tmp_path, variables, step=5)
  assert not os.listdir(tmp_path)


@pytest.mark.parametrize("change, words", [
  ({"reg_token": (1, 4, 128)}, ["unexpected: reg_token (1, 4, 128)"]),
  ({"blocks.3.ls1.gamma": (128,)}, ["unexpected: blocks.3.ls1.gamma (128,)"]),
  ({"blocks.2.attn.q_norm.weight": (64,)}, ["unexpected: blocks.2.attn.q_norm.weight (64,)"]),
  ({"norm.weight": None, "fc_norm.weight": (128,)},
   ["missing: norm.weight", "unexpected: fc_norm.weight (128,)"]),
  ({"blocks.1.attn.qkv.bias": None, "cls_token": (1, 2, 128), "pos_embed": (5, 128)},
   ["missing: blocks.1.attn.qkv.bias", "other shape: cls_token (1, 2, 128), expected (1, 1, 128)",
    "other shape: pos_embed (5, 128), expected (1, N, 128)"]),
  ({"patch_embed.proj.weight": (128, 3, 8, 4)},
   ["other shape: patch_embed.proj.weight (128, 3, 8, 4), expected (128, 3, 8, 8)"]),
  ({"blocks.0.mlp.fc1.weight": (128, 512)},
   ["other shape: blocks.0.mlp.fc1.weight (128, 512), expected (512, 128)"]),
  ({"blocks.2.norm1.bias": None, "blocks.5.norm1.bias": (128,)}, ["missing: blocks.2.norm1.bias"]),
])  # fmt: skip
def test_another_vit_is_refused_by_name(variables, change, words):
  flat = timm.from_ours(variables["params"]["image"])
  for name, shape in change.items():
    flat.pop(name, None)
    if shape:
      flat[name] = np.zeros(shape, np.float32)
  with pytest.raises(ValueError) as e:
    timm.to_ours(flat)
  assert all(line in str(e.value) for line in words), str(e.value)


def test_integers_are_no_weights(variables):
  flat = timm.from_ours(variables["params"]["image"])
  flat["norm.bias"] = flat["norm.bias"].astype(np.int8)
  with pytest.raises(ValueError, match=r"norm\.bias int8 \(128,\), expected \(128,\)"):
    timm.to_ours(flat)


def test_a_width_that_no_size_has_is_refused(variables):
  """Its number of heads would be a guess."""
  flat = gpt2.from_ours(variables["params"]["text"])
  cut = {name: x[tuple(slice(n // 2 if n % 128 == 0 else n) for n in x.shape)]
         for name, x in flat.items()}  # fmt: skip
  cut["wpe.weight"] = flat["wpe.weight"][:, :64]
  with pytest.raises(ValueError, match="width 64, which no model.size has: 128, 192"):
    gpt2.to_ours(cut)


def test_the_classifier_and_old_buffers_are_left_out(variables):
  flat = timm.from_ours(variables["params"]["image"])
  head = {"head.weight": np.zeros((10, 128), np.float32), "head.bias": np.zeros(10, np.float32)}
  assert bits(timm.to_ours({**flat, **head})) == bits(variables["params"]["image"])
  flat = {f"transformer.{k}": x for k, x in gpt2.from_ours(variables["params"]["text"], 0).items()}
  flat["lm_head.weight"] = flat["transformer.wte.weight"]
  for i in range(4):
    flat[f"transformer.h.{i}.attn.bias"] = np.ones((1, 1, 4, 4), np.uint8)
    flat[f"transformer.h.{i}.attn.masked_bias"] = np.float32(-1e4)
  assert bits(gpt2.to_ours(flat)) == bits(variables["params"]["text"])


# Recognising files.


def test_files_are_recognised_by_their_names_of_tensors(variables, saved, tmp_path):
  vit = write(tmp_path / "a.safetensors", timm.from_ours(variables["params"]["image"]))
  gpt = write(tmp_path / "b.safetensors", gpt2.from_ours(variables["params"]["text"]))
  os.makedirs(tmp_path / "folder")
  os.rename(gpt, tmp_path / "folder" / "model.safetensors")
  found = interop.read(f"{vit}, {tmp_path / 'folder'}")
  assert sorted(found["params"]) == ["image", "text"] and not found["batch_stats"]
  assert bits(found["params"]["image"]) == bits(variables["params"]["image"])
  os.rename(saved / "text_encoder.safetensors", tmp_path / "x.safetensors")
  found = interop.read(str(tmp_path / "x.safetensors"))
  assert sorted(found["params"]) == ["text", "text_head", "text_predictor"]
  assert sorted(found["batch_stats"]) == ["text_head", "text_predictor"]
  with pytest.raises(ValueError, match="no pair of one vision and one text file"):
    interop.read(str(saved))


def test_two_files_with_one_component_are_refused(variables, saved, tmp_path):
  vit = write(tmp_path / "vit.safetensors", timm.from_ours(variables["params"]["image"]))
  with pytest.raises(ValueError, match=r"vision_encoder\.safetensors and .*both hold 'image'"):
    interop.read(f"{saved},{vit}")
  with pytest.raises(ValueError, match="given twice"):
    interop.read(f"{vit},{vit}")


def test_an_unknown_file_is_refused_with_its_first_names(tmp_path):
  flat = {f"visual.layer.{i}": np.ones(2, np.float32) for i in range(9)}
  path = write(tmp_path / "clip.safetensors", flat)
  with pytest.raises(ValueError, match=r"clip\.safetensors: neither .*begin visual\.layer\.0, "):
    interop.read(path)
  path = write(tmp_path / "enc.safetensors", {"encoder.layer.0": np.ones(2, np.float32)})
  with pytest.raises(ValueError, match=r"enc\.safetensors: neither .*begin encoder\.layer\.0"):
    interop.read(path)
  with pytest.raises(ValueError, match="no weights that are known by name"):
    interop.read(str(tmp_path))
  with pytest.raises(FileNotFoundError):
    interop.read(str(tmp_path / "none"))


def test_several_steps_in_one_folder_are_refused(tmp_path):
  for name in ("a_vision_step1.pt", "a_vision_step2.pt", "a_text_step1.pt"):
    (tmp_path / name).touch()
  with pytest.raises(ValueError, match="a_vision_step1.pt, a_vision_step2.pt, a_text_step1.pt"):
    levljepa.load(str(tmp_path))
  with pytest.raises(ValueError, match="expected a folder with vision_encoder.safetensors"):
    levljepa.load("one.pt")


# What shapes say.


def test_shapes_say_which_config_builds_the_model(variables):
  assert interop.shapes(variables) == {
    "model.size": "nano", "model.patch_size": 8, "model.image_size": 16, "model.embed_dim": 16,
    "model.hidden_dim": 32, "model.predictor_depth": 4, "vocab_size": VOCAB, "text_positions": 12,
  }  # fmt: skip
  params = variables["params"]
  part = lambda *names: interop.shapes({"params": {name: params[name] for name in names}})
  assert part("image") == {
    "model.size": "nano", "model.patch_size": 8, "model.image_size": 16,
  }  # fmt: skip
  assert part("image_head", "text_head")["model.predictor_depth"] == 0


@pytest.mark.parametrize("size", two_tower.SIZES)
def test_every_size_is_known_by_its_shapes(config, size):
  found = interop.shapes(shapes(config, model__size=size, model__patch_size=4))
  assert (found["model.size"], found["model.patch_size"]) == (size, 4)


def test_shapes_that_no_config_has_are_refused(config, model):
  other = shapes(config, model__size="micro", model__hidden_dim=64)["params"]
  params = model["params"]
  mixed = lambda **changes: interop.shapes({"params": {**params, **changes}})
  with pytest.raises(ValueError, match="model.size is one for both .* image nano, text micro"):
    mixed(text=other["text"])
  with pytest.raises(ValueError, match="model.hidden_dim .* text_head 64"):
    mixed(text_head=other["text_head"])
  with pytest.raises(ValueError, match="image_predictor 4, text_predictor 0"):
    interop.shapes({"params": {k: x for k, x in params.items() if k != "text_predictor"}})
  wide = jax.ShapeDtypeStruct((7, 128), np.float32)
  with pytest.raises(ValueError, match="6 positions beside CLS are no square"):
    mixed(image={**params["image"], "position_embedding": wide})
  blocks = jax.tree.map(lambda x: jax.ShapeDtypeStruct((5, *x.shape[1:]), x.dtype),
                        params["text"]["tower"])  # fmt: skip
  with pytest.raises(ValueError, match="text tower has width 128 and depth 5.*nano 128x4"):
    mixed(text={**params["text"], "tower": blocks})


# Fitting to a model.


def test_components_are_left_out_and_left_alone_whole(config, variables):
  into = fill(shapes(config, model__predictor_depth=0), seed=1)
  loaded = {
    "params": {k: x for k, x in variables["params"].items() if k.startswith("image")},
    "batch_stats": {k: x for k, x in variables["batch_stats"].items() if k.startswith("image")},
  }
  found, left_out, left_alone = interop.fit(loaded, into)
  assert left_out == ["image_predictor"] and sorted(left_alone) == ["text", "text_head"]
  assert jax.tree.structure(found) == jax.tree.structure(into)
  for kind in ("params", "batch_stats"):
    for name, tree in found[kind].items():
      assert bits({"x": tree}) == bits({"x": (loaded if "image" in name else into)[kind][name]})


def test_towers_alone_can_be_fitted(model, variables):
  """Towers alone; the rest keeps its ShapeDtypeStructs."""
  loaded = {"params": {"image": variables["params"]["image"]}, "batch_stats": {}}
  found, _, left_alone = interop.fit(loaded, model)
  assert len(left_alone) == 5 and found["batch_stats"] == model["batch_stats"]
  assert found["params"]["text_head"] == model["params"]["text_head"]


def test_every_key_that_does_not_fit_is_listed_with_its_config_key(config, variables):
  into = shapes(
    config, vocab=60, model__embed_dim=24, model__hidden_dim=40, model__predictor_depth=3,
    model__patch_size=4, text__length=20,
  )  # fmt: skip
  with pytest.raises(ValueError) as e:
    interop.fit(variables, into)
  told = str(e.value)
  for line in (
    "params/image/patch_embedding/kernel (192, 128), expected (48, 128); model.patch_size",
    "params/text/token_embedding/embedding (50, 128), expected (60, 128); text.tokenizer",
    "params/text/position_embedding (12, 128), expected (20, 128); text.length",
    "params/image_head/dense_0/kernel (128, 32), expected (128, 40); model.hidden_dim",
    "params/image_head/out/bias (16,), expected (24,); model.embed_dim",
    "params/text_predictor/dense_0/kernel (16, 32), expected (24, 40); model.embed_dim; model.hid",
    "params/text_predictor/out/kernel (32, 16), expected (40, 24); model.hidden_dim; model.embed",
    "batch_stats/text_head/bn_0/var (32,), expected (40,); model.hidden_dim",
    "unexpected: params/image_predictor/dense_3/kernel (32, 32); model.predictor_depth",
    "unexpected: batch_stats/text_predictor/bn_3/mean (32,); model.predictor_depth",
  ):
    assert line in told, (line, told)
  assert "tower" not in told
  deeper = shapes(config, model__predictor_depth=5)
  with pytest.raises(ValueError, match="missing: params/text_predictor/bn_4/bias; model.predictor"):
    interop.fit(variables, deeper)
  with pytest.raises(ValueError) as e:
    interop.fit(variables, shapes(config, model__size="micro"))
  assert "(4, 128, 512), expected (6, 192, 768); model.size\n" in str(e.value)


def test_positions_of_another_grid_are_resampled(config, variables):
  into = shapes(config, model__image_size=32)
  found = interop.fit(variables, into)[0]["params"]["image"]["position_embedding"]
  table = variables["params"]["image"]["position_embedding"]
  assert found.dtype == np.float32 and isinstance(found, np.ndarray)
  np.testing.assert_array_equal(found[:1], table[:1])
  np.testing.assert_array_equal(found[1:], layers.resample_positions(table[1:], (4, 4)))
  odd = dict(variables["params"]["image"], position_embedding=table[:4])
  with pytest.raises(ValueError, match="3 positions beside CLS are no square"):
    interop.fit({"params": {"image": odd}, "batch_stats": {}}, into)
