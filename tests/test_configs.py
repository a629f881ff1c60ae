"""The configurations: what each changes of its base, and that a preset's name is checked."""

import importlib

import pytest

from configs import base, presets, vit_b
from jepa_vl import checks, objectives

NAMES = ["tiny", "vit_s", "vit_b", "vit_l", "vit_b_plus", "clip_b", "siglip_b"]


def changed(config, reference):
  config, reference = (checks.flat(c.to_dict()) for c in (config, reference))
  assert set(config) == set(reference)
  return {k for k in config if config[k] != reference[k]}


@pytest.mark.parametrize("name", NAMES)
def test_every_config_has_the_keys_of_base(name):
  config = importlib.import_module(f"configs.{name}").get_config()
  config.evals = base.get_config().evals
  changed(config, base.get_config())
  objectives.from_config(config.objective)


@pytest.mark.parametrize("preset", ["clip", "siglip"])
def test_a_baseline_changes_the_objective_and_drops_the_predictors(preset):
  """The matched comparison: nothing of towers, data or optimisation differs."""
  config = importlib.import_module(f"configs.{preset}_b").get_config()
  parts = {key.partition(".")[0] for key in changed(config, vit_b.get_config())}
  assert parts == {"objective", "model"}
  assert {k for k in changed(config, vit_b.get_config()) if k.startswith("model.")} == {
    "model.predictor_depth"
  }
  assert objectives.learned_scalars(config.objective)["log_scale"] == pytest.approx(
    {"clip": 2.6593, "siglip": 2.3026}[preset], abs=1e-4
  )


def test_presets_are_applied_in_order():
  config = vit_b.get_config("release1,plus")
  assert config.objective.name == "levljepa_plus" and config.text.readout == "last"
  assert config.data.augment == "dino"  # plus came last
  with pytest.raises(ValueError, match="no preset 'clop' .*; known: plus, clip, siglip, release1"):
    presets.apply(base.get_config(), "clop")
