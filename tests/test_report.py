"""The report is one self-contained, escaped page that any state of a run can be written to."""

import json
import re

import numpy as np
import pytest

from jepa_vl.evals import report

NASTY = '<script>alert("🦙 & co")</script>'
EMPTY = {"config": {}, "results": [], "notes": {}}
EMPTY |= dict.fromkeys(("spectra", "retrieval", "patches"))


def row(evaluation, split, metric, value, **floors):
  names = ("untrained", "random", "majority", "raw_pixels")
  return {"evaluation": evaluation, "split": split, "metric": metric, "value": value} | {
    name: floors.get(name) for name in names
  }


def read(*args, **kwargs):
  with open(report.write(*args, **kwargs), encoding="utf-8") as f:
    return f.read()


def log(workdir, steps):
  with open(workdir / "metrics.jsonl", "w") as f:
    for step in steps:
      record = {"step": step, "loss": 1 / step, "cos/matched": float("nan"), "mfu": None}
      f.write(json.dumps(record) + "\n")
  with open(workdir / "evals.jsonl", "w") as f:
    for step in steps:
      metrics = {"C/i2t/avg/R@10": 0.1 * step, "C/i2t/avg/R@10@random": 0.1}
      metrics["C/i2t/avg/R@5"] = 0.05 * step
      f.write(json.dumps({"step": step, "name": "retrieval", "metrics": metrics}) + "\n")


@pytest.fixture
def retrieval():
  """Image i shows caption i; image 0 finds it third, images 1 and 2 first."""
  similarity = np.array([[0.1, 0.9, 0.5], [0.0, 0.8, 0.2], [0.1, 0.0, 0.7]])
  return {
    "split": "C",
    "images": np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8),
    "captions": ["llama", NASTY, "日本語 \ud800"],
    "similarity": similarity,
    "relevant": np.eye(3, dtype=bool),
  }


def test_whole_page_is_self_contained_and_escaped(tmp_path, retrieval):
  log(tmp_path, (1, 2, 3))
  rng = np.random.default_rng(0)
  page = read(
    tmp_path,
    config={"model": {"size": NASTY}, "seed": 0},
    results=[row("probe", NASTY, "cls/group", 0.5, majority=0.25)],
    spectra={"image": np.array([2.0, 1.0, 0.0]), "<b>": np.zeros(3)},
    retrieval=retrieval,
    patches={"images": retrieval["images"], "features": rng.normal(size=(3, 2, 2, 5))},
    notes={"C": NASTY},
  )
  assert "<script" not in page
  assert "&lt;script&gt;" in page
  assert "日本語" in page
  assert all(s.startswith("data:") for s in re.findall(r'(?:src|href)="([^"]*)"', page))
  assert not re.search(r"https?://|@import|url\(", page)
  headings = re.findall(r"<h2>(.*?)</h2>", page)
  assert headings == [
    "Configuration",
    "Results",
    "Training",
    "Evaluations over training",
    "Spectra",
    "Retrieval on C",
    "Patch features",
  ]


def test_without_logs_and_sections(tmp_path):
  page = read(tmp_path, **EMPTY)
  assert "No evaluation has been run." in page
  assert "Too few logged steps" in page
  assert "Too few evaluations during training" in page
  assert "<img" not in page and "Spectra" not in page


def test_one_step_has_figures_but_no_curves(tmp_path):
  log(tmp_path, (1,))
  page = read(tmp_path, **EMPTY)
  assert "<dt>last logged step</dt><dd>1</dd>" in page
  assert "<dt>loss</dt><dd>1.000</dd>" in page
  assert "Too few logged steps for curves (1)" in page
  assert "<img" not in page


def test_curves_leave_out_metrics_without_a_value(tmp_path):
  log(tmp_path, (1, 2))
  page = read(tmp_path, **EMPTY)
  assert re.findall(r'alt="(.*?)"', page) == ["Loss", "retrieval: i2t/avg/R@10"]


def test_results_are_marked_against_all_floors(tmp_path):
  results = [
    row("retrieval", "C", "i2t/avg/R@10", 0.25, untrained=0.04, random=0.05),
    row("retrieval", "C", "i2t/embed/R@10", 0.111, random=0.05),
    row("probe", "C", "cls/group", 0.4, untrained=0.3, majority=0.2, raw_pixels=0.4),
    row("rank", "C", "img", 50.0),
  ]
  page = read(tmp_path, **EMPTY | {"results": results})
  assert "<b>1 of 2</b>" in page
  headline, everything = page.split("<summary>All 4 figures")
  assert '<tr class="above"><td>i2t/avg/R@10</td><td class="value">0.250</td>' in headline
  assert '<tr class="below"><td>cls/group</td>' in headline
  assert '<tr class=""><td>img</td>' in headline
  assert "i2t/embed" not in headline and "i2t/embed" in everything


def test_right_captions_and_ranks(tmp_path, retrieval):
  page = read(tmp_path, **EMPTY | {"retrieval": retrieval})
  cards = re.findall(r"<ol>(.*?)</ol><p[^>]*>rank (\d) of 3: (\w*)", page, re.DOTALL)
  assert sorted(rank for _, rank, _ in cards) == ["1", "1", "3"]
  items = next(items for items, _, caption in cards if caption == "llama")
  order = re.findall(r'<li( class="hit")?>(\S*)', items)
  assert order[0] == ("", report.html.escape(NASTY).split()[0])
  assert order[2] == (' class="hit"', "llama")
  # "llama" likes images 0 and 2 alike: the tie counts against it
  strip = re.search(r"“llama” <span[^>]*>.*?rank (\d) of 3</span>(.*?)</div>", page, re.DOTALL)
  assert strip[1] == "2"
  assert re.findall(r'alt="(\w+)"', strip[2]) == ["wrong", "right", "wrong"]


def test_nan_similarity_ranks_last():
  ((_, order, rank),) = report._queries(np.full((1, 4), np.nan), np.eye(1, 4, dtype=bool), 3)
  assert rank == 4 and 0 not in order


def test_patches_of_constant_features(tmp_path):
  patches = {"images": np.zeros((2, 16, 16, 3), np.uint8), "features": np.ones((2, 2, 2, 2))}
  page = read(tmp_path, **EMPTY | {"patches": patches})
  assert page.count("<img") == 4
