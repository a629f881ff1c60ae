"""Segmentation and depth sets in the layouts that they have on their users' disks."""

import functools
import os

import numpy as np

from jepa_vl.data import common, maps
from jepa_vl.data.transforms import DamagedRecord

_IMAGES = (".jpg", ".jpeg", ".png")
# COCO-Stuff's pixel maps number 182 classes from 0, of which COCO dropped these.
_COCO_HOLES = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)


def _table(classes):
  """Of a data set's own numbers that count, in order: (256,) number -> class, else VOID."""
  table = np.full(256, maps.VOID, np.uint8)
  table[classes] = np.arange(len(classes))
  return table


ADE20K = _table(range(1, 151))  # 0 is "other"
COCO_STUFF = _table([i for i in range(182) if i not in _COCO_HOLES])


class Maps:
  """Images with a map each: `image`, `file_name`, and `segmentation` or `depth` (PNG bytes).

  pairs: (path of the image, path of its map); field: what the map is; table: (256,) from the files'
  class numbers to ours, or None where they are the same.
  """

  def __init__(self, pairs, field, table=None):
    self._pairs, self._field, self._table = pairs, field, table

  def __len__(self):
    return len(self._pairs)

  def __getitem__(self, index):
    """The record at `index`. Raises DamagedRecord."""
    image, path = self._pairs[index]
    data = common.read_file(path)
    if self._table is not None:
      try:
        data = maps.png(self._table[maps.classes(data)])
      except DamagedRecord as e:
        raise e.at(path) from e
    name = os.path.basename(image)
    return {"image": common.read_file(image), self._field: data, "file_name": name}

  def where(self, index):
    """The image's file."""
    return self._pairs[index][0]

  @property
  def paths(self):
    """The files of all records."""
    return [path for pair in self._pairs for path in pair]

  @functools.cached_property
  def identity(self):
    """Changes with the files' names and a sample of what is in them."""
    names = [[os.path.basename(path) for path in pair] for pair in self._pairs]
    table = "" if self._table is None else self._table.tolist()
    return common.identity(self, [self._field, names, table])


def _folder(*parts, what):
  path = os.path.join(*parts)
  if not os.path.isdir(path):
    raise FileNotFoundError(f"{what}: looked for the folder {path!r}, which is not there")
  return path


def _pairs(images, annotations, names, suffixes):
  """(image, map) for each of `names`, or for all images; a map has the first suffix that exists."""
  found = names or sorted(f for f in os.listdir(images) if f.lower().endswith(_IMAGES))
  if not found:
    raise ValueError(f"{images!r} holds no image ({', '.join(_IMAGES)})")
  pairs, there = [], set(os.listdir(annotations))
  for name in found:
    stem = os.path.splitext(name)[0]
    maps_ = [stem + suffix for suffix in suffixes if stem + suffix in there]
    if not maps_:
      expected = " or ".join(os.path.join(annotations, stem + suffix) for suffix in suffixes)
      raise FileNotFoundError(f"{os.path.join(images, name)} has no map: looked for {expected}")
    pairs.append((os.path.join(images, name), os.path.join(annotations, maps_[0])))
  return pairs


def ade20k(path, split, keys):
  """ADEChallengeData2016: images/SPLIT/*.jpg, annotations/SPLIT/*.png; training, validation."""
  return _beside(path, split, "ade20k", "annotations", (".png",), ADE20K)


def coco_stuff(path, split, keys):
  """COCO-Stuff: images/SPLIT, annotations/SPLIT with NAME_labelTrainIds.png, or the pixel maps.

  SPLIT is train2017 or val2017; 171 classes.
  """
  images = _folder(path, "images", split, what="coco_stuff")
  annotations = _folder(path, "annotations", split, what="coco_stuff")
  converted = any(name.endswith("_labelTrainIds.png") for name in os.listdir(annotations))
  suffix = "_labelTrainIds.png" if converted else ".png"
  table = None if converted else COCO_STUFF
  return Maps(_pairs(images, annotations, None, (suffix,)), "segmentation", table)


def voc(path, split, keys):
  """VOC 2012: JPEGImages, SegmentationClass, ImageSets/Segmentation/SPLIT.txt; 21 classes.

  path: VOC2012, or the folder that holds VOCdevkit/VOC2012.
  """
  inside = os.path.join(path, "VOCdevkit", "VOC2012")
  root = inside if os.path.isdir(inside) else path
  listed = os.path.join(root, "ImageSets", "Segmentation", f"{split}.txt")
  if not os.path.isfile(listed):
    raise FileNotFoundError(f"voc: looked for {listed!r}, the list of the split's images")
  with open(listed, encoding="utf-8") as f:
    names = [f"{line.strip()}.jpg" for line in f if line.strip()]
  if not names:
    raise ValueError(f"{listed!r} names no image")
  images = _folder(root, "JPEGImages", what="voc")
  return Maps(
    _pairs(images, _folder(root, "SegmentationClass", what="voc"), names, (".png",)), "segmentation"
  )


def segmentation_folder(path, split, keys):
  """images/SPLIT/*.jpg and annotations/SPLIT/*.png of class numbers, 255 void."""
  return _beside(path, split, "segmentation_folder", "annotations", (".png",), None)


def depth_folder(path, split, keys):
  """images/SPLIT/*.jpg and depth/SPLIT/*.png, 16 bits, millimetres, 0 unknown."""
  return _beside(path, split, "depth_folder", "depth", (".png",), None)


def _beside(path, split, name, annotations, suffixes, table):
  images = _folder(path, "images", split, what=name)
  found = _pairs(images, _folder(path, annotations, split, what=name), None, suffixes)
  return Maps(found, "depth" if annotations == "depth" else "segmentation", table)


class NYUv2:
  """nyu_depth_v2_labeled.mat with splits.mat beside it: 795 training, 654 test images, with depth.

  path: the folder that holds both; split: train or test.

  Raises:
    FileNotFoundError: a file is not there. ValueError: h5py is missing, or another split.
  """

  def __init__(self, path, split, keys):
    self._path = os.path.join(path, "nyu_depth_v2_labeled.mat")
    splits = os.path.join(path, "splits.mat")
    for file in (self._path, splits):
      if not os.path.isfile(file):
        raise FileNotFoundError(f"nyuv2: looked for {file!r}, which is not there")
    if split not in ("train", "test"):
      raise ValueError(f"nyuv2 has the splits train and test, not {split!r}")
    try:
      import h5py  # late: an optional dependency
    except ImportError as e:
      raise ValueError(
        "nyuv2 needs h5py (pip install -r requirements-formats.txt)"
      ) from e
    import scipy.io

    self._open = functools.cache(lambda: h5py.File(self._path))
    self._rows = scipy.io.loadmat(splits)[f"{split}Ndxs"].ravel().astype(int) - 1
    self._split = split

  def __len__(self):
    return len(self._rows)

  def __getitem__(self, index):
    """The record at `index`. Raises DamagedRecord."""
    row, file = int(self._rows[index]), self._open()
    try:
      # MATLAB's columns come first.
      image, depth = file["images"][row].transpose(2, 1, 0), file["depths"][row].T
    except (OSError, KeyError, ValueError, IndexError) as e:
      raise DamagedRecord(f"{self.where(index)} cannot be read ({e})", "unreadable") from e
    millimetres = np.clip(np.round(depth * 1000), 0, 65535).astype(np.uint16)
    name = f"{row + 1:05d}.png"
    return {"image": maps.png(image), "depth": maps.png(millimetres), "file_name": name}

  def where(self, index):
    """The file and the image's number in it, counted from 1."""
    return f"{self._path}, image {self._rows[index] + 1}"

  @property
  def paths(self):
    """The file of all records."""
    return [self._path]

  @functools.cached_property
  def identity(self):
    """Changes with the split's numbers and a sample of the images."""
    return common.identity(self, [self._rows.tolist()])
