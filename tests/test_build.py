"""What a config determines, and which checkpoints fit it."""

import copy
import math
import re

import pytest
from ml_collections import ConfigDict

from jepa_vl import build as build_lib
from jepa_vl import checks


@pytest.fixture
def config(config):
  config.mesh.data = -1
  return config


@pytest.mark.parametrize(("key", "value"), [
  ("steps", 0), ("batch_size", 0), ("accumulate", -1), ("log_every", 0), ("seed", -1),
  ("model.patch_size", 0), ("text.length", 0), ("objective.knots", 1), ("objective.num_slices", 0),
  ("objective.scale_rows", 0), ("objective.t_max", -3.0), ("optim.clip", -1.0), ("optim.lr", -1e-3),
  ("optim.lr", math.nan), ("optim.weight_decay", -0.1), ("data.eval_resize", 0.5),
])  # fmt: skip
def test_a_number_below_its_minimum_is_named(config, key, value):
  config.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=rf"^{key} must be at least [\de.-]+, got {value}$"):
    build_lib.build(config)


@pytest.mark.parametrize(("key", "value"), [
  ("data.flip", 50.0), ("data.tag_prob", -0.1), ("data.crop_scale", (80.0, 100.0)),
  ("data.blur_prob", (1.0, 0.1, 5.0)), ("data.max_bad_fraction", 5.0), ("optim.decay", 1.5),
])  # fmt: skip
def test_a_share_out_of_bounds_is_named(config, key, value):
  config.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=re.escape(f"{key} must be from 0 to 1, got {value}")):
    build_lib.build(config)


def test_every_bound_is_of_a_key_that_exists_and_allows_the_default(config):
  values = checks.flat(config.to_dict())
  assert checks.MINIMUM.keys() | checks.SHARES <= values.keys()
  checks.numbers(config)


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


@pytest.mark.parametrize(("changes", "words"), [
  ({"model.patch_dropout": 1.0}, "model.patch_dropout=1 must be .* below 1"),
  ({"model.patch_dropout": -0.1}, "model.patch_dropout=-0.1 must be a share from 0"),
  ({"model.patch_dropout": 0.9}, "patch_dropout=0.9 must .* leaves some of the 4 patches"),
  ({"model.patch_dropout": 0.5, "data.low_res": (8, 2)}, "some of the 1 patches"),
  ({"data.low_res": (8,)}, r"data.low_res=\(8,\) must be \(pixels, steps\)"),
  ({"data.low_res": (8, 0.5)}, r"data.low_res=\(8, 0.5\) must be \(pixels, steps\)"),
  ({"data.low_res": (12, 2)}, "multiple of model.patch_size=8 below model.image_size=16"),
  ({"data.low_res": (16, 2)}, "multiple of model.patch_size=8 below model.image_size=16"),
  ({"data.low_res": (8, 4)}, "leaves none of steps=4 to one of the two sizes"),
  ({"data.low_res": (8, 2), "objective.name": "levljepa_plus", "data.augment": "dino",
    "data.local_size": 8}, "data.augment='dino' has views of two sizes"),
])  # fmt: skip
def test_images_that_training_cannot_look_at_are_refused(config, changes, words):
  config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=words):
    build_lib.build(config)


def test_what_a_step_takes_is_counted_by_the_patches_that_it_sees(config):
  """FLOPs, and with them MFU; memory is that of the full size, which comes last."""

  def built(**keys):
    c = config.copy_and_resolve_references()
    c.update_from_flattened_dict(keys)
    return build_lib.build(c)

  whole, small_first = built(), built(**{"data.low_res": (8, 2)})
  assert small_first.flops == small_first.flops_at(2) == whole.flops
  assert small_first.memory() == whole.memory()
  # One patch of four, as an image of 8 pixels has.
  dropped = built(**{"model.patch_dropout": 0.75})
  assert dropped.flops == small_first.flops_at(0) == small_first.flops_at(1) < whole.flops
  assert dropped.memory()["activations"] < whole.memory()["activations"]
  assert dropped.memory()["optimizer"] == whole.memory()["optimizer"]


def test_a_micro_batch_of_one_row_is_refused(config, mesh):
  """BatchNorm makes zeros of it."""
  config.batch_size = config.accumulate = 16
  config.objective.group_size = 0
  with pytest.raises(ValueError, match="batch_size=16 / accumulate=16 leaves one row.*at least 2"):
    checks.batch(config, mesh)


def test_only_sigreg_needs_whole_groups(config, mesh):
  config.objective.group_size = 6
  for name in ("levljepa", "levljepa_plus"):
    config.objective.name = name
    with pytest.raises(ValueError, match="objective.group_size=6 does not divide the 16 rows"):
      checks.batch(config, mesh)
  for name in ("clip", "siglip"):
    config.objective.name = name
    checks.batch(config, mesh)


def test_a_first_moment_in_bfloat16_is_in_the_memory_that_is_told(config):
  whole = build_lib.build(config).memory()
  config.optim.mu_dtype = "bfloat16"
  halved = build_lib.build(config).memory()
  assert halved["optimizer"] == pytest.approx(0.75 * whole["optimizer"], rel=1e-3)
  assert halved["total"] - whole["total"] == halved["optimizer"] - whole["optimizer"]


@pytest.mark.parametrize(("key", "value", "words"), [
  ("blur_prob", (1.0, 0.1), "must have 3 values"),
  ("crop_scale", (0.5,), "must have 2 values"),
  ("local_scale", (1.0, 0.5), "must be the least and the most"),
])  # fmt: skip
def test_an_augmentation_of_the_wrong_values_is_named(config, key, value, words):
  config.data[key] = value
  with pytest.raises(ValueError, match=f"data.{key} {words}"):
    build_lib.build(config)


def test_an_evaluation_needs_neither_training_data_nor_its_batch(config):
  config.data.update({"source": "array_record", "path": "/none"})
  config.batch_size = 10
  with pytest.raises(ValueError, match="batch_size=10"):
    build_lib.build(config)
  assert build_lib.build(config, training=False).source is None


def test_a_resume_refuses_what_is_fixed_and_says_what_changed(config, caplog, monkeypatch):
  monkeypatch.setattr(checks.log, "propagate", True)
  run = build_lib.build(config)
  checks.resume(run.meta, run)
  there = copy.deepcopy(run.meta)
  there["config"]["optim"]["lr"], there["config"]["batch_size"] = 5.0, 7
  with caplog.at_level("INFO", "jepa_vl.checks"):
    checks.resume(there, run)
  assert "optim.lr: 5.0 -> " in caplog.text and "sample order is another" in caplog.text
  there["config"]["model"]["statistics"] = "imagenet"
  with pytest.raises(ValueError, match="model.statistics: imagenet there, clip here"):
    checks.resume(there, run)
  checks.resume(there, run, fixed_keys=("model.size",))
  for key in ("data_identity", "tokenizer_identity", "arrays"):
    other = copy.deepcopy(run.meta) | {key: {"x": "y"} if key == "arrays" else "another"}
    with pytest.raises(ValueError, match="another there|y there"):
      checks.resume(other, run)


def test_an_evaluation_is_not_refused_for_what_it_does_not_read(config):
  """Training's own arrays: the optimizer's, and an online probe's."""
  run = build_lib.build(config, training=False)
  trained = config.copy_and_resolve_references()
  trained.update_from_flattened_dict(
    {"probe.label": "category", "probe.classes": 2, "optim.mu_dtype": "bfloat16"}
  )
  for name in ("adamw", "muon"):
    trained.optim.name = name
    there = build_lib.build(trained, training=False).meta
    checks.evaluation(there, run)
    with pytest.raises(ValueError, match="array opt/|optim.name: muon there"):
      checks.resume(there, run)
  there["arrays"]["params/text/more"] = "float32 (3,)"
  with pytest.raises(ValueError, match=r"array params/text/more: float32 \(3,\) there, None here"):
    checks.evaluation(there, run)


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
    checks.keep_best(config)
  assert all(word in str(e.value) for word in words)
  config.keep_best, config.eval_every = "-retrieval/val/i2t/avg/R@10", config.steps - 1
  checks.keep_best(config)
  config.eval_every = config.steps  # after which nothing is saved
  with pytest.raises(ValueError, match="eval_every=4 gives none before steps=4: set eval_every"):
    checks.keep_best(config)
  config.eval_every, config.evals.retrieval.when = 1, "end"
  with pytest.raises(ValueError, match="evals.retrieval.when is 'end': set it to 'always'"):
    checks.keep_best(config)
