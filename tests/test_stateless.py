"""Row r of batch k is the same whoever computes it: any processes, workers and restarts.

Every row of 300 global batches is compared by a hash of all it holds: index, image, caption and
what it stands in for. Some hundred rows in, one record is damaged.
"""

import hashlib

import numpy as np
import pytest
from records import noise, pair, png, record, write, write_tar

from jepa_vl.data import pipeline, sources

BATCH, STEPS, SEED = 12, 300, 5
N, BAD = 1009, 500  # a prime: batches, workers and processes all straddle the ends of epochs
PARTS, WEIGHTS = (211, 97, 149), (0.5, 0.2, 0.3)  # tars, ArrayRecord, Parquet

# (processes, those that are looked at, workers, the steps at which the run is started again)
ALONE = (1, (0,), 0, ())
CASES = [
  (1, (0,), 0, (1, 83, 84, 85, 168, 253, 299)),  # epochs end within batches 84, 168 and 252
  (2, (0, 1), 0, ()),
  (4, (0, 1, 2, 3), 0, (100,)),
  (1, (0,), 1, (85,)),
  (1, (0,), 4, ()),
  (2, (1,), 1, ()),
  (4, (3,), 4, (203,)),
]
MIXED = [(2, (0, 1), 0, (7, 150)), (1, (0,), 4, ()), (4, (2,), 1, (31,))]


def small(i, **changes):
  return record(i, image=png(noise((9, 12), i)), **changes)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  rows = [small(i) for i in range(N)]
  rows[BAD] = b"\xc1 no msgpack"
  write(folder / "a.array_record", rows[:400])
  write(folder / "b.array_record", rows[400:])
  return sources.ArrayRecord(str(folder / "*.array_record"))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
  pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
  folder = tmp_path_factory.mktemp("mix")
  for name, numbers in (("a-0", range(100)), ("a-1", range(100, PARTS[0]))):
    members = [m for i in numbers for m in pair(i)]
    members[70:71] = []  # the image of a sample
    write_tar(folder / f"{name}.tar", members)
  write(folder / "b.array_record", [small(i, tags=[]) for i in range(PARTS[1])])
  rows = {"image": [png(noise((9, 12), i)) for i in range(PARTS[2])]}
  rows["caption"] = ["" if i == 33 else f"row {i}" for i in range(PARTS[2])]
  pq.write_table(pa.table(rows), folder / "c.parquet", row_group_size=20)
  patterns = {"webdataset": "*.tar", "array_record": "b.array_record", "parquet": "c.parquet"}
  opened = [sources.open_source(k, str(folder / v), "") for k, v in patterns.items()]
  return sources.Mixture(opened, list(WEIGHTS))


def run(source, tok, cfg, case):
  """{(step, row of the global batch): hash}, and the drawn examples in the order of rows."""
  processes, looked_at, cfg.workers, restarts = case
  share = BATCH // processes
  hashes, drawn = {}, []
  for process in looked_at:
    # Workers take seconds to start: with them only from the restart on.
    bounds = [*([] if restarts and cfg.workers else [0]), *restarts, STEPS]
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
      batches = pipeline.batches(
        source, tok, cfg, batch_size=BATCH, seed=SEED, start_step=start, parts=(process,),
        count=processes,
      )  # fmt: skip
      for step in range(start, stop):
        batch = next(batches)
        drawn += np.where(batch["bad"] >= 0, batch["bad"], batch["index"]).tolist()
        for row in range(share):
          content = b"".join(np.ascontiguousarray(batch[k][row]).tobytes() for k in sorted(batch))
          hashes[step, process * share + row] = hashlib.sha256(content).hexdigest()
  return hashes, drawn


@pytest.fixture(scope="module")
def known():
  """What one process without workers gives, of each source."""
  return {}


def expect_the_same(known, source, tok, cfg, case):
  key = id(source)
  if key not in known:
    known[key] = run(source, tok, cfg, ALONE)[0]
  found = run(source, tok, cfg, case)[0]
  assert len(found) >= 90 * BATCH // case[0]
  different = [at for at, value in found.items() if known[key][at] != value]
  assert not different, f"(step, row) that differ: {different[:10]}, {len(different)} in all"


@pytest.mark.parametrize("case", CASES)
def test_rows_depend_on_neither_processes_nor_workers_nor_restarts(known, source, tok, cfg, case):
  expect_the_same(known, source, tok, cfg, case)


@pytest.mark.parametrize("case", MIXED)
def test_nor_do_those_of_a_mixture(known, mixture, tok, cfg, case):
  expect_the_same(known, mixture, tok, cfg, case)


def test_every_example_comes_once_an_epoch(source, tok, cfg):
  hashes, drawn = run(source, tok, cfg, ALONE)
  assert len(drawn) == 3600 and len(set(hashes.values())) > 3590
  epochs = [drawn[e * N : (e + 1) * N] for e in range(3)]
  assert all(sorted(epoch) == list(range(N)) for epoch in epochs) and BAD in drawn
  assert len(set(drawn[3 * N :])) == 3600 - 3 * N
  assert epochs[0] != epochs[1] != epochs[2]


def test_every_part_of_a_mixture_keeps_its_epochs_and_its_weight(mixture, tok, cfg):
  """The mix is no lottery: of any 3600 rows each part has its share to within a row or two."""
  drawn = run(mixture, tok, cfg, ALONE)[1]
  first = 0
  for size, weight in zip(PARTS, WEIGHTS, strict=True):
    own = [i - first for i in drawn if first <= i < first + size]
    assert abs(len(own) - weight * len(drawn)) <= 2
    epochs = [own[start : start + size] for start in range(0, len(own), size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs[:-1])
    assert len(epochs) > 4 and len(set(epochs[-1])) == len(epochs[-1])
    first += size
