"""Nearest neighbours are those of a sort, in blocks and on any mesh; votes are those of a loop."""

import jax
import numpy as np
import pytest
from made_up import make_encode, make_variables

from jepa_vl import sharding
from jepa_vl.evals import common, knn


def mesh_of(count):
  return sharding.make_mesh(data=count, fsdp=1, tensor=1, devices=jax.devices()[:count])


@pytest.mark.parametrize("devices", [1, 8])
def test_blocks_find_what_a_sort_finds(devices, monkeypatch):
  """Also with ragged last blocks of queries and of neighbours."""
  monkeypatch.setattr(knn, "QUERIES", 16)
  monkeypatch.setattr(knn, "NEIGHBOURS", 24)
  rng = np.random.default_rng(0)
  queries, bank = (common.unit(rng.normal(size=(n, 9))).astype(np.float32) for n in (37, 101))
  cosines, places = knn.nearest(queries, bank, 7, mesh_of(devices))
  expected = queries.astype(float) @ bank.T.astype(float)
  np.testing.assert_array_equal(places, np.argsort(-expected, axis=1)[:, :7])
  np.testing.assert_allclose(cosines, -np.sort(-expected, axis=1)[:, :7], atol=1e-6)


def test_votes_are_those_of_a_loop():
  rng = np.random.default_rng(0)
  cosines = -np.sort(-rng.uniform(0, 1, (50, 9)).astype(np.float32), axis=1)
  classes = rng.integers(4, size=(50, 9))
  for row, found in enumerate(knn.vote(cosines, classes, 0.07)):
    total = [0.0] * 4
    for cosine, c in zip(cosines[row], classes[row], strict=True):
      total[c] += np.exp(float(cosine) / 0.07)
    assert found == np.argmax(total)
  assert knn.vote(np.float32([[0.9, 0.5, 0.5]]), np.array([[2, 1, 1]]), 0.07) == [2]
  assert knn.vote(np.float32([[0.51, 0.5, 0.5]]), np.array([[2, 1, 1]]), 0.07) == [1]


def test_planted_classes_are_found_and_permuted_ones_are_chance(mesh, monkeypatch):
  encode, rng = make_encode(mesh), np.random.default_rng(0)
  y = {"train": rng.integers(4, size=300), "test": rng.integers(4, size=400)}
  x = {s: {n: np.eye(4)[v] + rng.normal(0, 0.2, (len(v), 4)) for n in ("cls", "pooled")}
       for s, v in y.items()}  # fmt: skip
  monkeypatch.setattr(encode, "features", lambda variables, source, path, split: x[split])
  monkeypatch.setattr(encode, "split", lambda source, path, split: split)
  monkeypatch.setattr(common, "labels", lambda split, label: y[split])
  keys = {"source": "", "path": "", "splits": ("test",), "label": "c", "train_split": "train"}
  go = lambda: knn.run(encode, make_variables(), mesh, **keys, ks=(1, 20), temperature=0.07)
  figures = go()["figures"]
  assert min(figures[f"test/{n}/c/k20"] for n in ("cls", "pooled")) > 0.98
  assert figures["test/cls/c/k1@low"] <= figures["test/cls/c/k1"] <= figures["test/cls/c/k1@high"]
  y["train"] = rng.permutation(y["train"])
  assert go()["figures"]["test/cls/c/k20"] == pytest.approx(0.25, abs=0.09)
  with pytest.raises(ValueError, match="ks=.301,. must be from 1 to the 300 images of 'train'"):
    knn.run(encode, make_variables(), mesh, **keys, ks=(301,), temperature=0.07)
