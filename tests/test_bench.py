"""The pipeline's own figures: stages add up, and what a chip needs follows from them."""

import pytest

from benchmarks import data, packing, step
from jepa_vl.build import build
from jepa_vl.data import bench


@pytest.mark.parametrize("workers", [0, 2])
def test_stages_add_up_to_the_whole(config, monkeypatch, capsys, workers):
  monkeypatch.setattr(bench, "_SECONDS", 0.5)
  config.mesh.data, config.data.workers = -1, workers
  assert bench.report(build(config)) == 0
  lines = capsys.readouterr().out.splitlines()[1:]
  stages, (whole, *rest) = lines[1:5], lines[5:]
  times = [float(line[18:32]) for line in stages]
  assert all(t > 0 for t in times[:3])
  assert sum(times) == pytest.approx(float(whole[18:32]), rel=0.05)
  assert ("2 workers" in rest[0]) == bool(workers)


def test_a_chip_needs_its_flops_over_a_cores_examples():
  found = {"core": 100.0, "stages": {"read": 0.01}, "workers": None}
  lines = bench.table(found, 0, 1e9, (("a chip", 1e12),)).splitlines()
  assert lines[-1].split() == ["a", "chip", "400", "-", "600", "4.0", "-", "6.0"]
  found["workers"] = 160.0  # of two processes, on one or two cores
  assert float(bench.table(found, 2, 1e9, (("x", 1e12),)).split()[-3]) in (5.0, 2.5)


def test_the_benchmarks_have_the_settings_that_the_pipeline_asks_for(tmp_path, monkeypatch):
  for name, value in (("SAMPLES", 16), ("PICTURES", 2), ("SHARDS", 2), ("BATCH", 4)):
    monkeypatch.setattr(data, name, value)
  data.write_tars(tmp_path, 48, 64)
  assert next(data.ours(str(tmp_path), 0))["image"].shape == (4, 224, 224, 3)
  packing.packing.pack(packing.captions("CC3M", 64, 77)[0], packing.settings(32, 16))
  assert step.make_config("nano", 384, 32).objective.group_size == 128  # of 256; it divides 384
