"""The encoder as its users load it: from a run, from its export and from the authors' files."""

import json
import os
import pathlib
import shutil

import cv2
import jax
import numpy as np
import PIL.Image
import pytest
from records import noise
from safetensors.numpy import load_file, save_file

from configs import presets, tiny
from jepa_vl import build as build_lib
from jepa_vl import checkpoint, encoder, interop, train
from jepa_vl import export as export_lib
from jepa_vl.data import transforms

CAPTIONS = ["red heart", "", "a very long caption of many words about a cat, a dog and the sea"]


def small(preset=""):
  c = tiny.get_config(preset)
  c.mesh.data = -1
  c.steps, c.batch_size, c.log_every = 2, 16, 1
  c.model.update({"scan": True, "image_size": 16, "embed_dim": 16, "hidden_dim": 32})
  c.text.length, c.objective.num_slices = 12, 64
  for name in ("zeroshot", "probe", "rank"):
    del c.evals[name]
  c.evals.retrieval.splits = ("val",)
  return c


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = str(tmp_path_factory.mktemp("run"))
  assert train.train(small(), folder) == 0
  return folder


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
  folder = str(tmp_path_factory.mktemp("export"))
  assert export_lib.export(workdir, folder) == 0
  return folder


@pytest.fixture(scope="module")
def model(workdir):
  return encoder.load(workdir)


@pytest.fixture
def images():
  return [noise((20, 24), 0), noise((40, 17), 1), noise((16, 16), 2)]


def test_what_it_encodes_is_what_evaluations_see(model, workdir):
  """Same preprocessing, tokens, readout and weights as the run's own evaluation of that step."""
  run = build_lib.build(small(), training=False)
  encode = build_lib.make_encode(run)
  variables = checkpoint.read(workdir, run.abstract_state.variables, lambda meta: None)
  data = encode.split("emoji", "", "val")
  source = build_lib.sources.open_source("emoji", "", "val")
  pictures = [transforms.decode(source[i]["image"]) for i in range(5)]
  expected = encode.features(variables, "emoji", "", "val")
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  close(model.encode_image(pictures), expected["z_img"][:5])
  close(model.predict_text_from_image(pictures), expected["p_img"][:5])
  close(model.cls_features(pictures), expected["cls"][:5])
  close(model.encode_text(data.captions[:7]), expected["z_txt"][:7])
  close(model.predict_image_from_text(data.captions[:7]), expected["p_txt"][:7])
  close(model.patch_features(pictures), encode.patches(variables, data.images()[:5]))
  assert model.description.step == 2 and model.reading == "avg" and model.embed_dim == 16


def test_paths_pictures_and_arrays_are_the_same_image(model, images, tmp_path):
  path = tmp_path / "x.png"
  cv2.imwrite(str(path), images[0][..., ::-1])
  expected = model.encode_image([images[0]])
  picture = PIL.Image.fromarray(images[0])
  for image in (images[0], str(path), path, picture, [picture], images[0][None], iter([path])):
    np.testing.assert_array_equal(model.encode_image(image), expected)
  grey = PIL.Image.fromarray(images[0][..., 0])
  alike = np.repeat(images[0][..., :1], 3, axis=2)
  np.testing.assert_array_equal(model.encode_image(grey), model.encode_image(alike))
  np.testing.assert_array_equal(model.encode_text("cat"), model.encode_text(["cat"]))


def test_a_picture_is_decoded_as_its_file(model, tmp_path):
  """Upright by its EXIF orientation, and sixteen bits as the upper eight."""
  turned, deep = tmp_path / "turned.jpg", tmp_path / "deep.png"
  exif = PIL.Image.Exif()
  exif[274] = 6  # orientation: a quarter turn
  PIL.Image.fromarray(cv2.resize(noise((4, 6)), (60, 40))).save(turned, exif=exif, quality=95)
  cv2.imwrite(str(deep), np.random.default_rng(0).integers(0, 2**16, (20, 24), dtype=np.uint16))
  for path in (turned, deep):
    as_file, as_picture = encoder._as_array(path), encoder._as_array(PIL.Image.open(path))
    assert as_file.shape == as_picture.shape
    assert np.abs(as_file.astype(int) - as_picture).mean() < 1  # two decoders of one JPEG
  assert encoder._as_array(turned).shape == (60, 40, 3)


def test_rows_do_not_depend_on_their_batch(workdir, model, images):
  small_batches = encoder.load(workdir, batch_size=2)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  close(small_batches.encode_image(images), model.encode_image(images))
  close(small_batches.encode_text(CAPTIONS), model.encode_text(CAPTIONS))
  for image, row in zip(images, model.encode_image(images), strict=True):
    close(model.encode_image(image)[0], row)


def test_few_shapes_are_compiled(workdir, images):
  model = encoder.load(workdir, batch_size=4)
  for count in (1, 2, 3, 4, 5, 9, 12):
    assert model.encode_image((images * 4)[:count]).shape == (count, 16)
  assert model._apply._cache_size() == 3  # one, two and four rows


def test_patch_features_of_any_size(model, images):
  assert model.patch_features(images).shape == (3, 2, 2, 128)
  assert model.patch_features(images, image_size=32).shape == (3, 4, 4, 128)
  whole = model.patch_features(images, image_size=(16, 40))
  assert whole.shape == (3, 2, 5, 128)
  exact = transforms.resize(images[0], 16, 40)  # nothing is cropped
  np.testing.assert_allclose(
    model.patch_features(exact, image_size=(16, 40))[0], whole[0], atol=1e-5
  )
  for wrong in (20, 4, (16, 20), (8, 8, 8), 0):
    with pytest.raises(ValueError, match=r"multiples of the patch \(8 pixels\)"):
      model.patch_features(images, image_size=wrong)


def test_similarity_is_in_the_models_own_reading(model, images):
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  p, z = unit(model.predict_text_from_image(images)), unit(model.encode_image(images))
  q, w = unit(model.predict_image_from_text(CAPTIONS)), unit(model.encode_text(CAPTIONS))
  found = model.similarity(images, CAPTIONS)
  np.testing.assert_allclose(found, (p @ w.T + z @ q.T) / 2, atol=1e-5)
  np.testing.assert_allclose(
    model.similarity(images, CAPTIONS, reading="embed"), z @ w.T, atol=1e-5
  )
  with pytest.raises(ValueError, match="reading must be one of embed, .*, got 'best'"):
    model.similarity(images, CAPTIONS, reading="best")


def test_what_is_no_image_or_caption_is_said(model, images, tmp_path):
  path = tmp_path / "broken.jpg"
  path.write_bytes(b"no image")
  with pytest.raises(ValueError, match="broken.jpg: image cannot be decoded"):
    model.encode_image([images[0], path])
  with pytest.raises(FileNotFoundError, match="none.png"):
    model.encode_image(tmp_path / "none.png")
  for wrong in (images[0] / 255.0, images[0][..., 0], images[0][:0], 3):
    with pytest.raises(ValueError, match="a path, a PIL image or a uint8 array"):
      model.encode_image([wrong])
  with pytest.raises(ValueError, match="captions must be strings, got int"):
    model.encode_text(["cat", 3])
  with pytest.raises(ValueError, match="no images were given"):
    model.encode_image([])
  with pytest.raises(ValueError, match="images must be one or a list of them, got int"):
    model.encode_image(3)
  with pytest.raises(ValueError, match="captions must be one or a list of them, got NoneType"):
    model.encode_text(None)


# --- export


def test_an_export_opens_as_what_was_exported(model, exported, images):
  again = encoder.load(exported)
  jax.tree.map(np.testing.assert_array_equal, again.variables, model.variables)
  np.testing.assert_array_equal(
    again.similarity(images, CAPTIONS), model.similarity(images, CAPTIONS)
  )
  assert again.config.to_dict() == model.config.to_dict()
  assert again.description.step == 2
  assert again.tokenizer.identity == model.tokenizer.identity


def test_the_model_card_tells_data_steps_figures_and_config(exported):
  with open(os.path.join(exported, "README.md")) as f:
    card = f.read()
  for words in (
    "`emoji`", "| Steps, batch | 2, 16 |", "sentencepiece of ", "retrieval val i2t/avg/R@10",
    "shorter side to 18 px, centre crop of 16 px", '"num_slices": 64',
  ):  # fmt: skip
    assert words in card, words
  with open(os.path.join(exported, "config.json")) as f:
    described = json.load(f)
  assert described["preprocessing"]["resize"] == 18 and described["projector_depth"] == 2


def test_an_export_replaces_an_export_and_nothing_else(workdir, exported, tmp_path):
  mine = tmp_path / "mine"
  mine.mkdir()
  (mine / "README.md").write_text("mine")
  for folder in (workdir, mine):
    with pytest.raises(ValueError, match="files that no earlier export wrote.* new or empty"):
      export_lib.export(workdir, str(folder))
  assert os.listdir(mine) == ["README.md"]
  copy = tmp_path / "copy"
  shutil.copytree(exported, copy)
  (copy / "vision_encoder.safetensors").write_bytes(b"")
  export_lib.export(workdir, str(copy))
  for name in os.listdir(exported):
    assert (copy / name).read_bytes() == pathlib.Path(exported, name).read_bytes()


def test_another_tokenizer_in_the_folder_is_noticed(exported, tmp_path, tok):
  copy = tmp_path / "copy"
  shutil.copytree(exported, copy)
  config = json.loads((copy / "config.json").read_text())
  config["jepa_vl"]["tokenizer_identity"] = "sentencepiece of 2000, 0000000000000000"
  (copy / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match="is not the one that the model was trained with"):
    encoder.load(str(copy))
  config["jepa_vl"] = {"config": {}}
  (copy / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match="its part 'jepa_vl' is damaged"):
    encoder.load(str(copy))


def test_the_two_files_of_an_export_keep_its_description(exported):
  paths = [os.path.join(exported, f"{name}_encoder.safetensors") for name in ("vision", "text")]
  model = encoder.load(",".join(paths))
  assert encoder.load(pathlib.Path(exported)).description == model.description
  assert model.config.text.length == 12 and model.tokenizer


def test_a_step_that_is_not_there_is_named(workdir):
  with pytest.raises(FileNotFoundError, match=r"9999 does not exist; the steps there are \[2\]"):
    encoder.load(os.path.join(workdir, "checkpoints", "9999"))


def test_figures_of_another_step_are_not_claimed(workdir, tmp_path):
  shutil.copytree(workdir, tmp_path / "run")
  results = tmp_path / "run" / "results.json"
  results.write_text(results.read_text().replace('"step": 2', '"step": 3'))
  export_lib.export(str(tmp_path / "run"), str(tmp_path / "out"))
  assert "None at this step." in (tmp_path / "out" / "README.md").read_text()


def test_a_baseline_keeps_its_scale_and_has_no_predictors(tmp_path, images):
  c = small("siglip")
  c.evals = type(c)()
  train.train(c, str(tmp_path / "run"))
  model = encoder.load(str(tmp_path / "run"))
  assert model.reading == "embed" and model.similarity(images, CAPTIONS).shape == (3, 3)
  with pytest.raises(ValueError, match="no predictors"):
    model.predict_text_from_image(images)
  export_lib.export(str(tmp_path / "run"), str(tmp_path / "out"))
  again = encoder.load(str(tmp_path / "out"))
  jax.tree.map(np.testing.assert_array_equal, again.variables, model.variables)
  assert float(again.variables["params"]["bias"]) == pytest.approx(-10, abs=0.1)


# --- the authors' files, without what an export adds


@pytest.fixture
def bare(exported, tmp_path):
  """The exported folder as the authors would have written it."""
  folder = tmp_path / "bare"
  shutil.copytree(exported, folder)
  described = json.loads((folder / "config.json").read_text())
  del described["jepa_vl"], described["preprocessing"]
  (folder / "config.json").write_text(json.dumps(described))
  os.rename(folder / "tokenizer.model", tmp_path / "tokenizer.model")
  return folder


def test_bare_files_say_their_shapes_and_lack_a_tokenizer(bare, model, images, tmp_path):
  again = encoder.load(str(bare))
  assert again.config.text.length == 77 and again.config.model.statistics == "clip"
  np.testing.assert_array_equal(again.encode_image(images), model.encode_image(images))
  with pytest.raises(ValueError, match="hold no tokenizer: encoder.load"):
    again.encode_text("cat")
  again = encoder.load(
    str(bare), tokenizer=str(tmp_path / "tokenizer.model"), statistics="imagenet"
  )
  # Causal attention: what stands behind the end does not matter, so neither does the length.
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  close(again.encode_text("red cat"), model.encode_text("red cat"))
  assert np.abs(again.encode_image(images) - model.encode_image(images)).max() > 1e-3


def test_a_tokenizer_of_another_vocabulary_is_refused(bare, tmp_path):
  weights = load_file(bare / "text_encoder.safetensors")
  weights["encoder.wte.weight"] = weights["encoder.wte.weight"][:100]
  save_file(weights, bare / "text_encoder.safetensors")
  with pytest.raises(ValueError, match="tokens and the text tower 100: give the tokenizer"):
    encoder.load(str(bare), tokenizer=str(tmp_path / "tokenizer.model"))


def test_a_part_of_a_model_is_refused(bare):
  weights = load_file(bare / "vision_encoder.safetensors")
  tower = {k.removeprefix("encoder."): v for k, v in weights.items() if k.startswith("encoder.")}
  save_file(tower, bare / "vit.safetensors")
  with pytest.raises(ValueError, match="no whole model: without .*text.*for --config.init_from"):
    encoder.load(str(bare / "vit.safetensors"))


def test_a_damaged_config_is_said(bare):
  (bare / "config.json").write_text("{")
  with pytest.raises(ValueError, match="config.json is no JSON"):
    encoder.load(str(bare))


# --- init_from


def start(config):
  run = build_lib.build(config)
  state = train.state_lib.init_state(run.model, run.tx, run.mesh, config.seed)
  return state, train.initialise_from(run, state)


def test_init_from_takes_the_weights_and_not_the_optimizer(workdir, exported, caplog, monkeypatch):
  monkeypatch.setattr(train.log, "propagate", True)
  expected = interop.read(workdir)
  for source in (workdir, exported):
    config = small()
    config.init_from, config.mesh.data, config.mesh.fsdp = source, 4, 2
    fresh, state = start(config)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.variables), expected)
    jax.tree.map(lambda a, b: a.sharding == b.sharding or pytest.fail("moved"), fresh, state)
    assert int(state.step) == 0 and not float(state.opt[1][0].count)


def test_init_from_says_what_is_whose(workdir, caplog, monkeypatch):
  monkeypatch.setattr(train.log, "propagate", True)
  config = presets.apply(small(), "clip")
  config.init_from = workdir
  with caplog.at_level("INFO", "jepa_vl.train"):
    start(config)
  assert "newly initialised: log_scale" in caplog.text
  assert "in the files, not in this model: image_predictor, text_predictor" in caplog.text


def test_init_from_refuses_the_words_of_another_tokenizer(exported, tmp_path, caplog, monkeypatch):
  monkeypatch.setattr(train.log, "propagate", True)
  copy = tmp_path / "copy"
  shutil.copytree(exported, copy)
  described = json.loads((copy / "config.json").read_text())
  described["jepa_vl"]["tokenizer_identity"] = "another"
  described["jepa_vl"]["config"]["model"]["statistics"] = "imagenet"
  (copy / "config.json").write_text(json.dumps(described))
  config = small()
  config.init_from = str(copy)
  with pytest.raises(ValueError, match="tokenizer another, and text.tokenizer is sentencepiece"):
    start(config)
  config.init_from = str(copy / "vision_encoder.safetensors")  # an image tower knows no words
  start(config)
  assert "was trained with model.statistics=imagenet, not clip" in caplog.text


def test_blanks_around_a_path_do_not_hide_where_its_weights_are_from(workdir, monkeypatch):
  described = []
  monkeypatch.setattr(train, "_check_origin", lambda path, found, *_: described.append(found))
  config = small()
  config.init_from = f" {workdir}"
  start(config)
  assert [found.step for found in described] == [2]


def test_init_from_another_architecture_names_every_difference(workdir):
  config = small()
  config.init_from, config.model.embed_dim, config.model.hidden_dim = workdir, 8, 64
  with pytest.raises(ValueError, match="image_head/out/kernel.*model.embed_dim") as e:
    start(config)
  assert "text_predictor/dense_0/kernel" in str(e.value) and "model.hidden_dim" in str(e.value)


def test_init_from_resamples_the_positions_of_another_size(workdir):
  config = small()
  config.init_from, config.model.image_size = workdir, 32
  _, state = start(config)
  table = state.params["image"]["position_embedding"]
  there = interop.read(workdir)["params"]["image"]["position_embedding"]
  assert table.shape == (17, 128)
  np.testing.assert_array_equal(table[0], there[0])
  np.testing.assert_allclose(table[1:].mean(0), there[1:].mean(0), atol=1e-3)
