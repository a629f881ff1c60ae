"""What the pipeline could not use: counted by reason, said, and too much of it."""

import collections
import logging

from jepa_vl.data import pipeline
from jepa_vl.data.transforms import REASONS

log = logging.getLogger(__name__)

_WINDOW = 100_000  # rows (in whole batches) of which data.max_bad_fraction is a share
_EXAMPLES = 3  # records of each reason that the log says in full


class DataCounters:
  """Counts what the pipeline replaced or cut, and ends the run when it is too much.

  Too much is a share of the latest rows, not of all: a shard that vanishes late ends the run too.
  """

  def __init__(self, source, max_bad_fraction):
    self._source, self._max = source, max_bad_fraction
    self._bad, self._truncated = collections.Counter(), 0  # bad ones by reason
    self._window = collections.deque()  # (rows, reasons of the bad ones) of the latest batches
    self._rows, self._recent = 0, collections.Counter()  # their sums
    self._examples = collections.defaultdict(dict)  # reason -> {index: message}, _EXAMPLES at most

  def add(self, batch):
    """Raises ValueError when more than data.max_bad_fraction of the window's rows were bad."""
    replaced = batch["bad"] >= 0
    reasons = [REASONS[code] for code in batch["reason"][replaced].tolist()]
    self._truncated += int(batch["truncated"].sum())
    self._explain(batch["bad"][replaced].tolist(), reasons)
    self._count(reasons)
    self._slide(len(replaced), tuple(reasons))
    recent, allowed = self._recent.total(), self._max * self._rows
    # Three standard deviations more than allowed: chance does not end a run.
    if recent > max(allowed + 3 * allowed**0.5, 10):
      raise ValueError(
        f"{recent} of the latest {self._rows} training records could not be used, more than "
        f"data.max_bad_fraction={self._max} allows: {self._describe()}. Repair the data, or raise "
        "the key"
      )

  def _explain(self, indices, reasons):
    # Only the first few of each reason: asking costs a read in this process, and thousands of lines
    # would hide the rest of the log.
    for index, reason in zip(indices, reasons, strict=True):
      known = self._examples[reason]
      if index not in known and len(known) < _EXAMPLES:
        known[index] = pipeline.why_bad(self._source, index)
        log.warning(
          "data: record %d cannot be used; the next readable one stands in (%s)",
          index, known[index],
        )  # fmt: skip

  def _count(self, reasons):
    before = self._bad.total()
    self._bad.update(reasons)
    if len(str(self._bad.total())) > len(str(before)):  # at 10, 100, 1000, ...
      counts = ", ".join(f"{count} {reason}" for reason, count in self._bad.most_common())
      log.warning("data: records that could not be used, so far: %s", counts)

  def _slide(self, rows, reasons):
    self._window.append((rows, reasons))
    self._rows += rows
    self._recent.update(reasons)
    while self._rows - self._window[0][0] >= _WINDOW:
      rows, reasons = self._window.popleft()
      self._rows -= rows
      self._recent.subtract(reasons)

  def _describe(self):
    return "; ".join(
      f"{count} {reason} (record "
      + ", record ".join(f"{i}: {why}" for i, why in self._examples[reason].items()) + ")"
      for reason, count in self._recent.most_common() if count
    )  # fmt: skip

  def read(self):
    """Counts since the run began: all bad records, those of each reason that occurred, cut ones."""
    by_reason = {f"data/bad/{reason}": count for reason, count in self._bad.items()}
    return {
      "data/bad_records": self._bad.total(), **by_reason, "data/truncated_captions": self._truncated
    }  # fmt: skip
