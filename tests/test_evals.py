"""Figures are what plain loops say, chance is chance, and a collapsed model does not score."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from records import record, write

from jepa_vl import evals, sharding
from jepa_vl.data import common as data_common
from jepa_vl.data import embedded, tokenizer, transforms
from jepa_vl.evals import common, probes, rank, retrieval

WHERE = {"source": "emoji", "path": "", "splits": ("val",)}
D = 12


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


# --- the real Encode around a made-up model


def look(variables, batch):
  """A stand-in for the model: fixed random projections of colours and of token counts."""
  out = {}
  if "image" in batch:
    x = batch["image"].astype(jnp.float32) / 255
    B, S = x.shape[:2]
    patches = x.reshape(B, 2, S // 2, 2, S // 2, 3).mean(axis=(2, 4)).reshape(B, 4, 3)
    out["cls"] = patches.reshape(B, 12).astype(jnp.bfloat16)
    out["patches"] = patches.astype(jnp.bfloat16)
    out["z_img"] = patches.reshape(B, 12) @ variables["image"]
    out["p_img"] = jnp.tanh(out["z_img"])
  if "text" in batch:
    counts = jax.nn.one_hot(batch["text"] % 50, 50) * batch["mask"][..., None]
    out["z_txt"] = counts.sum(axis=1) @ variables["text"]
    out["p_txt"] = jnp.tanh(out["z_txt"])
  return out


@pytest.fixture(scope="module")
def variables():
  keys = jax.random.split(jax.random.key(0))
  return {"image": jax.random.normal(keys[0], (12, D)), "text": jax.random.normal(keys[1], (50, D))}


def make_encode(mesh, apply=look, batch_size=64, readings=tuple(common.READINGS)):
  tokenize = functools.partial(
    tokenizer.tokenize, tokenizer.load("emoji"), length=12, readout="eot"
  )
  return common.Encode(
    apply=jax.jit(apply), tokenize=tokenize, mesh=mesh, image_size=16, resize_ratio=1.0,
    batch_size=batch_size, readings=readings, keys=data_common.USUAL,
  )  # fmt: skip


@pytest.fixture(scope="module")
def encode():
  return make_encode(sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1]))


@pytest.mark.parametrize("data", [1, 8])
@pytest.mark.parametrize("batch_size", [8, 64])
def test_features_do_not_depend_on_batches_or_devices(encode, variables, data, batch_size):
  """Neither the padding of the last batch nor the mesh can be seen, and order is kept."""
  mesh = sharding.make_mesh(data=data, fsdp=1, tensor=1, devices=jax.devices()[:data])
  images = encode.split("emoji", "", "val").images[:27]
  captions = encode.split("emoji", "", "val").captions[:11]
  found = make_encode(mesh, batch_size=batch_size)
  found = found.images(variables, images) | found.texts(variables, captions)
  ids, mask, _ = encode.tokenize(captions)
  direct = look(variables, {"image": images, "text": ids, "mask": mask})
  assert set(found) == {"z_img", "p_img", "cls", "pooled", "z_txt", "p_txt"}
  pooled = np.asarray(direct["patches"], np.float32).mean(axis=1)
  for k, v in found.items():
    assert isinstance(v, np.ndarray) and v.dtype == np.float32
    np.testing.assert_allclose(v, pooled if k == "pooled" else direct[k], atol=1e-5, err_msg=k)


def test_patches_lie_on_their_grid(encode, variables):
  images = np.zeros((3, 16, 16, 3), np.uint8)
  images[:, :8, 8:, 1] = 255  # top right is green
  found = encode.patches(variables, images)
  assert found.shape == (3, 2, 2, 3) and found.dtype == np.float32
  assert (found[:, 0, 1] == [0, 1, 0]).all() and found.sum() == 3


def test_features_follow_the_variables(mesh, variables):
  """They are kept for one state and computed anew for the next."""
  encode, other = make_encode(mesh), jax.tree.map(lambda x: 2 * x, variables)
  first = encode.features(variables, "emoji", "", "val")
  assert encode.features(variables, "emoji", "", "val") is first
  second = encode.features(other, "emoji", "", "val")
  np.testing.assert_allclose(second["z_img"], 2 * first["z_img"], rtol=1e-5)


def test_split_has_one_caption_per_concept_and_both_styles_as_hits(encode):
  data, records = encode.split("emoji", "", "val"), embedded.read_records("val")
  assert data.images.shape == (len(records), 16, 16, 3) and data.left_out == []
  concepts = list(dict.fromkeys(r["concept"] for r in records))
  assert len(data.captions) == len(concepts) == data.relevant.shape[1]
  for r, row in zip(records, data.relevant, strict=True):
    c = concepts.index(r["concept"])
    assert row[c] and data.captions[c] == transforms.full_caption(r)
  assert data.relevant.sum(axis=0).min() == 2
  assert encode.split("emoji", "", "val") is data


def test_equal_images_or_equal_captions_are_hits_for_each_other(encode, tmp_path):
  image = {r["concept"]: r["image"] for r in embedded.read_records("val")}
  a, b, c = list(image.values())[:3]
  pairs = [(a, "one"), (a, "two"), (b, "three"), (c, "three"), (b"broken", "four")]
  write(tmp_path / "x", [{"image": data, "caption": caption} for data, caption in pairs])
  split = encode.split("array_record", str(tmp_path / "x"), "")
  assert split.captions == ["one", "two", "three"] and split.left_out == [4]
  assert split.relevant.astype(int).tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 1]]


# --- end to end


@pytest.fixture(scope="module")
def all_evals():
  labels = {"label": "group"}
  return ConfigDict(
    {
      "retrieval": {**WHERE, "ranks": (1, 5)},
      "zeroshot": {**WHERE, **labels, "classes": embedded.info()["groups"], "prompt": "a {}"},
      "probe": {
        **WHERE, **labels, "train_split": "val_style", "select_split": "val", "l2": (0.1, 1.0)
      },
      "rank": WHERE,
    }
  )


@pytest.fixture(scope="module")
def results(encode, variables, all_evals):
  evals.check(all_evals)
  return evals.run_all(encode, variables, encode.mesh, all_evals)


def test_every_evaluation_gives_finite_floats(results, all_evals):
  assert set(results) == set(evals.EVALS) == set(all_evals)
  for name, figures in results.items():
    assert figures
    for key, value in figures.items():
      assert type(value) is float and np.isfinite(value), (name, key)
      assert 0 <= value <= (D if name == "rank" else 1), (name, key)


def test_retrieval_is_what_a_loop_counts(encode, variables, results):
  data = encode.split("emoji", "", "val")
  features = encode.features(variables, "emoji", "", "val")
  scores = common.similarity(features, features, "avg")
  for way, s, relevant in (("i2t", scores, data.relevant), ("t2i", scores.T, data.relevant.T)):
    for k in (1, 5):
      hits = [relevant[q][np.argsort(-s[q])[:k]].any() for q in range(len(s))]
      assert results["retrieval"][f"val/{way}/avg/R@{k}"] == pytest.approx(np.mean(hits))
  assert results["retrieval"]["val/t2i/avg/R@1@random"] == pytest.approx(2 / 310, rel=0.05)
  assert len(results["retrieval"]) == 2 * 2 * 2 * len(common.READINGS)


def test_zero_shot_and_probe_figures_are_what_a_loop_counts(encode, variables, results):
  data = encode.split("emoji", "", "val")
  labels = np.array([r["group"] for r in data.records])
  texts = encode.texts(variables, [f"a {name}" for name in embedded.info()["groups"]])
  scores = common.similarity(encode.features(variables, "emoji", "", "val"), texts, "embed")
  figures = results["zeroshot"]
  assert figures["val/embed/top1"] == pytest.approx(np.mean(scores.argmax(axis=1) == labels))
  assert figures["val/embed/top1@random"] == 1 / 8
  majority = np.bincount(labels).max() / len(labels)
  assert figures["val/embed/top1@majority"] == pytest.approx(majority)
  for feature in probes.FEATURES:
    assert results["probe"][f"val/{feature}/group@majority"] == pytest.approx(majority)
    assert results["probe"][f"val/{feature}/group"] > majority  # colours tell groups apart
  pixels = {results["probe"][f"val/{f}/group@raw_pixels"] for f in probes.FEATURES}
  assert len(pixels) == 1


def test_perfect_embeddings_score_one_and_collapsed_ones_nothing(mesh):
  """Text and image of a pair are looked up to be equal, then made the same for all pairs."""
  data = make_encode(mesh).split("emoji", "", "val")
  codes = np.eye(len(data.captions), dtype=np.float32)
  images, texts = data.relevant / data.relevant.sum(axis=1, keepdims=True), codes
  for constant, expected in ((False, 1.0), (True, 0.0)):
    encode = make_encode(mesh)
    give = lambda x, constant=constant: (x * 0 + 1 if constant else x).astype(np.float32)
    encode.features = lambda *_, give=give: {
      **dict.fromkeys(("z_img", "p_img"), give(images)),
      **dict.fromkeys(("z_txt", "p_txt"), give(texts)),
    }
    figures = retrieval.run(encode, None, mesh, **WHERE, ranks=(1,))
    values = {v for k, v in figures.items() if not k.endswith("@random")}
    assert values == {expected}
    ranks = rank.run(encode, None, mesh, **WHERE)
    assert all(v > 100 if not constant else v == 1 for v in ranks.values())


def test_table_pairs_figures_with_their_floors(results):
  untrained = jax.tree.map(lambda v: v / 2, results)
  rows = evals.table(results, untrained)
  floors = tuple(f"@{name}" for name in common.FLOORS)
  assert len(rows) == sum(not k.endswith(floors) for r in results.values() for k in r)
  for row in rows:
    key = f"{row['split']}/{row['metric']}"
    figures = results[row["evaluation"]]
    assert row["split"] == "val" and row["value"] == figures[key]
    assert row["untrained"] == pytest.approx(row["value"] / 2)
    for floor in common.FLOORS:
      assert row[floor] == figures.get(f"{key}@{floor}")
  kinds = {
    (row["evaluation"], *(floor for floor in common.FLOORS if row[floor] is not None))
    for row in rows
  }
  assert kinds == {
    ("retrieval", "random"),
    ("zeroshot", "random", "majority"),
    ("probe", "majority", "raw_pixels"),
    ("rank",),
  }


def test_format_table_prints_headline_rows():
  row = dict.fromkeys(("untrained", *common.FLOORS))
  named = lambda evaluation, metric, value: {
    **row, "evaluation": evaluation, "split": "C", "metric": metric, "value": value
  }  # fmt: skip
  text = evals.format_table([
    named("retrieval", "i2t/avg/R@1", 0.25) | {"random": 0.125},
    named("retrieval", "i2t/embed/R@1", 0.75),
    named("zeroshot", "avg/top1", 0.5),
    named("rank", "img", 17.0),
  ])
  header, *lines = text.strip().splitlines()
  assert header.split() == ["value", "untrained", "random", "majority", "raw", "pixels"]
  assert [line.split() for line in lines] == [
    ["retrieval", "C", "i2t/avg/R@1", "0.250", "-", "0.125", "-", "-"],
    ["zeroshot", "C", "avg/top1", "0.500", "-", "-", "-", "-"],
    ["rank", "C", "img", "17.000", "-", "-", "-", "-"],
  ]


def test_without_predictions_the_embeddings_are_the_headline(encode, variables, mesh):
  """CLIP and SigLIP: one reading, and the table shows it."""
  few = make_encode(mesh, readings=("embed",))
  cfg = ConfigDict({"retrieval": {**WHERE, "splits": ("val",), "ranks": (1,)}})
  found = evals.run_all(few, variables, mesh, cfg)
  keys = [k for k in found["retrieval"] if not common.is_floor(k)]
  assert keys == ["val/i2t/embed/R@1", "val/t2i/embed/R@1"]
  all_readings = evals.run_all(encode, variables, mesh, cfg)["retrieval"]
  assert found["retrieval"][keys[0]] == all_readings[keys[0]]
  assert "i2t/embed/R@1" in evals.format_table(evals.table(found, found))
  similarity = evals.pictures(few, variables, cfg)["retrieval"]["similarity"]
  features = few.features(variables, "emoji", "", "val")
  np.testing.assert_array_equal(similarity, common.similarity(features, features, "embed"))


def test_an_unknown_evaluation_is_refused():
  with pytest.raises(ValueError, match="evals.retreival: no such evaluation; known are retrieval,"):
    evals.check({"rank": WHERE, "retreival": WHERE})
  with pytest.raises(ValueError, match="evals.rank: .*unexpected keyword argument 'ranks'"):
    evals.check({"rank": {**WHERE, "ranks": (1,)}})
  with pytest.raises(ValueError, match="evals.retrieval: missing a required argument: 'ranks'"):
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
