"""Figures are what plain loops say, chance is chance, and a collapsed model does not score."""

import jax
import numpy as np
import pytest
import scipy.sparse
import scipy.stats
from made_up import D, make_encode, make_variables
from ml_collections import ConfigDict
from records import record, write

from jepa_vl import evals, sharding
from jepa_vl.data import embedded
from jepa_vl.evals import common, probes, rank, retrieval

WHERE = {"source": "emoji", "path": "", "splits": ("val",)}


# --- ranks and chance


@pytest.mark.parametrize(
  ("scores", "relevant", "expected"),
  [
    ([3, 2, 1], [1, 0, 0], 0),
    ([3, 2, 1], [0, 0, 1], 2),
    ([3, 2, 1], [0, 1, 1], 1),  # the best of several right ones counts
    ([2, 2, 1], [1, 0, 0], 1),  # a tie counts against
    ([2, 2, 1], [1, 1, 0], 0),  # but not between right ones
    ([0, 0, 0], [0, 1, 0], 2),
    ([np.nan, 2, 1], [1, 0, 0], 2),  # a right NaN is last
    ([3, np.nan, 1], [1, 0, 0], 1),  # a wrong NaN is first
    ([np.nan] * 3, [1, 0, 0], 2),
    ([np.nan, 2, 1], [1, 1, 0], 0),
    ([-np.inf, -np.inf, -np.inf], [1, 0, 0], 2),
  ],
)
def test_first_hit(scores, relevant, expected):
  found = common.first_hit(np.array([scores], np.float32), np.array([relevant], bool))
  assert found.tolist() == [expected]


@pytest.mark.parametrize("shape", [(7, 5, 8), (155, 310, 64), (33, 17, 130)])
@pytest.mark.parametrize("side", ["img", "txt", "both"])
def test_constant_embeddings_never_hit(shape, side):
  """Also with roundings: equal rows must give equal scores to the last bit."""
  N, C, width = shape
  rng = np.random.default_rng(0)
  draw = lambda n, constant: np.repeat(
    rng.normal(size=(1 if constant else n, width)), n if constant else 1, axis=0
  ).astype(np.float32)
  images = {k: draw(N, side != "txt") for k in ("z_img", "p_img")}
  texts = {k: draw(C, side != "img") for k in ("z_txt", "p_txt")}
  relevant = np.arange(N)[:, None] % C == np.arange(C)
  relevant |= np.arange(N)[:, None] == np.arange(C)[None] % N
  for reading in common.READINGS:
    scores = common.similarity(images, texts, reading)
    if side != "img":  # captions alike: no image finds its own
      assert common.recall_at(common.first_hit(scores, relevant), 1) == 0
    if side != "txt":
      assert common.recall_at(common.first_hit(scores.T, relevant.T), 1) == 0


@pytest.mark.parametrize("k", [1, 3, 10, 50])
def test_random_recall_is_what_random_rankings_reach(k):
  rng = np.random.default_rng(0)
  relevant = np.zeros((4, 20), bool)
  for q, right in enumerate((1, 2, 5, 20)):
    relevant[q, rng.permutation(20)[:right]] = True
  recalls = [
    common.recall_at(common.first_hit(rng.random((4, 20)), relevant), k) for _ in range(4000)
  ]
  assert common.random_recall(relevant, k) == pytest.approx(np.mean(recalls), abs=0.015)


def test_random_recall_of_one_right_answer_is_k_over_n():
  assert common.random_recall(np.eye(8, dtype=bool), 3) == pytest.approx(3 / 8)
  assert common.random_recall(np.eye(8, dtype=bool), 9) == 1.0


def cosine(a, b):
  return sum(x * y for x, y in zip(a, b, strict=True)) / (
    sum(x * x for x in a) ** 0.5 * sum(y * y for y in b) ** 0.5
  )


@pytest.mark.parametrize(
  ("reading", "pairs"),
  [
    ("embed", ["z_img z_txt"]),
    ("image_to_text", ["p_img z_txt"]),
    ("text_to_image", ["z_img p_txt"]),
    ("predictions", ["p_img p_txt"]),
    ("avg", ["p_img z_txt", "z_img p_txt"]),
  ],
)
def test_readings_are_mean_cosines(reading, pairs):
  rng = np.random.default_rng(0)
  images = {k: rng.normal(size=(4, D)) for k in ("z_img", "p_img")}
  texts = {k: rng.normal(size=(3, D)) for k in ("z_txt", "p_txt")}
  found = common.similarity(images, texts, reading)
  for i in range(4):
    for c in range(3):
      values = [
        cosine(images[a][i].tolist(), texts[b][c].tolist()) for a, b in map(str.split, pairs)
      ]
      assert found[i, c] == pytest.approx(sum(values) / len(values))


def test_a_zero_embedding_is_similar_to_nothing():
  x = np.zeros((2, D), np.float32)
  assert (common.similarity({"z_img": x}, {"z_txt": x + 1}, "embed") == 0).all()


# --- intervals


def test_bootstrap_is_scipys():
  """Of a mean and of a ratio of sums; and rows that are alike have no interval."""
  rng = np.random.default_rng(0)
  hits, ratio = rng.random(80) < 0.3, rng.random((80, 2))
  found = common.means({"a": hits, "b": np.ones(80)})
  expected = scipy.stats.bootstrap(
    (hits,), np.mean, method="percentile", n_resamples=4000, random_state=0
  ).confidence_interval
  assert found["a"] == hits.mean()
  assert (found["a@low"], found["a@high"]) == pytest.approx(tuple(expected), abs=0.02)
  assert found["b@low"] == found["b@high"] == 1
  low, high = common.bootstrap([ratio[:, 0], ratio[:, 1]], lambda a, b: a / b)
  expected = scipy.stats.bootstrap(
    (ratio[:, 0], ratio[:, 1]), lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True,
    method="percentile", n_resamples=4000, random_state=0,
  ).confidence_interval  # fmt: skip
  assert (low, high) == pytest.approx(tuple(expected), abs=0.02)


# --- in blocks


@pytest.mark.parametrize("data", [1, 8])
def test_ranks_in_blocks_are_those_of_the_whole(data, monkeypatch):
  """Several right ones, none, ties, constant and NaN rows; a ragged last block."""
  monkeypatch.setattr(common, "QUERIES", 16)
  monkeypatch.setattr(common, "CANDIDATES", 8)
  rng = np.random.default_rng(0)
  q, c = rng.normal(size=(2, 37, D)).astype(np.float32), rng.normal(size=(2, 29, D))
  c = c.astype(np.float32)
  q[0, 5], c[0, 3] = np.nan, np.nan
  c[:, 20:] = c[:, :9]  # ties across blocks
  right = rng.random((37, 29)) < 0.08
  right[4] = False
  mesh = sharding.make_mesh(data=data, fsdp=1, tensor=1, devices=jax.devices()[:data])
  found = common.first_hits(list(q), list(c), scipy.sparse.csr_array(right), mesh)
  scores = sum(common.unit(a) @ common.unit(b).T for a, b in zip(q, c, strict=True)) / 2
  scores[:, 20:] = scores[:, :9]  # NumPy may round equal columns differently
  np.testing.assert_array_equal(found, common.first_hit(scores, right))


@pytest.mark.parametrize("shape", [(155, 310, 64), (33, 17, 130)])
def test_constant_embeddings_never_hit_in_blocks(shape, mesh, monkeypatch):
  monkeypatch.setattr(common, "CANDIDATES", 64)
  N, C, width = shape
  rng = np.random.default_rng(0)
  constant = np.repeat(rng.normal(size=(1, width)), C, axis=0)
  right = scipy.sparse.csr_array(np.arange(N)[:, None] % C == np.arange(C))
  first = common.first_hits([rng.normal(size=(N, width))], [constant], right, mesh)
  assert (first == C - 1).all()


# --- end to end


@pytest.fixture(scope="module")
def variables():
  return make_variables()


@pytest.fixture(scope="module")
def encode():
  return make_encode(sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1]))



@pytest.fixture(scope="module")
def all_evals():
  labels = {"label": "group"}
  return ConfigDict(
    {
      "retrieval": {**WHERE, "ranks": (1, 5), "folds": 0},
      "zeroshot": {**WHERE, **labels, "classes": embedded.info()["groups"], "templates": ("a {}",)},
      "probe": {
        **WHERE, **labels, "train_split": "val_style", "select_split": "val", "l2": (0.1, 1.0),
        "features": ("cls", "pooled"), "shots": (1,), "draws": 2,
      },
      "rank": WHERE,
    }
  )


@pytest.fixture(scope="module")
def results(encode, variables, all_evals):
  evals.check(all_evals)
  return evals.run_all(encode, variables, encode.mesh, all_evals)


def test_every_evaluation_gives_finite_floats(results, all_evals):
  assert set(results) == set(all_evals)
  for name, figures in evals.figures(results).items():
    assert figures
    for key, value in figures.items():
      assert type(value) is float and np.isfinite(value), (name, key)
      assert 0 <= value <= (D if name == "rank" else 1), (name, key)
      if not common.is_beside(key) and f"{key}@low" in figures:
        assert figures[f"{key}@low"] <= value <= figures[f"{key}@high"]
    assert results[name]["protocol"] and results[name]["sizes"]["val"]


def test_retrieval_is_what_a_loop_counts(encode, variables, results):
  data = encode.split("emoji", "", "val")
  features = encode.features(variables, "emoji", "", "val")
  scores, right = common.similarity(features, features, "avg"), data.relevant.toarray()
  figures = results["retrieval"]["figures"]
  for way, s, relevant in (("i2t", scores, right), ("t2i", scores.T, right.T)):
    for k in (1, 5):
      hits = [relevant[q][np.argsort(-s[q])[:k]].any() for q in range(len(s))]
      assert figures[f"val/{way}/avg/R@{k}"] == pytest.approx(np.mean(hits))
  assert figures["val/t2i/avg/R@1@random"] == pytest.approx(2 / 310, rel=0.05)
  assert len(figures) == 2 * 2 * 4 * len(common.READINGS)


def test_zero_shot_and_probe_figures_are_what_a_loop_counts(encode, variables, results):
  data = encode.split("emoji", "", "val")
  labels = np.array([r["group"] for r in data.records])
  texts = encode.texts(variables, [f"a {name}" for name in embedded.info()["groups"]])
  scores = common.similarity(encode.features(variables, "emoji", "", "val"), texts, "embed")
  figures, probe = results["zeroshot"]["figures"], results["probe"]["figures"]
  assert figures["val/embed/top1"] == pytest.approx(np.mean(scores.argmax(axis=1) == labels))
  assert figures["val/embed/top1@random"] == 1 / 8
  majority = np.bincount(labels).max() / len(labels)
  assert figures["val/embed/top1@majority"] == pytest.approx(majority)
  for feature in probes.FEATURES:
    assert probe[f"val/{feature}/group@majority"] == pytest.approx(majority)
    assert probe[f"val/{feature}/group"] > majority  # colours tell groups apart
  pixels = {probe[f"val/{f}/group@raw_pixels"] for f in probes.FEATURES}
  assert len(pixels) == 1


def test_perfect_embeddings_score_one_and_collapsed_ones_nothing(mesh):
  """Text and image of a pair are looked up to be equal, then made the same for all pairs."""
  data = make_encode(mesh).split("emoji", "", "val")
  codes = np.eye(len(data.captions), dtype=np.float32)
  right = data.relevant.toarray()
  images, texts = right / right.sum(axis=1, keepdims=True), codes
  for constant, expected in ((False, 1.0), (True, 0.0)):
    encode = make_encode(mesh)
    give = lambda x, constant=constant: (x * 0 + 1 if constant else x).astype(np.float32)
    encode.features = lambda *_, give=give: {
      **dict.fromkeys(("z_img", "p_img"), give(images)),
      **dict.fromkeys(("z_txt", "p_txt"), give(texts)),
    }
    figures = retrieval.run(encode, None, mesh, **WHERE, ranks=(1,), folds=0)["figures"]
    values = {v for k, v in figures.items() if not k.endswith("@random")}
    assert values == {expected}
    ranks = rank.run(encode, None, mesh, **WHERE)["figures"]
    assert all(v > 100 if not constant else v == 1 for v in ranks.values())


def test_table_pairs_figures_with_what_stands_beside_them(results):
  half = lambda figures: {k: v / 2 for k, v in figures.items()}
  untrained = {name: r | {"figures": half(r["figures"])} for name, r in results.items()}
  rows = evals.table(results, untrained)
  figures = evals.figures(results)
  assert len(rows) == sum(not common.is_beside(k) for f in figures.values() for k in f)
  for row in rows:
    key = f"{row['split']}/{row['metric']}"
    assert row["split"] == "val" and row["value"] == figures[row["evaluation"]][key]
    assert row["untrained"] == pytest.approx(row["value"] / 2)
    for what in common.FLOORS + common.INTERVAL:
      assert row[what] == figures[row["evaluation"]].get(f"{key}@{what}")
  kinds = {
    (row["evaluation"], *(f for f in common.FLOORS + ("low",) if row[f] is not None))
    for row in rows
  }
  assert kinds == {
    ("retrieval", "random", "low"),
    ("zeroshot", "random", "majority", "low"),
    ("probe", "majority", "raw_pixels", "low"),
    ("probe", "majority", "low"),  # few-shot
    ("rank",),
  }


def test_format_table_prints_headline_rows():
  row = dict.fromkeys(("untrained", *common.INTERVAL, *common.FLOORS))
  named = lambda evaluation, metric, value: {
    **row, "evaluation": evaluation, "split": "C", "metric": metric, "value": value
  }  # fmt: skip
  text = evals.format_table([
    named("retrieval", "i2t/avg/R@1", 0.25) | {"random": 0.125, "low": 0.2, "high": 0.3},
    named("retrieval", "i2t/embed/R@1", 0.75),
    named("zeroshot", "avg/top1", 0.5) | {"random": 0.1, "raw_pixels": 0.2, "untrained": 0.05},
    named("rank", "img", 17.0),
  ])
  header, *lines = text.strip().splitlines()
  assert header.split() == ["value", "95%", "interval", "untrained", "floors"]
  assert [" ".join(line.split()) for line in lines] == [
    "retrieval C i2t/avg/R@1 0.250 0.200 - 0.300 - random 0.125",
    "zeroshot C avg/top1 0.500 - 0.050 random 0.100, raw pixels 0.200",
    "rank C img 17.000 - - -",
  ]


def test_one_evaluation_runs_under_two_names_and_one_only_at_the_end(encode, variables):
  cfg = ConfigDict({"rank": WHERE, "late": {**WHERE, "evaluation": "rank", "when": "end"}})
  evals.check(cfg)
  evals.prepare(encode, cfg)
  found = evals.run_all(encode, variables, encode.mesh, cfg)
  assert found["late"]["figures"] == found["rank"]["figures"]
  assert set(evals.run_all(encode, variables, encode.mesh, cfg, at_end=False)) == {"rank"}
  with pytest.raises(ValueError, match="evals.rank.when must be one of always, end, got 'never'"):
    evals.check({"rank": {**WHERE, "when": "never"}})


def test_without_predictions_the_embeddings_are_the_headline(encode, variables, mesh):
  """CLIP and SigLIP: one reading, and the table shows it."""
  few = make_encode(mesh, readings=("embed",))
  cfg = ConfigDict({"retrieval": {**WHERE, "splits": ("val",), "ranks": (1,), "folds": 0}})
  found = evals.run_all(few, variables, mesh, cfg)
  keys = [k for k in found["retrieval"]["figures"] if not common.is_beside(k)]
  assert keys == ["val/i2t/embed/R@1", "val/t2i/embed/R@1"]
  all_readings = evals.run_all(encode, variables, mesh, cfg)["retrieval"]["figures"]
  assert found["retrieval"]["figures"][keys[0]] == all_readings[keys[0]]
  assert "i2t/embed/R@1" in evals.format_table(evals.table(found, found))
  pictures = evals.pictures(few, variables, cfg)
  similarity = pictures["retrieval"]["similarity"]
  features = few.features(variables, "emoji", "", "val")
  np.testing.assert_array_equal(similarity, common.similarity(features, features, "embed"))
  patches = pictures["patches"]
  last = few.patches(variables, patches["images"])
  assert list(patches["blocks"]) == [2, 3, 4, 5] and last.shape[1:] == (2, 2, 3)
  np.testing.assert_array_equal(patches["blocks"][5], last)  # after the final norm
  np.testing.assert_allclose(patches["blocks"][3], 3 * last, rtol=1e-6)
  assert patches["attention"].shape == last.shape[:3]


def test_an_unknown_evaluation_is_refused():
  with pytest.raises(ValueError, match="evals.retreival: no such evaluation; known are retrieval,"):
    evals.check({"rank": WHERE, "retreival": WHERE})
  with pytest.raises(ValueError, match="evals.rank does not take ranks; jepa_vl/evals/rank.py"):
    evals.check({"rank": {**WHERE, "ranks": (1,)}})
  with pytest.raises(ValueError, match="evals.retrieval lacks ranks, folds; .*/retrieval.py says"):
    evals.check({"retrieval": WHERE})


def test_prepare_names_what_is_amiss_with_the_splits(encode, tmp_path):
  for i, name in enumerate(("one", "two")):  # of one size, and with one number of records
    write(tmp_path / f"{name}.array_record", [record(j + i) | {"kind": j} for j in range(3)])

  def prepare(**keys):
    where = {"source": "array_record", "path": f"{tmp_path}/{{split}}.array_record"}
    evals.prepare(encode, ConfigDict({"zeroshot": {**where, "splits": ("one", "two"), **keys}}))

  prepare(label="kind", classes=("a", "b", "c"))
  with pytest.raises(ValueError, match="'one' and 'two' are the same records.*{split}"):
    prepare(path=f"{tmp_path}/one.array_record")
  with pytest.raises(ValueError, match="label='group' .* 'one' a record has None.* are caption"):
    prepare(label="group")
  with pytest.raises(ValueError, match="label='kind' .* below 2; in split 'one' a record has 2"):
    prepare(label="kind", classes=("a", "b"))
  with pytest.raises(ValueError, match="evals.zeroshot, split 'three': path .* matches no file"):
    prepare(select_split="three")
  with pytest.raises(ValueError, match="evals.zeroshot.splits must be a tuple of names, got 'one'"):
    prepare(splits="one")


def test_a_failed_evaluation_tells_what_those_before_it_found(
  encode, variables, monkeypatch, caplog
):
  monkeypatch.setattr(evals.log, "propagate", True)
  monkeypatch.setitem(evals.EVALS, "rate", lambda *_, **__: 1 / 0)
  cfg = ConfigDict({"rank": WHERE, "rate": WHERE})
  with pytest.raises(ZeroDivisionError):
    evals.run_all(encode, variables, encode.mesh, cfg)
  found = rank.run(encode, variables, encode.mesh, **WHERE)["figures"]["val/img"]
  assert "evals.rate failed" in caplog.text and f"rank val/img {found:.4f}" in caplog.text


LABELLED = {**WHERE, "label": "group", "train_split": "train", "select_split": ""}
ASKED = dict(
  source="shapes_questions", path="side=32,size=12", splits=("iid",), train_source="",
  train_path="", train_split="train", language="", score="exact", dtype="float32",
)  # fmt: skip


@pytest.mark.parametrize("evaluation, keys, words", [
  ("knn", LABELLED | {"ks": (10, 100_000)}, r"ks=.10, 100000. must be from 1 to the \d+ images"),
  ("head_probe", LABELLED | {"head": "deep", "features": ("cls",)}, "head must be one of linear,"),
  ("head_probe", LABELLED | {"head": "linear", "features": ("all",)}, "features must be of cls,"),
  ("probe", LABELLED | {"features": ("all",)}, "features must be of cls, pooled, both"),
  ("segmentation", WHERE | {"mode": "crop"}, "mode must be one of resize, slide, got 'crop'"),
  ("clusters", WHERE | {"mode": "crop"}, "mode must be one of resize, slide, got 'crop'"),
  ("depth", WHERE | {"mode": "crop"}, "mode must be one of resize, slide, got 'crop'"),
  ("depth", WHERE | {"mode": "slide", "scale": "log"}, "scale must be one of metric, median"),
  ("vlm", ASKED | {"score": "bleu"}, "score must be one of vqa, exact, pope, got 'bleu'"),
  ("vlm", ASKED | {"dtype": "int8"}, "dtype must be one of float32, bfloat16, got 'int8'"),
  ("vlm", ASKED | {"language": "/nowhere"}, "/nowhere/config.json is no file"),
  ("vlm", ASKED | {"source": "emoji", "path": "", "splits": ("val",)}, "language='' .* in words, "),
])  # fmt: skip
def test_prepare_names_keys_that_an_evaluation_would_stop_at(encode, evaluation, keys, words):
  """At the start, not hours later, when the figures of the others are lost with it."""
  with pytest.raises(ValueError, match=f"evals.late: {words}"):
    evals.prepare(encode, ConfigDict({"late": {**keys, "evaluation": evaluation}}))
