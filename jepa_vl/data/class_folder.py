"""Labelled images in a folder per class: ROOT/CLASS/x.jpg, ImageNet's and ImageNet-9's layout."""

import functools
import os

from jepa_vl.data import common

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class ClassFolder:
  """The images in and below each class's folder, in the order of their paths.

  A record has `image`, `class` (the place of its folder among the sorted ones), `class_name` (the
  folder's name) and `file_name` (the path below that folder). There is no caption: for evaluations.

  Raises:
    FileNotFoundError: the root is no folder.
    ValueError: it has no class folders, or one is without an image.
  """

  def __init__(self, path):
    self._root = os.path.expanduser(path)
    if "://" in path or not os.path.isdir(self._root):
      raise FileNotFoundError(
        f"path {path!r} is no folder; data.source='class_folder' looks there for a folder of "
        f"images per class, {os.path.join(path, 'CLASS', 'x.jpg')}"
      )
    with os.scandir(self._root) as entries:
      inside = sorted((e.name, e.is_dir()) for e in entries if not e.name.startswith("."))
    self.classes = [name for name, is_dir in inside if is_dir]
    if not self.classes:
      flat = sum(name.lower().endswith(_SUFFIXES) for name, _ in inside)
      raise ValueError(
        f"{path!r} holds no class folders (and {flat} images); looked for "
        f"{os.path.join(path, 'CLASS', 'x.jpg')}: sort the images into a folder per class"
      )
    self._files = [(c, f) for c, name in enumerate(self.classes) for f in self._images(name)]

  def _images(self, name):
    root, found = os.path.join(self._root, name), []
    for folder, _, files in os.walk(root, followlinks=True):
      chosen = [f for f in files if f.lower().endswith(_SUFFIXES) and not f.startswith(".")]
      found += [os.path.relpath(os.path.join(folder, f), root) for f in chosen]
    if not found:
      raise ValueError(
        f"{root!r} counts as a class and holds no image ({', '.join(_SUFFIXES)}); remove the "
        "folder, or complete it"
      )
    return sorted(found)

  def __len__(self):
    return len(self._files)

  def __getitem__(self, index):
    """The record at `index`. Raises DamagedRecord."""
    number, file = self._files[index]
    image = common.read_file(self.where(index))
    name = self.classes[number]
    return {"image": image, "class": number, "class_name": name, "file_name": file}

  def where(self, index):
    """The file of the record at `index`."""
    number, file = self._files[index]
    return os.path.join(self._root, self.classes[number], file)

  @property
  def paths(self):
    """The files of all records."""
    return map(self.where, range(len(self)))

  @functools.cached_property
  def identity(self):
    """Changes with the names of classes and files and a sample of what is in them."""
    return common.identity(self, [self.classes, self._files])
