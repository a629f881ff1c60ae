"""The report is one self-contained, escaped page that any state of a run can be written to."""

import html
import json
import re

import numpy as np
import pytest

from jepa_vl.evals import report
from jepa_vl.evals.report import __main__ as program
from jepa_vl.evals.report import details, pictures

NASTY = '<script>alert("🦙 & co")</script>'
EMPTY = {"config": {}, "results": [], "notes": {}, "drawn": []}
EMPTY |= dict.fromkeys(("embeddings", "retrieval", "patches"))


MAPS = np.random.default_rng(0).integers(3, size=(2, 9, 7)).astype(np.uint8)
PICTURES = np.random.default_rng(0).integers(256, size=(2, 8, 8, 3)).astype(np.uint8)
DRAWN = [
  {"kind": "table", "title": NASTY, "hint": NASTY, "columns": [NASTY, "b"],
   "rows": [[NASTY, 0.5], ["x", float("nan")]]},
  {"kind": "matrix", "title": "Confusion", "hint": "", "counts": np.eye(2), "names": [NASTY, "b"]},
  {"kind": "overlay", "title": "Classes", "hint": "", "images": PICTURES, "truth": MAPS,
   "prediction": np.where(MAPS == 0, 255, MAPS), "names": [NASTY, "seen", "other"]},
  {"kind": "depth", "title": "Depth", "hint": "", "images": PICTURES, "truth": 1.0 * MAPS,
   "prediction": MAPS + 0.5},
]  # fmt: skip


def row(evaluation, split, metric, value, **floors):
  names = ("untrained", "random", "majority", "raw_pixels")
  return {"evaluation": evaluation, "split": split, "metric": metric, "value": value} | {
    name: floors.get(name) for name in names
  }


def read(*args, **kwargs):
  with open(report.write(*args, **kwargs), encoding="utf-8") as f:
    return f.read()


def patches_of(images, features):
  attention = np.zeros(features.shape[:3])
  return {"images": images, "blocks": {3: features, 6: -features}, "attention": attention}


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
    embeddings={"image": rng.normal(size=(20, 3)), "<b>": np.zeros((20, 3))},
    retrieval=retrieval,
    patches=patches_of(retrieval["images"], rng.normal(size=(3, 2, 2, 5))),
    notes={"C": NASTY},
    drawn=DRAWN,
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
    "Embeddings",
    "Retrieval on C",
    "Patch features",
    "In detail",
  ]


def test_without_logs_and_sections(tmp_path):
  page = read(tmp_path, **EMPTY)
  assert "No evaluation has been run." in page
  assert "Too few logged steps" in page
  assert "Too few evaluations during training" in page
  assert "<img" not in page and "Embeddings" not in page


def test_one_step_has_figures_but_no_curves(tmp_path):
  log(tmp_path, (1,))
  page = read(tmp_path, **EMPTY)
  assert "<dt>last logged step</dt><dd>1</dd>" in page
  assert "<dt>loss</dt><dd>1.000</dd>" in page
  assert "Too few logged steps for curves (1)" in page
  assert "<img" not in page


@pytest.mark.parametrize("predicted", [True, False])
def test_the_first_figures_are_predictions_where_the_objective_predicts(predicted):
  last = {"step": 1, "cos/matched": 0.125, "cos/rolled": 0.25}
  if predicted:
    last |= {"cos/img_to_txt": 0.5, "cos/img_to_txt_rolled": 0.75}
  found = re.findall(r"<dt>cosine, (\w+)</dt><dd>([\d.]+)</dd>", report._overview({}, [last]))
  values = [float(value) for _, value in found]
  assert values == ([0.5, 0.75] if predicted else [0.125, 0.25])


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
  assert order[0] == ("", html.escape(NASTY).split()[0])
  assert order[2] == (' class="hit"', "llama")
  # "llama" likes images 0 and 2 alike: the tie counts against it
  strip = re.search(r"“llama” <span[^>]*>.*?rank (\d) of 3</span>(.*?)</div>", page, re.DOTALL)
  assert strip[1] == "2"
  assert re.findall(r'alt="(\w+)"', strip[2]) == ["wrong", "right", "wrong"]


def test_nan_similarity_ranks_last():
  ((_, order, rank),) = pictures.queries(np.full((1, 4), np.nan), np.eye(1, 4, dtype=bool), 3)
  assert rank == 4 and 0 not in order


def test_patches_of_constant_features(tmp_path):
  patches = patches_of(np.zeros((2, 16, 16, 3), np.uint8), np.ones((2, 2, 2, 2)))
  page = read(tmp_path, **EMPTY | {"patches": patches})
  assert page.count("<img") == 2 * 4 and page.count(">block 3<") == 2


def test_an_overlay_shows_void_as_the_image_and_classes_in_their_colour():
  image = PICTURES[0][:1, :2]
  mixed = details._mix(image, np.array([[255, 1]]), np.array([[128] * 3, [250, 0, 0]], np.uint8))
  np.testing.assert_array_equal(mixed[0, 0], image[0, 0])
  expected = 0.35 * image[0, 1].mean() + 0.65 * np.array([250, 0, 0])
  np.testing.assert_allclose(mixed[0, 1], expected, atol=1)


def test_errors_beat_a_floor_from_below():
  assert report._beats_floors(row("depth", "test", "rmse", 0.5, untrained=0.9))
  assert not report._beats_floors(row("depth", "test", "rmse", 0.9, untrained=0.5))
  assert report._beats_floors(row("depth", "test", "delta1", 0.9, untrained=0.5))


def a_run(root, name, objective, value):
  (root / name).mkdir()
  log(root / name, (1, 2, 3))
  config = {"seed": 0, "objective": {"name": objective}}
  (root / name / "config.json").write_text(json.dumps(config))
  rows = [
    row("depth", "test", "rmse", value, untrained=1.5) | {"low": value - 0.1, "high": value + 0.1},
    row("zeroshot", "test", f"{'avg' if objective == 'levljepa' else 'embed'}/top1", 0.75),
  ]
  (root / name / "results.json").write_text(json.dumps({"rows": rows}))
  return str(root / name)


def test_runs_stand_side_by_side_each_in_its_own_reading(tmp_path):
  nasty = "<script>alert(1) & co"
  runs = [a_run(tmp_path, nasty, "levljepa", 0.5), a_run(tmp_path, "b", "clip", 1.0)]
  out = tmp_path / "deep" / "page.html"
  assert program.main([*runs, "--out", str(out)]) == 0
  page = out.read_text(encoding="utf-8")
  assert "<script" not in page and "http" not in page.replace("http-equiv", "")
  lines = re.findall(r"<tr>(.*?)</tr>", page)
  cells = [re.findall(r"<td>(.*?)</td>", line) for line in lines]
  assert ["objective.name", "levljepa", "clip"] in cells
  assert not any(c and c[0] == "seed" for c in cells)  # equal in both
  assert ["depth test rmse", "0.500 (0.400 – 0.600)", "1.000 (0.900 – 1.100)", "1.500"] in cells
  assert ["zeroshot test top1", "0.750", "0.750", "–"] in cells
  assert page.count("<figure>") >= 1
  (tmp_path / "b" / report.PICTURES).write_text("<h2>Drawn of b</h2>")
  assert program.main([*runs, "--out", str(out)]) == 0
  assert "Pictures of b</summary><h2>Drawn of b</h2>" in out.read_text(encoding="utf-8")
  assert program.main([runs[1], "--out", str(out)]) == 0
  page = out.read_text(encoding="utf-8")
  assert "configured differently" not in page and "<h2>Drawn of b</h2>" in page


def test_embeddings_are_drawn_beside_the_normal_density(monkeypatch):
  """Densities integrate to the share within the axis; those of normal embeddings are normal."""
  drawn = {}
  keep = lambda title, lines, *_, **__: drawn.update({title: lines})
  monkeypatch.setattr(pictures, "figure", keep)
  rng = np.random.default_rng(0)
  made = {"normal": rng.normal(size=(4000, 16)), "wide": 9 * rng.normal(size=(50, 16))}
  pictures.embeddings(made)
  (_, x, normal, _), (_, _, wide, _), (_, _, ideal, _) = drawn["Along random directions"]
  assert np.abs(normal - ideal).max() < 0.01 and wide.max() < 0.1
  assert wide.sum() * (x[1] - x[0]) == pytest.approx(0.34, abs=0.05)  # P(|9 z| < 4)


def test_what_is_no_run_is_said(tmp_path, capsys):
  assert program.main([str(tmp_path), "--out", str(tmp_path / "x.html")]) == 1
  assert f"is no run's folder: looked for {tmp_path}/config.json" in capsys.readouterr().err
  (tmp_path / "config.json").write_text("{")
  assert program.main([str(tmp_path), "--out", str(tmp_path / "x.html")]) == 1
  assert "config.json is no JSON" in capsys.readouterr().err
