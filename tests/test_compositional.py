"""Hard negatives: a planted answer is found, chance is chance, and ties count against the model."""

import numpy as np
import pytest
from made_up import make_encode

from jepa_vl.evals import common, compositional

WHERE = {"source": "shapes", "path": "side=16,size=120", "splits": ("val",)}


def run(mesh, texts_of, images_of=None):
  """The figures with text embeddings `texts_of(texts)` and images' embeddings of their captions."""
  encode = make_encode(mesh)
  data = encode.split(*(WHERE[k] for k in ("source", "path")), "val")
  captions = [record["caption"] for record in data.records]
  images = (images_of or texts_of)(captions)
  encode.features = lambda *_: dict.fromkeys(("z_img", "p_img"), images)
  encode.texts = lambda _, texts: dict.fromkeys(("z_txt", "p_txt"), texts_of(texts))
  return compositional.run(encode, None, mesh, **WHERE, kinds=("colour", "relation")), data


def ordered(texts):
  """Knows each text to the letter."""
  return np.stack([np.random.default_rng(list(t.encode())).normal(size=64) for t in texts])


def counted(texts):
  """Knows words and their number alone."""
  return np.stack([ordered(sorted(t.split())).sum(axis=0) for t in texts])


def test_planted_embeddings_win_and_bags_of_words_tie(mesh):
  found, data = run(mesh, ordered)
  for key, value in found["figures"].items():
    if not common.is_beside(key):
      assert value == 1 and found["figures"][f"{key}@bag_of_words"] == 0.5
      assert found["figures"][f"{key}@random"] == 0.5
  with_colour = sum(bool(r["negatives"]["colour"]) for r in data.records)
  assert found["sizes"]["val"]["images_colour"] == with_colour > 20
  tied = run(mesh, counted)[0]["figures"]
  assert all(v == 0 for k, v in tied.items() if not common.is_beside(k))


def test_other_images_are_chance_and_nan_never_wins(mesh):
  shuffled = lambda captions: ordered(captions)[np.random.default_rng(0).permutation(len(captions))]
  figures = run(mesh, ordered, shuffled)[0]["figures"]
  for key, value in figures.items():
    if not common.is_beside(key):
      assert 0.25 < value < 0.75 and figures[f"{key}@low"] < value < figures[f"{key}@high"]
  nan = run(mesh, lambda texts: np.full((len(texts), 4), np.nan))[0]["figures"]
  assert all(v == 0 for k, v in nan.items() if not common.is_beside(k))


def test_several_negatives_must_all_be_beaten():
  score = lambda *rows: (
    {"z_img": np.eye(2)}, {"z_txt": np.array(rows, float)}, [0, 1], [[0, 1, 2], [1, 0]], "embed"
  )  # fmt: skip
  assert compositional._wins(*score([1, 0], [0.5, 1], [0, 1])).tolist() == [True, True]
  assert compositional._wins(*score([1, 0], [0.5, 1], [2, 0])).tolist() == [False, True]


def test_a_kind_that_is_not_there_is_named(mesh):
  encode = make_encode(mesh)
  encode.features = lambda *_: {}
  with pytest.raises(ValueError, match="kind 'size' .kinds that are there: colour, relation"):
    compositional.run(encode, None, mesh, **WHERE, kinds=("size",))
