"""Segmentation and depth sets in the layouts that they have on their users' disks."""

import io

import numpy as np
import PIL.Image
import pytest
from records import noise, png

from jepa_vl.data import dense_sets, maps, sources
from jepa_vl.data.transforms import DamagedRecord


def place(path, array):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(maps.png(array))


def palette(path, array):
  """VOC's PNGs: class numbers are places in a palette."""
  path.parent.mkdir(parents=True, exist_ok=True)
  image = PIL.Image.fromarray(array, mode="P")
  image.putpalette([i * 7 % 256 for i in range(768)])
  image.save(path)


def label_map(seed, top):
  return np.random.default_rng(seed).integers(top, size=(20, 24)).astype(np.uint8)


def found(name, path, split, index=0):
  record = sources.open_source(name, str(path), split)[index]
  return record["file_name"], maps.classes(record["segmentation"])


def test_ade20k(tmp_path):
  raw = label_map(0, 151)
  for i in range(2):
    place(tmp_path / f"images/validation/ADE_val_{i}.jpg", noise((20, 24), i))
  place(tmp_path / "annotations/validation/ADE_val_0.png", raw)
  place(tmp_path / "annotations/validation/ADE_val_1.png", raw[::-1])
  name, classes = found("ade20k", tmp_path, "validation")
  assert name == "ADE_val_0.jpg"
  np.testing.assert_array_equal(classes, np.where(raw == 0, 255, raw.astype(int) - 1))
  assert len(sources.open_source("ade20k", str(tmp_path), "validation")) == 2


def test_coco_stuff_as_converted_and_as_downloaded(tmp_path):
  """The pixel maps number 182 classes with eleven holes; the converted files 171."""
  place(tmp_path / "images/val2017/000000000139.jpg", noise((20, 24), 0))
  raw = np.array([[0, 10, 11, 12], [181, 91, 90, 255]], np.uint8)
  place(tmp_path / "annotations/val2017/000000000139.png", raw)
  _, classes = found("coco_stuff", tmp_path, "val2017")
  assert classes.tolist() == [[0, 10, 255, 11], [170, 80, 255, 255]]
  place(tmp_path / "annotations/val2017/000000000139_labelTrainIds.png", np.uint8([[3, 170, 255]]))
  assert found("coco_stuff", tmp_path, "val2017")[1].tolist() == [[3, 170, 255]]
  assert (dense_sets.COCO_STUFF != 255).sum() == 171


@pytest.mark.parametrize("root", ["VOCdevkit/VOC2012", "."])
def test_voc_reads_places_of_the_palette(tmp_path, root):
  where = tmp_path / root
  raw = label_map(1, 21)
  raw[0] = 255
  place(where / "JPEGImages/2007_1.jpg", noise((20, 24), 0))
  place(where / "JPEGImages/2007_9.jpg", noise((20, 24), 1))
  palette(where / "SegmentationClass/2007_9.png", raw)
  (where / "ImageSets/Segmentation").mkdir(parents=True)
  (where / "ImageSets/Segmentation/val.txt").write_text("2007_9\n")
  name, classes = found("voc", tmp_path, "val")
  assert name == "2007_9.jpg"
  np.testing.assert_array_equal(classes, raw)


def test_folders_of_labels_and_of_depth(tmp_path):
  raw, depth = label_map(2, 5), np.random.default_rng(0).integers(500, 9000, (20, 24))
  place(tmp_path / "images/val/a.png", noise((20, 24), 0))
  place(tmp_path / "annotations/val/a.png", raw)
  place(tmp_path / "depth/val/a.png", depth.astype(np.uint16))
  np.testing.assert_array_equal(found("segmentation_folder", tmp_path, "val")[1], raw)
  record = sources.open_source("depth_folder", str(tmp_path), "val")[0]
  np.testing.assert_allclose(maps.depth(record["depth"]), depth / 1000, rtol=1e-6)


def test_nyuv2_reads_matlab_s_file(tmp_path):
  h5py = pytest.importorskip("h5py")
  import scipy.io

  rng = np.random.default_rng(0)
  images = rng.integers(256, size=(3, 3, 24, 20)).astype(np.uint8)  # MATLAB's order, reversed
  depths = rng.uniform(0.7, 9, size=(3, 24, 20)).astype(np.float32)
  with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w") as f:
    f["images"], f["depths"] = images, depths
  splits = {"trainNdxs": [[2]], "testNdxs": [[1], [3]]}
  scipy.io.savemat(tmp_path / "splits.mat", splits)
  source = sources.open_source("nyuv2", str(tmp_path), "test")
  assert len(source) == 2
  record = source[1]
  pixels = np.asarray(PIL.Image.open(io.BytesIO(record["image"])))
  np.testing.assert_array_equal(pixels, images[2].transpose(2, 1, 0))
  np.testing.assert_allclose(maps.depth(record["depth"]), depths[2].T, atol=5e-4)
  with pytest.raises(ValueError, match="splits train and test, not 'val'"):
    sources.open_source("nyuv2", str(tmp_path), "val")


@pytest.mark.parametrize(
  ("name", "split", "looked_for"),
  [
    ("ade20k", "validation", "images/validation"),
    ("coco_stuff", "val2017", "images/val2017"),
    ("voc", "val", "ImageSets/Segmentation/val.txt"),
    ("nyuv2", "test", "nyu_depth_v2_labeled.mat"),
    ("segmentation_folder", "val", "images/val"),
    ("depth_folder", "val", "images/val"),
  ],
)
def test_a_wrong_layout_says_what_was_looked_for(tmp_path, name, split, looked_for):
  with pytest.raises(FileNotFoundError, match=f"looked for.*{tmp_path}/{looked_for}"):
    sources.open_source(name, str(tmp_path), split)


def test_an_image_without_its_map_says_which(tmp_path):
  place(tmp_path / "images/training/a.jpg", noise((20, 24), 0))
  (tmp_path / "annotations/training").mkdir(parents=True)
  with pytest.raises(FileNotFoundError, match="a.jpg has no map: looked for .*training/a.png"):
    sources.open_source("ade20k", str(tmp_path), "training")


def test_what_is_no_label_map_is_a_damaged_record(tmp_path):
  """Counted and left out; a colour picture is no label map."""
  for i, array in enumerate((label_map(0, 9), noise((20, 24), 1))):
    place(tmp_path / f"images/val/{i}.png", noise((20, 24), i))
    place(tmp_path / f"annotations/val/{i}.png", array)
  place(tmp_path / "images/val/2.png", noise((20, 24), 2))
  (tmp_path / "annotations/val/2.png").write_bytes(b"\\x89PNG cut short")
  source = sources.open_source("segmentation_folder", str(tmp_path), "val")
  with pytest.raises(DamagedRecord, match="mode RGB; expected one class number"):
    maps.classes(source[1]["segmentation"])
  indices, images, found_maps = maps.read(source, range(3), "segmentation")
  assert indices == [0] and len(images) == len(found_maps) == 1
  with pytest.raises(ValueError, match="0.png has no 'depth', a PNG of millimetres per pixel"):
    maps.read(source, range(3), "depth")


@pytest.mark.parametrize("field", ["segmentation", "depth"])
def test_an_empty_map_is_a_damaged_record(field):
  with pytest.raises(DamagedRecord, match="map"):
    maps.DECODERS[field](b"")
  rows = [{"image": png(noise((4, 4), 0)), field: b""}]
  assert maps.read(rows, [0], field) == ([], [], [])
