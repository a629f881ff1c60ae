"""A mixture keeps each source's epochs and the weights; batches are a function of the step."""

import os
import pickle
import sys

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags
from records import pair, record, stands_in, write, write_tar

from jepa_vl.data import pipeline, sources
from jepa_vl.data.transforms import DamagedRecord

SIZES, WEIGHTS = (10, 7, 30), (0.5, 0.2, 0.3)


@pytest.fixture
def mix(tmp_path, cfg):
  """Tars of 10, ArrayRecord of 7 and tars of 30, as `data.mix`."""
  write_tar(tmp_path / "a-0.tar", [m for i in range(4) for m in pair(i)])
  write_tar(tmp_path / "a-1.tar", [m for i in range(4, 10) for m in pair(i)])
  write(tmp_path / "b.array_record", [record(i) for i in range(10, 17)])
  write_tar(tmp_path / "c.tar", [m for i in range(17, 47) for m in pair(i)])
  paths = (tmp_path / "a-{split}.tar", tmp_path / "b.array_record", tmp_path / "c.tar")
  names = ("webdataset", "array_record", "webdataset")
  cfg.update({"source": "array_record", "path": "", "split": "*"})
  cfg.mix = tuple(zip(names, map(str, paths), WEIGHTS, strict=True))
  return cfg


def test_every_source_keeps_its_epochs_and_its_share(mix):
  source = sources.from_config(mix)
  assert [source[i]["caption"] for i in (0, 9, 10, 46)] == [f"number {i}" for i in (0, 9, 10, 46)]
  order = pipeline.Order(source, 3)
  drawn = [order[p] for p in range(2000)]
  starts = np.cumsum([0, *SIZES])
  for part, (size, weight) in enumerate(zip(SIZES, WEIGHTS, strict=True)):
    own = [(e, i) for e, i in drawn if starts[part] <= i < starts[part + 1]]
    assert abs(len(own) - 2000 * weight) < 5
    assert [e for e, _ in own] == [n // size for n in range(len(own))]
    for epoch in range(len(own) // size):
      examples = [i for _, i in own[epoch * size : (epoch + 1) * size]]
      assert sorted(examples) == list(range(starts[part], starts[part + 1]))
  # Of any stretch, each source fills its share.
  for p in range(0, 1900, 100):
    assert abs(sum(i < 10 for _, i in drawn[p : p + 100]) - 50) <= 2
  assert order[1234] == pipeline.Order(source, 3)[1234]
  assert drawn[:50] != [pipeline.Order(source, 4)[p] for p in range(50)]


def test_the_order_of_a_single_source_is_what_it_was():
  """Checkpoints of earlier versions go on with it."""
  order = pipeline.Order(range(11), 5)
  assert [order[p] for p in range(11)] == [
    (0, i) for i in (3, 9, 10, 8, 1, 0, 6, 5, 7, 2, 4)]  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_depend_on_neither_workers_nor_the_start(mix, tok, workers):
  source = sources.from_config(mix)

  def take(start, steps, workers):
    mix.workers = workers
    batches = pipeline.batches(source, tok, mix, batch_size=8, seed=5, start_step=start)
    rows = [next(batches) for _ in range(steps)]
    return {k: np.concatenate([r[k] for r in rows]) for k in ("index", "image", "text")}

  a, b = take(0, 7, 0), take(2, 5, workers)
  for k in a:
    np.testing.assert_array_equal(a[k][16:], b[k])


def test_damage_in_a_part_is_stepped_over_and_named(mix, tmp_path):
  source = sources.from_config(mix)
  os.remove(tmp_path / "a-1.tar")
  with pytest.raises(DamagedRecord, match=r"data.mix\[0\]: .*a-1.tar") as e:
    source[5]
  assert e.value.resume == 10 and stands_in(source, 5) == 10
  os.remove(tmp_path / "c.tar")
  source = pickle.loads(pickle.dumps(source))  # which has no tar open
  with pytest.raises(DamagedRecord, match=r"data.mix\[2\]: .*c.tar") as e:
    source[20]
  assert e.value.resume == 47 and stands_in(source, 20) == 0


def test_identity_covers_the_parts_and_their_weights(mix):
  first = sources.from_config(mix).identity
  assert sources.from_config(mix).identity == first and first.startswith("0.5 of 10 records, ")
  mix.mix = (*mix.mix[:2], (*mix.mix[2][:2], 0.31))
  assert sources.from_config(mix).identity != first
  mix.mix = mix.mix[:2]
  assert sources.from_config(mix).identity != first


@pytest.mark.parametrize("part", [("emoji", ""), ("emoji", "", 0), ("emoji", "", "1")])
def test_a_part_that_is_none_is_refused(cfg, part):
  cfg.path, cfg.mix = "", (part,)
  with pytest.raises(ValueError, match="data.mix must be a tuple of .source, path, weight."):
    sources.from_config(cfg)
  cfg.path = "/data"
  with pytest.raises(ValueError, match="data.mix and data.path"):
    sources.from_config(cfg)


def test_a_mix_can_be_given_on_the_command_line(monkeypatch):
  mix = (("emoji", "", 1), ("webdataset", "/a/{00..10}.tar", 0.5))
  argv = ["x", "--config=configs/tiny.py", f"--config.data.mix={mix!r}"]
  monkeypatch.setattr(sys, "argv", argv)  # where the overrides are looked for
  values = flags.FlagValues()
  holder = config_flags.DEFINE_config_file("config", flag_values=values)
  values(argv)
  assert holder.value.data.mix == mix
