"""Bad records are counted by reason, said in a few lines, and end a run where they are too many."""

import numpy as np
import pytest

from jepa_vl.data.counters import DataCounters
from jepa_vl.data.transforms import REASONS, DamagedRecord


class Broken:
  """Every record is bad; its message names the record."""

  def __init__(self):
    self.asked = []

  def __getitem__(self, index):
    self.asked.append(index)
    raise DamagedRecord(f"message {index}", "unreadable")


def rows(bad, of):
  """A batch of `of` rows, the first of which stand in for `bad`: {index: reason}."""
  fill = lambda values: np.array([*values, *[-1] * (of - len(bad))])
  return {
    "bad": fill(bad), "reason": fill([REASONS.index(reason) for reason in bad.values()]),
    "truncated": np.zeros(of, bool),
  }  # fmt: skip


def test_bad_records_are_counted_by_reason():
  counters = DataCounters(Broken(), 0.5)
  for i in range(3):
    counters.add(rows({i: "no_caption", 50 + i: "unreadable", 90 + i: "no_caption"}, of=20))
  counters.add(rows({}, of=20))
  assert counters.read() == {
    "data/bad_records": 9, "data/bad/no_caption": 6, "data/bad/unreadable": 3,
    "data/truncated_captions": 0,
  }  # fmt: skip


def test_thousands_of_bad_records_are_a_few_lines_and_reads(caplog):
  source = Broken()
  counters = DataCounters(source, 1.0)
  for i in range(0, 20_000, 10):
    counters.add(rows({n: REASONS[n % 2] for n in range(i, i + 10)}, of=10))
  assert source.asked == [0, 1, 2, 3, 4, 5]
  assert len(caplog.messages) == 6 + 4  # at 10, 100, 1000, 10000
  assert "record 0 cannot be used" in caplog.messages[0] and "message 0" in caplog.messages[0]
  assert caplog.messages[-1].endswith("so far: 5000 unreadable, 5000 malformed")


def test_a_shard_that_vanishes_late_ends_the_run():
  """Two in a hundred from row 1,000,000 on: within 100,000 rows, whatever was good before."""
  counters = DataCounters(Broken(), 0.01)
  for i in range(1000):
    counters.add(rows({i: "duplicate_key"} if i < 100 else {}, of=1000))
  with pytest.raises(ValueError) as e:
    for batch in range(100):
      bad = {100 * batch + i: ("unreadable", "no_image")[i % 2] for i in range(20)}
      counters.add(rows(bad, of=1000))
  assert batch == 54  # three standard deviations of 1000 more
  said = str(e.value)
  assert said.startswith("1100 of the latest 100000 training records") and "=0.01" in said
  assert "550 unreadable (record 0: message 0, record 2: " in said and "550 no_image (rec" in said
  assert "duplicate_key" not in said


def test_bad_records_within_the_budget_never_end_the_run():
  """Nine in 1000 for ever, as chance has it; and ten of however few."""
  for seed in range(20):
    counters, rng = DataCounters(Broken(), 0.01), np.random.default_rng(seed)
    for i in range(600):
      counters.add(rows({1000 * i + j: "unreadable" for j in range(rng.binomial(256, 0.009))}, 256))
  counters = DataCounters(Broken(), 0.01)
  for i in range(10):
    counters.add(rows({i: "unreadable"}, of=2))
  with pytest.raises(ValueError, match="11 of the latest 22"):
    counters.add(rows({10: "unreadable"}, of=2))
