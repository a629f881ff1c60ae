"""Batches are a function of (seed, step); bad records are replaced or named, never dropped."""

import os

import numpy as np
import pytest
from records import noise, pair, png, record, write, write_tar

from jepa_vl.data import pipeline, sources, transforms
from jepa_vl.data.counters import DataCounters
from jepa_vl.data.sources import DamagedRecord

N, BATCH, SEED = 23, 8, 5  # N is no multiple of BATCH: epochs end within batches


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  write(folder / "a.array_record", [record(i) for i in range(10)])
  write(folder / "b.array_record", [record(i) for i in range(10, N)])
  return sources.open_source("array_record", str(folder / "*.array_record"), "")


def take(source, tok, cfg, steps, *, start=0, batch=BATCH, seed=SEED, **process):
  batches = pipeline.batches(
    source, tok, cfg, batch_size=batch, seed=seed, start_step=start, **process
  )
  return [next(batches) for _ in range(steps)]


def rows(batches):
  """One dict of all the batches' rows."""
  return {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}


def assert_equal(found, expected):
  assert found.keys() == expected.keys()
  for k in found:
    np.testing.assert_array_equal(found[k], expected[k], err_msg=k)


# --- order


def test_shapes_and_types(source, tok, cfg):
  (batch,) = take(source, tok, cfg, 1)
  shapes = {k: (v.shape, v.dtype.name) for k, v in batch.items()}
  assert shapes == {
    "image": ((BATCH, 16, 16, 3), "uint8"),
    "text": ((BATCH, 12), "int32"),
    "mask": ((BATCH, 12), "bool"),
    "index": ((BATCH,), "int64"),
    "bad": ((BATCH,), "int64"),
    "reason": ((BATCH,), "int8"),
    "truncated": ((BATCH,), "bool"),
  }


@pytest.mark.parametrize("start", [1, 2, 7])
def test_a_batch_does_not_depend_on_where_the_run_started(source, tok, cfg, start):
  whole = take(source, tok, cfg, 9)
  assert_equal(rows(take(source, tok, cfg, 9 - start, start=start)), rows(whole[start:]))


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_rows_of_one_global_batch(source, tok, cfg, processes):
  steps = 7  # 2.4 epochs
  parts = [
    take(source, tok, cfg, steps, parts=(p,), count=processes) for p in range(processes)
  ]
  joined = [rows(shares) for shares in zip(*parts, strict=True)]
  assert_equal(rows(joined), rows(take(source, tok, cfg, steps)))


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_do_not_change_the_batches(source, tok, cfg, workers):
  alone = rows(take(source, tok, cfg, 5, start=2))
  cfg.workers = workers
  assert_equal(rows(take(source, tok, cfg, 5, start=2)), alone)


@pytest.mark.parametrize(("start", "workers"), [(0, 0), (2, 0), (4, 0), (1, 2)])
def test_the_first_steps_have_smaller_images_and_nothing_else(source, tok, cfg, start, workers):
  """The batch of a step is the one of a run at its size, wherever the run began."""
  full = take(source, tok, cfg, 5)
  cfg.image_size = 8
  small = take(source, tok, cfg, 3)
  cfg.image_size, cfg.low_res, cfg.workers = 16, (8, 3), workers
  found = take(source, tok, cfg, 5 - start, start=start)
  for batch, expected in zip(found, [*small, *full[3:]][start:], strict=True):
    assert_equal(batch, expected)


def test_batch_must_divide_into_parts(source, tok, cfg):
  with pytest.raises(ValueError, match="batch_size=8 is not a multiple of the 3 parts of its rows"):
    take(source, tok, cfg, 1, count=3)


def test_unknown_augmentation_is_refused(source, tok, cfg):
  cfg.augment = "strong"
  with pytest.raises(ValueError, match="data.augment must be one of standard, resize, dino, got"):
    take(source, tok, cfg, 1)


def test_every_epoch_is_another_permutation(source, tok, cfg):
  index = rows(take(source, tok, cfg, 9))["index"][: 3 * N].reshape(3, N)
  for epoch in index:
    assert sorted(epoch) == list(range(N))
  assert len({tuple(epoch) for epoch in index}) == 3
  assert tuple(index[0]) != tuple(range(N))


def test_the_seed_decides_order_and_augmentation(source, tok, cfg):
  a, b = (rows(take(source, tok, cfg, 3, seed=seed)) for seed in (SEED, SEED + 1))
  assert a["index"].tolist() != b["index"].tolist()
  images = [dict(zip(x["index"].tolist(), x["image"], strict=False)) for x in (a, b)]
  differing = sum((images[0][i] != images[1][i]).any() for i in range(N))
  assert differing > N / 2


def test_augmentation_is_keyed_by_seed_epoch_and_example_alone(source, tok, cfg):
  """Whatever the batch size and the row, equal triples give equal rows and epochs differ."""

  def by_epoch(batch):
    all_rows = rows(take(source, tok, cfg, 2 * N // batch + 1, batch=batch))
    return {
      (p // N, int(all_rows["index"][p])): (all_rows["image"][p], all_rows["text"][p])
      for p in range(2 * N)
    }

  a, b = by_epoch(8), by_epoch(3)
  assert a.keys() == b.keys() and len(a) == 2 * N
  for key in a:
    np.testing.assert_array_equal(a[key][0], b[key][0])
    np.testing.assert_array_equal(a[key][1], b[key][1])
  assert all((a[0, i][0] != a[1, i][0]).any() for i in range(N))
  assert sum((a[0, i][1] != a[1, i][1]).any() for i in range(N)) > N / 4


# --- bad records


BAD = {
  4: b"\xc1 no msgpack",
  11: record(11, image=b"no image"),
  12: record(12, image=b""),
  13: {"image": png(noise((4, 4))), "text": "no caption"},
  14: record(14, caption=None),
  15: record(15, tags=[1]),
  22: [1, 2, 3],
}
REASON = {
  **dict.fromkeys((4, 15, 22), "malformed"), 11: "image_undecodable", 12: "image_undecodable",
  13: "malformed", 14: "no_caption",
}  # fmt: skip
STANDS_IN = {4: 5, **dict.fromkeys(range(11, 16), 16), 22: 0}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
  path = tmp_path_factory.mktemp("bad") / "x.array_record"
  return sources.ArrayRecord(write(path, [BAD.get(i, record(i)) for i in range(N)]))


def test_a_bad_record_is_replaced_by_the_next_readable_and_named(source, damaged, tok, cfg):
  good, found = rows(take(source, tok, cfg, 6)), rows(take(damaged, tok, cfg, 6))
  is_bad = np.isin(good["index"], list(BAD))
  assert is_bad.sum() >= len(BAD)
  expected = [STANDS_IN.get(i, i) for i in good["index"].tolist()]
  assert found["index"].tolist() == expected
  assert found["bad"].tolist() == np.where(is_bad, good["index"], -1).tolist()
  reasons = [REASON.get(i) for i in good["index"].tolist()]
  assert [transforms.REASONS[r] if r >= 0 else None for r in found["reason"]] == reasons
  for k in ("image", "text", "mask"):
    np.testing.assert_array_equal(found[k][~is_bad], good[k][~is_bad])

  # Keyed by the example: what stands in is the row that the example gives in that epoch anyway.
  seen = {}
  for p, index in enumerate(found["index"].tolist()):
    first = seen.setdefault((p // N, index), p)
    np.testing.assert_array_equal(found["image"][p], found["image"][first])
  assert len(seen) < len(found["index"])


@pytest.mark.parametrize("index", BAD)
def test_a_bad_record_is_damaged_not_a_crash(damaged, index):
  with pytest.raises(DamagedRecord):
    transforms.decode(damaged[index]["image"])


def test_evaluation_leaves_bad_records_out_and_says_which(damaged):
  records, images, left_out = pipeline.evaluation_rows(
    damaged, range(N), image_size=16, resize_ratio=1.0
  )
  assert left_out == list(BAD)
  assert [r["caption"] for r in records] == [f"number {i}" for i in range(N) if i not in BAD]
  assert all("image" not in r for r in records)
  assert np.stack(images).shape == (N - len(BAD), 16, 16, 3)
  np.testing.assert_array_equal(images[0], transforms.centre_crop(noise((20, 24), 0), 16, 1.0))


def test_only_bad_records_is_an_error(tmp_path, tok, cfg):
  source = sources.ArrayRecord(write(tmp_path / "x", [b"no record"] * 3))
  with pytest.raises(ValueError, match="3 records in a row from . cannot be used .*data.path"):
    take(source, tok, cfg, 1)


def cut(path):
  os.truncate(path, 100)


@pytest.fixture
def shards(tmp_path):
  """Many files of a few records: 40 tars, 10 of each other format; and the mixture of them."""
  pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
  for i in range(40):
    write_tar(tmp_path / f"{i:02d}.tar", [*pair(i), *pair(i + 100)])
  for i in range(10):
    write(tmp_path / f"{i}.array_record", [record(n, tags=[]) for n in range(4)])
    rows = {"image": [png(noise((9, 12), n)) for n in range(4)], "caption": list("abcd")}
    pq.write_table(pa.table(rows), tmp_path / f"{i}.parquet", row_group_size=2)
    (tmp_path / f"{i}.png").write_bytes(png(noise((9, 12), i)))
    lines = "".join(f"{i}.png\trow {n}\n" for n in range(4))
    (tmp_path / f"{i}.tsv").write_text("path\ttext\n" + lines)
  formats = {"webdataset": "tar", "array_record": "array_record", "parquet": "parquet"}
  formats["table"] = "tsv"
  return tmp_path, [
    sources.open_source(k, str(tmp_path / f"*.{v}"), "") for k, v in formats.items()
  ]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("vanish", [os.remove, cut])
def test_shards_that_vanish_in_the_run_are_replaced_and_end_it_by_the_budget(
  shards, tok, cfg, workers, vanish
):
  folder, opened = shards
  cfg.workers = workers
  source = sources.Mixture(opened, [0.25] * 4)
  batches = pipeline.batches(source, tok, cfg, batch_size=2, seed=SEED, start_step=0)
  counters = DataCounters(source, 0.01)
  counters.add(next(batches))
  # All tars, and half of the files of the other formats. What a process holds open it still reads
  # when it was removed; of ArrayRecord that may be all.
  kinds = ("array_record", "parquet", "tsv")
  for name in [*folder.glob("*.tar"), *(f"{i}.{kind}" for i in range(5) for kind in kinds)]:
    vanish(folder / name)
  seen = [next(batches) for _ in range(100)]
  found = rows(seen)
  bad = found["bad"][found["bad"] >= 0]
  per_part = np.histogram(bad, [0, 80, 120, 160, 200])[0]
  assert per_part[0] > 10 and per_part[2:].all()
  assert all(i < 80 or i % 40 < 20 for i in bad.tolist())
  assert not np.isin(found["index"][found["bad"] >= 0], bad).any()
  reasons = {transforms.REASONS[r] for r in found["reason"].tolist() if r >= 0}
  assert reasons == {"unreadable"}
  with pytest.raises(ValueError, match=r"\d+ unreadable \(record .*\.(tar|tsv|parquet) cannot be"):
    for batch in seen:
      counters.add(batch)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_whose_data_is_all_gone_ends_in_words(shards, tok, cfg, workers):
  folder, opened = shards
  cfg.workers = workers
  batches = pipeline.batches(opened[0], tok, cfg, batch_size=2, seed=SEED, start_step=0)
  next(batches)
  for path in folder.glob("*.tar"):
    cut(path)
  with pytest.raises(Exception, match="80 records in a row from .* cannot be used .last: .*tar"):
    for _ in range(50):
      next(batches)


def test_long_captions_are_flagged_in_the_batch(tmp_path, tok, cfg):
  long = " ".join(["grinning face"] * 20)
  captions = {i: long if i % 3 == 0 else "short" for i in range(8)}
  records = [record(i, caption=c, tags=[]) for i, c in captions.items()]
  (batch,) = take(sources.ArrayRecord(write(tmp_path / "x", records)), tok, cfg, 1)
  assert batch["truncated"].tolist() == [i % 3 == 0 for i in batch["index"].tolist()]
