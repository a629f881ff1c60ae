"""Segmentation and depth: figures are what loops say, what is planted is found, noise is not."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_up import make_encode

from jepa_vl import sharding
from jepa_vl.data import maps, sources
from jepa_vl.evals import clusters, dense, depth, segmentation

CLASSES, GRID, SIDE = 4, 8, 16
COLOURS = np.array([[20, 20, 20], [230, 30, 30], [30, 230, 30], [30, 30, 230]], np.uint8)
DEPTHS = np.array([4000, 1000, 2000, 3000], np.uint16)
FIT = {
  "size": 0, "mode": "resize", "stride": 0, "epochs": 40, "batch_size": 8, "lrs": (0.03, 0.3),
  "weight_decay": 0.0, "side": SIDE, "keep": 1.0, "seed": 0,
}  # fmt: skip


def patches_of_colour(variables, batch):
  """Patch tokens are the patches' mean colours, by `variables` blinded or not."""
  x = batch["image"].astype(jnp.float32) / 255
  B, S = x.shape[:2]
  x = x.reshape(B, GRID, S // GRID, GRID, S // GRID, 3).mean(axis=(2, 4))
  x = x * variables + jax.random.normal(jax.random.key(0), x.shape) * (1 - variables)
  tokens = x.reshape(B, GRID * GRID, 3)
  return {"cls": tokens[:, 0], "patches": tokens, "z_img": tokens[:, 0], "p_img": tokens[:, 0]}


def write(root, split, count, *, shuffle=False, shape=(SIDE, SIDE), cells=GRID):
  """Images of coloured squares with the classes and depths that their colours stand for."""
  rng = np.random.default_rng(len(split))
  for i in range(count):
    grid = rng.integers(CLASSES, size=(cells, cells)).astype(np.uint8)
    grid = grid.repeat(GRID // cells, axis=0).repeat(GRID // cells, axis=1)
    for folder, values in (
      ("images", COLOURS[grid]),
      ("annotations", rng.permutation(grid.ravel()).reshape(GRID, GRID) if shuffle else grid),
      ("depth", DEPTHS[grid]),
    ):
      grown = values.repeat(shape[0] // GRID, axis=0).repeat(shape[1] // GRID, axis=1)
      path = root / folder / split / f"{i:03d}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(maps.png(grown))


def mesh_of(count):
  return sharding.make_mesh(data=count, fsdp=1, tensor=1, devices=jax.devices()[:count])


def segment(root, *, devices=1, sighted=1.0, **changes):
  mesh = mesh_of(devices)
  encode = make_encode(mesh, apply=patches_of_colour, batch_size=8)
  keys = {
    "source": "segmentation_folder", "path": str(root), "splits": ("test",),
    "train_split": "train", "num_classes": CLASSES, "class_names": (), **FIT, **changes,
  }  # fmt: skip
  return segmentation.run(encode, jnp.float32(sighted), mesh, **keys)


def measure_depth(root, *, sighted=1.0, **changes):
  mesh = mesh_of(1)
  encode = make_encode(mesh, apply=patches_of_colour, batch_size=8)
  keys = {
    "source": "depth_folder", "path": str(root), "splits": ("test",), "train_split": "train",
    "min_depth": 0.5, "max_depth": 10.0, "scale": "metric", **FIT, **changes,
  }  # fmt: skip
  return depth.run(encode, jnp.float32(sighted), mesh, **keys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp("coloured")
  write(root, "train", 30)
  write(root, "test", 13)  # ragged
  return root


def test_counts_and_miou_are_what_a_loop_says():
  rng = np.random.default_rng(0)
  truth, predicted = rng.integers(5, size=(2, 9, 11))
  truth[truth == 4] = maps.VOID  # class 4 is predicted, and never there
  truth[:, 0] = 2
  predicted[predicted == 3] = 1
  iou, right, known = [], 0, 0
  for c in range(5):
    both = either = 0
    for t, p in zip(truth.ravel(), predicted.ravel(), strict=True):
      if t != maps.VOID:
        both += t == c and p == c
        either += t == c or p == c
    right += both
    if either:
      iou.append(both / either)
  known = np.sum(truth != maps.VOID)
  found = segmentation.miou(segmentation.count(predicted, truth, 6))
  assert found == pytest.approx([np.mean(iou), right / known])
  assert len(iou) == 5  # the sixth is nowhere, and counts for nothing


def test_what_colours_tell_is_found_and_what_is_shuffled_is_not(folder, tmp_path):
  figures = segment(folder)["figures"]
  assert figures["test/miou"] > 0.97 and figures["test/pixel_accuracy"] > 0.98
  assert figures["test/miou@low"] <= figures["test/miou"] <= figures["test/miou@high"]
  assert figures["test/miou@constant"] == pytest.approx(1 / 16, abs=0.02)
  assert figures["test/miou@colour"] > 0.97
  write(tmp_path, "train", 30, shuffle=True)
  write(tmp_path, "test", 13, shuffle=True)
  figures = segment(tmp_path)["figures"]
  assert figures["test/pixel_accuracy"] == pytest.approx(0.25, abs=0.04)
  assert segment(folder, sighted=0.0)["figures"]["test/pixel_accuracy"] < 0.3


def test_eight_devices_say_what_one_says(folder):
  one, eight = (segment(folder, devices=n)["figures"] for n in (1, 8))
  assert one.keys() == eight.keys()
  for key in one:
    assert one[key] == pytest.approx(eight[key], abs=2e-3), key


def test_labels_are_compared_at_their_own_size(folder, tmp_path):
  """Maps of three times the images' side, and images that are no squares, by sliding windows."""
  write(tmp_path, "train", 30)
  write(tmp_path, "test", 13, shape=(3 * SIDE, 3 * SIDE))
  assert segment(tmp_path)["figures"]["test/miou"] > 0.8  # borders blur where logits are grown
  write(tmp_path, "test", 13, shape=(SIDE, 2 * SIDE))
  # Resized to a square, a patch shows half of two classes' width; windows keep the aspect.
  slid = segment(tmp_path, mode="slide", stride=SIDE // 2)["figures"]["test/miou"]
  assert slid > 0.6


def test_windows_cover_the_image_and_touch_its_borders():
  assert dense.windows((16, 40), 16, 10) == [(0, 0), (0, 10), (0, 20), (0, 24)]
  assert dense.windows((16, 16), 16, 16) == [(0, 0)]
  covered = np.zeros((37, 50), int)
  for y, x in dense.windows(covered.shape, 16, 12):
    covered[y : y + 16, x : x + 16] += 1
  assert covered.min() > 0


def test_sliding_averages_what_windows_say(folder):
  """A head that says a pixel's window's mean: by a loop."""
  mesh = mesh_of(1)
  data = dense.Dense(
    make_encode(mesh), ("segmentation_folder", str(folder), "test"), "segmentation", size=16,
    mode="slide", stride=8,
  )  # fmt: skip
  image = np.random.default_rng(0).integers(256, size=(16, 32, 3)).astype(np.uint8)
  head = lambda x: x.mean(axis=(1, 2), keepdims=True).astype(np.float32)
  (found,) = data.outputs([image], head)
  for x in range(32):
    seen = [image[:, s : s + 16].mean(axis=(0, 1)) for s in (0, 8, 16) if s <= x < s + 16]
    np.testing.assert_allclose(found[3, x], np.mean(seen, axis=0), rtol=1e-4)


def test_windows_touch_where_no_size_and_stride_are_given(folder):
  where = ("segmentation_folder", str(folder), "test")
  image = np.zeros((SIDE, 4 * SIDE, 3), np.uint8)
  for size in (0, SIDE):
    data = dense.Dense(
      make_encode(mesh_of(1)), where, "segmentation", size=size, mode="slide", stride=0
    )
    counts = []
    head = lambda x, counts=counts: counts.append(len(x)) or x.astype(np.float32)
    list(data.outputs([image], head))
    assert counts == [4]


@pytest.mark.parametrize("channels", [1, 7, 171])
def test_outputs_are_upsampled_as_in_training(channels):
  x = np.random.default_rng(0).normal(size=(5, 6, channels)).astype(np.float32)
  ours = dense.to_map(x, (17, 40))
  expected = jax.image.resize(x, ours.shape, "linear", antialias=False)
  np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_a_class_out_of_range_is_said(folder):
  with pytest.raises(ValueError, match="has class 3; num_classes=3 allows 0 to 2, and 255"):
    segment(folder, num_classes=3)
  with pytest.raises(ValueError, match="mode must be one of resize, slide, got 'crop'"):
    segment(folder, mode="crop")


def test_depth_figures_are_what_a_loop_says():
  rng = np.random.default_rng(0)
  truth = rng.uniform(0.5, 12, (7, 5)).astype(np.float32)
  truth[0] = 0
  predicted = (truth + rng.normal(0, 1, truth.shape)).astype(np.float32)
  for scale in depth.SCALES:
    known = [
      (p, t) for p, t in zip(predicted.ravel(), truth.ravel(), strict=True) if 1 <= t <= 10
    ]
    factor = 1.0
    if scale == "median":
      factor = np.median([t for _, t in known]) / np.median([p for p, _ in known])
    square = relative = 0
    near = [0, 0, 0]
    for p, t in known:
      p = min(max(float(p) * factor, 1), 10)
      square, relative = square + (p - t) ** 2, relative + abs(p - t) / t
      for k in range(3):
        near[k] += max(p / t, t / p) < 1.25 ** (k + 1)
    n = len(known)
    expected = [(square / n) ** 0.5, relative / n, *(k / n for k in near)]
    found = depth.measure(predicted, truth, (1, 10), scale)
    assert found == pytest.approx(expected, rel=1e-5)
  assert depth.measure(predicted, truth * 0, (1, 10), "metric") is None


def test_depth_that_colours_tell_is_found(folder):
  """Depth is linear in the colours that stand for it."""
  figures = measure_depth(folder)["figures"]
  assert figures["test/rmse"] < 0.5 * figures["test/rmse@constant"]
  assert figures["test/delta1"] > 0.2 + figures["test/delta1@constant"]
  blind = measure_depth(folder, sighted=0.0)["figures"]
  assert blind["test/rmse"] > 0.95 * figures["test/rmse@constant"]
  with pytest.raises(ValueError, match="scale must be one of metric, median, got 'log'"):
    measure_depth(folder, scale="log")
  with pytest.raises(ValueError, match="'train': no pixel has a depth from 20.0 to 30.0 m"):
    measure_depth(folder, min_depth=20.0, max_depth=30.0)


def test_the_rate_is_chosen_on_held_out_train_images(folder):
  """A rate of nothing loses against one that learns, wherever it stands."""
  for lrs in ((1e-6, 0.3), (0.3, 1e-6)):
    result = segment(folder, lrs=lrs)
    assert result["sizes"]["train"]["lr"] == 0.3 and result["figures"]["test/miou"] > 0.9


@pytest.mark.parametrize("evaluate", [segment, measure_depth, lambda root, epochs: cluster(root)])
def test_a_stretch_of_which_no_image_can_be_read_is_left_out(tmp_path, monkeypatch, evaluate):
  for split in ("train", "test"):
    write(tmp_path, split, 9)
  monkeypatch.setattr(dense, "_AT_ONCE", 4)
  (tmp_path / "images" / "test" / "008.png").write_bytes(b"damaged")
  found = evaluate(tmp_path, epochs=1)
  assert found["sizes"]["test"] == {"images": 8, "left_out": 1}


def test_shapes_has_both_maps():
  source = sources.open_source("shapes", "side=32,size=4", "iid")
  _, images, found = maps.read(source, range(4), "segmentation")
  assert images[0].shape[:2] == found[0].shape == (32, 32)


@pytest.mark.parametrize("keep", [0.0, 30 * GRID * GRID * 3 / 2**30])
def test_features_that_do_not_fit_into_memory_are_made_again(folder, keep, monkeypatch):
  """None of them, or half of their bytes: the same figures."""
  monkeypatch.setattr(dense, "_AT_ONCE", 5)  # of which some are kept
  kept, again = (segment(folder, keep=k)["figures"] for k in (1.0, keep))
  assert kept == again


# --- clusters


def cluster(root, *, sighted=1.0, devices=1, **changes):
  encode = make_encode(mesh_of(devices), apply=patches_of_colour, batch_size=8)
  keys = {
    "source": "segmentation_folder", "path": str(root), "splits": ("test",), "size": 0,
    "train_split": "train", "num_classes": CLASSES, "class_names": (), "mode": "resize",
    "stride": 0, "components": 2, "sample": 20, "seed": 0, **changes,
  }  # fmt: skip
  return clusters.run(encode, jnp.float32(sighted), mesh_of(devices), **keys)


def test_clusters_get_the_names_that_most_pixels_agree_with():
  """The best of all permutations, and its counts, by loops."""
  rng = np.random.default_rng(0)
  found, truth = rng.integers(4, size=(2, 3, 20, 20))
  truth[rng.random(truth.shape) < 0.4] = 0
  found = np.where(rng.random(truth.shape) < 0.5, (truth + 1) % 4, found)
  truth[:, :3] = maps.VOID
  tables = np.array([clusters.contingency(f, t, 4) for f, t in zip(found, truth, strict=True)])
  known = truth != maps.VOID
  right = lambda names: np.sum(np.array(names)[found][known] == truth[known])
  best = max(itertools.permutations(range(4)), key=right)
  name = clusters.match(tables.sum(axis=0))
  assert tuple(name) == best
  for f, t, counts in zip(found, truth, clusters.matched(tables, name), strict=True):
    np.testing.assert_array_equal(counts, segmentation.count(name[f], t, 4))


def test_clusters_of_colours_are_the_classes_and_those_of_noise_are_not(tmp_path):
  folder = tmp_path
  for split, count in (("train", 30), ("test", 29)):  # few borders: two colours mixed are near grey
    write(folder, split, count, cells=2)
  result = cluster(folder)
  figures = result["figures"]
  assert figures["test/miou"] > 0.9 and figures["test/miou@raw_pixels"] > 0.9
  assert figures["test/miou@low"] <= figures["test/miou"] <= figures["test/miou@high"]
  assert figures["test/miou@constant"] == pytest.approx(1 / 16, abs=0.02)
  assert result["details"][0]["title"] == "Clusters of test"
  assert figures == pytest.approx(cluster(folder, devices=8)["figures"], abs=2e-3)
  assert cluster(folder, sighted=0.0)["figures"]["test/pixel_accuracy"] < 0.35
  with pytest.raises(ValueError, match="has class 3; num_classes=3 allows 0 to 2, and 255"):
    cluster(folder, num_classes=3)
