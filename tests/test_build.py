"""What a config determines, and which checkpoints fit it."""

import copy

import pytest
from ml_collections import ConfigDict

from jepa_vl import build as build_lib


@pytest.fixture
def config(config):
  config.mesh.data = -1
  return config


@pytest.mark.parametrize(("key", "value"), [
  ("steps", 0), ("batch_size", 0), ("accumulate", -1), ("log_every", 0), ("seed", -1),
  ("model.patch_size", 0), ("text.length", 0), ("objective.knots", 1), ("objective.num_slices", 0),
])  # fmt: skip
def test_a_number_below_its_minimum_is_named(config, key, value):
  config.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=rf"^{key} must be at least \d, got {value}$"):
    build_lib.build(config)


def test_every_minimum_is_of_a_key_that_exists(config):
  values = build_lib.flat(config.to_dict())
  assert all(values[key] >= least for key, least in build_lib.MINIMUM.items())


def test_weights_that_leave_none_for_the_alignment_are_refused(config):
  config.objective.update({"lambda_img": 0.5, "lambda_txt": 0.5})
  with pytest.raises(ValueError, match="lambda_img=0.5, objective.lambda_txt=0.5 must sum to less"):
    build_lib.build(config)
  config.objective.update({"lambda_img": 0.3, "name": "levljepa_plus"})
  config.data.augment = "dino"
  with pytest.raises(ValueError, match="objective.lambda_multi=0.2 must sum to less than 1"):
    build_lib.build(config)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_baseline_with_predictors_is_refused(config, name):
  """They would stay untrained, and be read."""
  config.objective.name = name
  with pytest.raises(ValueError, match=f"predictor_depth=0, or use the preset, .*vit_b.py:{name}"):
    build_lib.build(config)
  config.model.predictor_depth = 0
  assert build_lib.make_encode(build_lib.build(config)).readings == ("embed",)


def test_an_augmentation_of_the_wrong_length_is_named(config):
  config.data.blur_prob = (1.0, 0.1)
  with pytest.raises(ValueError, match="data.blur_prob must have 3 values"):
    build_lib.build(config)


def test_an_evaluation_needs_neither_training_data_nor_its_batch(config):
  config.data.update({"source": "array_record", "path": "/none"})
  config.batch_size = 10
  with pytest.raises(ValueError, match="batch_size=10"):
    build_lib.build(config)
  assert build_lib.build(config, training=False).source is None


def test_a_resume_refuses_what_is_fixed_and_says_what_changed(config, caplog, monkeypatch):
  monkeypatch.setattr(build_lib.log, "propagate", True)
  run = build_lib.build(config)
  build_lib.check_resume(run.meta, run)
  there = copy.deepcopy(run.meta)
  there["config"]["optim"]["lr"], there["config"]["batch_size"] = 5.0, 7
  with caplog.at_level("INFO", "jepa_vl.build"):
    build_lib.check_resume(there, run)
  assert "optim.lr: 5.0 -> " in caplog.text and "sample order is another" in caplog.text
  there["config"]["model"]["statistics"] = "imagenet"
  with pytest.raises(ValueError, match="model.statistics: imagenet there, clip here"):
    build_lib.check_resume(there, run)
  build_lib.check_resume(there, run, fixed_keys=("model.size",))
  for key in ("data_identity", "tokenizer_identity", "arrays"):
    other = copy.deepcopy(run.meta) | {key: {"x": "y"} if key == "arrays" else "another"}
    with pytest.raises(ValueError, match="another there|y there"):
      build_lib.check_resume(other, run)


@pytest.mark.parametrize("key, words", [
  ("retrieval/val/i2t/avg/R@10", ["eval_every"]),
  ("retrieval/A/i2t/avg/R@10", ["evals.retrieval.splits", "'A'", "val"]),
  ("-depth/val/rmse", ["EVALUATION/KEY", "retrieval"]),
  ("retrieval", ["EVALUATION/KEY", "retrieval"]),
])  # fmt: skip
def test_a_figure_to_keep_the_best_by_must_come_from_the_run(config, key, words):
  config.evals.retrieval = ConfigDict({"splits": ("val",)})
  config.keep_best, config.eval_every = key, 0
  with pytest.raises(ValueError, match="keep_best") as e:
    build_lib.check_keep_best(config)
  assert all(word in str(e.value) for word in words)
  config.keep_best, config.eval_every = "-retrieval/val/i2t/avg/R@10", 5
  build_lib.check_keep_best(config)
