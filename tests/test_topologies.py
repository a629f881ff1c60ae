"""Names of chips that are not here, and what is said of wrong ones."""

import pytest

from jepa_vl import chips
from jepa_vl.aot import topologies


@pytest.mark.parametrize(("name", "parsed"), [
  ("v5e:16x16", ("v5e", "16x16", 1)),
  ("v5e-256", ("v5e", "16x16", 1)),
  ("v5litepod-16", ("v5e", "4x4", 1)),
  ("v6e-64", ("v6e", "8x8", 1)),
  ("v5p-64", ("v5p", "2x4x4", 1)),  # Google counts TensorCores: 32 chips
  ("v4-8", ("v4", "2x2x1", 1)),
  ("v5p:4x4x4", ("v5p", "4x4x4", 1)),
  ("tpu7x:2x2x1", ("tpu7x", "2x2x1", 1)),
  ("2*v5e:16x16", ("v5e", "16x16", 2)),
  ("4*v6e-256", ("v6e", "16x16", 4)),
  ("h100:8", ("h100", "1x8", 1)),
  ("h200:4x8", ("h200", "4x8", 1)),
  ("a100-40:8", ("a100-40", "1x8", 1)),
])  # fmt: skip
def test_names(name, parsed):
  assert topologies._parse(name) == parsed


@pytest.mark.parametrize(("name", "words"), [
  ("v9:2x2", "names look like v5e:16x16"),
  ("v5e:4", "names look like"),
  ("v5p:4x4", "names look like"),
  ("h100:2x2x2", "names look like"),
  ("2*h100:8", "names look like"),
  ("0*v5e:4x4", "names look like"),
  ("tpu7x-8", "names look like"),
  ("", "names look like"),
  ("v5e-17", "N = 1, 4, 8, 16, 32, 64, 128, 256; other sizes as a grid of chips, .* v5e:4x4"),
])  # fmt: skip
def test_a_wrong_name_is_told_the_known_ones(name, words):
  with pytest.raises(ValueError, match=words):
    topologies.get(name)


@pytest.mark.parametrize(("name", "command"), [
  ("v5e-16", r'pip install "jax\[tpu\]=='),
  ("h100:8", "pip install jax-cuda12-plugin==.* nvidia-cuda-nvcc-cu12"),
])  # fmt: skip
def test_a_missing_compiler_is_told_its_command(name, command, monkeypatch):
  monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda module: None)
  with pytest.raises(ValueError, match=f"--topology={name} needs .*{command}"):
    topologies.get(name)


def test_every_generation_has_its_published_figures():
  """What the roofline divides by, for each name that can be compiled for."""
  kinds = {
    "v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"
  }  # fmt: skip
  kinds |= {name: described for name, (described, _) in topologies._GPUS.items()}
  assert set(kinds) == set(topologies._TPUS) | set(topologies._GPUS)
  for kind in kinds.values():
    chip = chips.find(kind)
    assert chip.flops and chip.hbm and chip.hbm_bandwidth and chip.link and chip.source
    assert chip.flops / chip.hbm_bandwidth > 100  # FLOPs per byte, of all such chips
    assert chip.link < chip.hbm_bandwidth
    assert chip.network is None or chip.network < chip.link
  assert chips.find("cpu") is None


def test_a_gpu_leaves_a_quarter_to_others():
  assert chips.find("NVIDIA H100 80GB HBM3").usable == 60e9
  assert chips.find("TPU v5 lite").usable == 16 * 2**30
