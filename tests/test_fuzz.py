"""5,000 damaged inputs: no crash, no hang, no good record lost, and errors only in words.

What each kind damages and what it insists on is in fuzz.py, which runs in a process of its own.
"""

import os
import pathlib
import re
import subprocess
import sys

import fuzz
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

COUNTS = {
  "image": 2000, "caption": 500, "packed": 700, "tar": 1000, "array_record": 300, "parquet": 250,
  "table": 250,
}  # fmt: skip


def run(kind, first, last, folder):
  """How it went with the inputs first .. last - 1: "" or which one failed and how."""
  done = subprocess.run(
    [sys.executable, fuzz.__file__, kind, str(first), str(last), str(folder)],
    env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    capture_output=True, text=True, errors="replace",
  )  # fmt: skip
  tried = done.stdout.splitlines()
  if done.returncode:
    return f"{tried[-1:]} ended with {done.returncode}:\n{done.stderr[-3000:]}"
  assert tried == [f"{kind} {n}" for n in range(first, last)]
  return ""


def test_there_are_five_thousand():
  assert sum(COUNTS.values()) == 5000 and COUNTS.keys() == fuzz.KINDS.keys()


@pytest.mark.parametrize("kind", COUNTS)
def test_damage_costs_no_more_than_what_it_hit(kind, tmp_path):
  if kind == "parquet":
    pytest.importorskip("pyarrow")
  failed = run(kind, 0, COUNTS[kind], tmp_path)
  assert not failed, failed


@pytest.mark.slow
@pytest.mark.parametrize("kind", COUNTS)
def test_nor_do_twenty_thousand_more(kind, tmp_path):
  failed = run(kind, COUNTS[kind], 5 * COUNTS[kind], tmp_path)
  assert not failed, failed


@pytest.mark.parametrize(
  ("does", "said"),
  [
    ("os.kill(os.getpid(), 11)", r"\['image 7'\] ended with -11:"),
    ("time.sleep(60)", r"\['image 7'\] ended with 1:(.|\n)*Timeout"),
    ("1 / 0", r"\['image 7'\] ended with 1:(.|\n)*ZeroDivisionError"),
  ],
)
def test_a_crash_a_hang_and_an_error_name_their_input(tmp_path, monkeypatch, does, said):
  """A copy of fuzz.py whose images do so."""
  text = pathlib.Path(fuzz.__file__).read_text()
  text = text.replace("TIME_LIMIT = 30", "TIME_LIMIT = 1; import time")
  text = re.sub(r"(def image\(.*\n)", rf"\1  number < 7 or {does}\n", text, count=1)
  (tmp_path / "fuzz.py").write_text(text)
  monkeypatch.setattr(fuzz, "__file__", str(tmp_path / "fuzz.py"))
  assert re.search(said, run("image", 5, 10, tmp_path))
