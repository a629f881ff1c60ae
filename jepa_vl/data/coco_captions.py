"""Several captions per image: COCO's own JSON, and Karpathy's splits of COCO and Flickr30k."""

import functools
import json
import os

from jepa_vl.data import common
from jepa_vl.data.transforms import DamagedRecord

# Where the images of a JSON may lie, seen from its folder; {} is the data set's part, "val2017".
_PLACES = (
  "{}", "../{}", "images/{}", "../images/{}", "", "images", "..", "../images",
  "flickr30k-images", "flickr30k_images", "../flickr30k-images", "Images",
)  # fmt: skip


class CocoCaptions:
  """The images of a captions JSON, in its order; `captions` holds all of each, `caption` the first.

  path: annotations/captions_val2017.json of COCO, whose images lie in val2017 beside `annotations`,
  or dataset_coco.json and dataset_flickr30k.json of Karpathy and Fei-Fei (arXiv 1412.2306), of
  which `split` picks train, val, test or restval, or several: "train+restval". Images are looked
  for beside the JSON and in the folders that their data sets are unpacked to, or in `image_root`.

  Raises:
    FileNotFoundError: no such JSON, or no image where they may be.
    ValueError: a JSON of another kind, or a split that it does not have.
  """

  def __init__(self, path, split, keys):
    self._path = os.path.expanduser(path)
    content = _load(self._path)
    read = _karpathy if "sentences" in content["images"][0] else _coco
    try:
      self._rows = read(content, self._path, split)  # (image's name, its captions)
    except (KeyError, TypeError) as e:
      raise ValueError(f"{path}: an entry is not as in COCO's or Karpathy's JSON ({e!r})") from e
    names = [name for name, _ in self._rows]
    self._folder = _image_folder(names, self._path, keys.image_root)

  def __len__(self):
    return len(self._rows)

  def __getitem__(self, index):
    """The record at `index`. Raises DamagedRecord."""
    name, captions = self._rows[index]
    try:
      captions = [common.check_caption(caption) for caption in captions]
      if not captions:
        raise DamagedRecord("the caption is missing", "no_caption")
    except DamagedRecord as e:
      raise e.at(self.where(index)) from e
    image = common.read_file(os.path.join(self._folder, name))
    return {"image": image, "caption": captions[0], "captions": captions, "file_name": name}

  def where(self, index):
    """The JSON and the image of the record at `index`."""
    return f"{self._path}, {self._rows[index][0]}"

  @property
  def paths(self):
    """The files of all records' images."""
    return [os.path.join(self._folder, name) for name, _ in self._rows]

  @functools.cached_property
  def identity(self):
    """Changes with the images' names, the captions and a sample of the images."""
    return common.identity(self, self._rows)


def _load(path):
  if not os.path.isfile(path):
    raise FileNotFoundError(
      f"path {path!r} is no file; data.source='coco_captions' reads COCO's captions_val2017.json "
      "or, of Karpathy's splits, dataset_coco.json and dataset_flickr30k.json"
    )
  with open(path, encoding="utf-8") as f:
    try:
      content = json.load(f)
    except ValueError as e:
      raise ValueError(f"{path} is no JSON ({e})") from e
  images = content.get("images") if isinstance(content, dict) else None
  if not isinstance(images, list) or not images or not isinstance(images[0], dict):
    raise ValueError(f"{path} has no list `images`: it is no captions JSON of COCO or Karpathy")
  return content


def _karpathy(content, path, split):
  images, wanted = content["images"], split.split("+")
  there = list(dict.fromkeys(image["split"] for image in images))
  if unknown := [name for name in wanted if name not in there]:
    raise ValueError(
      f"{path} has no split {unknown[0]!r}, only {', '.join(there)}; join several by '+'"
    )
  return [
    (os.path.join(image.get("filepath", ""), image["filename"]),
     [sentence["raw"] for sentence in image["sentences"]])
    for image in images
    if image["split"] in wanted
  ]  # fmt: skip


def _coco(content, path, split):
  annotations = content.get("annotations")
  if not annotations or "caption" not in annotations[0]:
    raise ValueError(f"{path} has no captions in its `annotations`; COCO's are captions_*.json")
  captions = {image["id"]: [] for image in content["images"]}
  for annotation in annotations:
    image = annotation["image_id"]
    if image not in captions:
      raise ValueError(f"{path}: a caption is of image {image}, which is not in `images`")
    captions[image].append(annotation["caption"])
  return [(image["file_name"], captions[image["id"]]) for image in content["images"]]


def _image_folder(names, path, image_root):
  """The first folder that has one of a sample of the images: `image_root`, or a usual one."""
  # The images of COCO's own JSON lie in a folder of its name; Karpathy's names hold theirs.
  part = os.path.splitext(os.path.basename(path))[0].removeprefix("captions_")
  folders = [os.path.join(os.path.dirname(path), p.replace("{}", part)) for p in _PLACES]
  if image_root:
    root = os.path.expanduser(image_root)
    folders = [root, os.path.join(root, part), *folders]
  return common.image_folder(path, names, folders)
