"""Data sets prepared by TensorFlow Datasets or Hugging Face's `datasets`.

Both give any record by its number and leave images encoded. Neither library is needed, or
imported, unless its data is asked for; TensorFlow itself never is.
"""

import contextlib
import functools
import os

from jepa_vl.data import common
from jepa_vl.data.transforms import DamagedRecord

_IMAGES = common.IMAGE_NAMES + common.PATH_NAMES


class Prepared:
  """Records of another library's data set.

  rows: indexable, of dicts; fields: names in it; classes: {field: names of its classes}; a caption
  that is a class is that class's name.
  """

  def __init__(self, rows, *, name, fields, classes, parts, keys):
    self._rows, self._name, self._parts, self._root = rows, name, parts, keys.image_root
    self._image, self._caption = pick_fields(name, fields, keys)
    self._classes = classes.get(self._caption)
    if not len(rows):
      raise ValueError(f"{name} holds no record")

  def __len__(self):
    return len(self._rows)

  def __getitem__(self, index):
    """The record at `index`. Raises DamagedRecord."""
    try:
      row = dict(self._rows[int(index)])
    except Exception as e:  # each library has a family of its own
      reason = f"cannot be read ({type(e).__name__}: {e})"
      raise DamagedRecord(f"{self.where(index)}: {reason}", "unreadable") from e
    try:
      image = common.image_bytes(row.pop(self._image), self._root)
      caption = row[self._caption]
      if self._classes:
        caption = common.class_name(self._classes, caption)
      else:
        del row[self._caption]
      return common.make_record(image, caption, row)
    except DamagedRecord as e:
      raise e.at(self.where(index)) from e

  def where(self, index):
    """What names the record at `index`."""
    return f"{self._name}, record {index}"

  @functools.cached_property
  def identity(self):
    """Changes with the data set's name, version and split or files, and a sample of records."""
    return common.identity(self, self._parts)


def pick_fields(name, fields, keys):
  """The fields of image and caption; raises ValueError that lists what is there."""
  try:
    image = common.pick("image", fields, keys.image_key, _IMAGES)
    return image, common.pick("caption", fields, keys.caption_key, common.CAPTION_NAMES)
  except DamagedRecord as e:
    raise ValueError(f"{name}: {e}") from e


def open_tfds(path, split, keys):
  """A TFDS data set prepared as array_record or parquet: "name", "name/config:1.0.0", a folder.

  Names are looked for in TFDS_DATA_DIR or ~/tensorflow_datasets; buckets as TFDS does.
  """
  try:
    import tensorflow_datasets as tfds
  except ImportError as e:
    raise ValueError(f"data.source='tfds' needs {e.name}: pip install tensorflow-datasets") from e
  with _explained(path, split):
    is_folder = "://" in path or os.path.isdir(os.path.expanduser(path))
    open_ = tfds.builder_from_directory if is_folder else tfds.builder
    builder = open_(os.path.expanduser(path) if is_folder else path)
  features = builder.info.features
  image, _ = pick_fields(path, features, keys)
  with _explained(path, split):
    rows = builder.as_data_source(split=split, decoders={image: tfds.decode.SkipDecoding()})
  classes = {k: f.names for k, f in features.items() if isinstance(f, tfds.features.ClassLabel)}
  return Prepared(
    rows, name=f"{builder.info.full_name} {split}", fields=features, classes=classes,
    parts=[builder.info.full_name, split], keys=keys,
  )  # fmt: skip


@contextlib.contextmanager
def _explained(path, split):
  try:
    yield
  except Exception as e:  # of many kinds, with pages of text
    raise ValueError(
      f"TFDS cannot open {path!r}, split {split!r}: {str(e).splitlines()[0]}\nIt must have been "
      f"prepared: tfds.builder({path!r}, file_format='array_record').download_and_prepare(); "
      "data.split names the split, TFDS_DATA_DIR the folder of all data sets"
    ) from e


def open_hugging_face(path, split, keys):
  """What `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
  try:
    import datasets
  except ImportError as e:
    raise ValueError(f"data.source='hugging_face' needs {e.name}: pip install datasets") from e
  try:
    data = datasets.load_from_disk(os.path.expanduser(path))
  except Exception as e:
    raise ValueError(
      f"datasets cannot open {path!r}: {e}\nIt must be a folder that save_to_disk wrote; the "
      "Parquet files of a download are read with data.source='parquet'"
    ) from e
  if isinstance(data, datasets.DatasetDict):
    if split not in data:
      raise ValueError(f"{path}: no split {split!r}, only {', '.join(data)}; see data.split")
    data = data[split]
  features = data.features
  image, caption = pick_fields(path, features, keys)
  if isinstance(features[image], datasets.Image):
    data = data.cast_column(image, datasets.Image(decode=False))
  number = lambda f: isinstance(f, datasets.ClassLabel) or str(getattr(f, "dtype", ""))[:3] == "int"
  others = [k for k, f in features.items() if number(f) or k in ("tags", "concept")]
  rows = data.select_columns(list(dict.fromkeys([image, caption, *others])))
  files = [f["filename"] for f in data.cache_files]
  return Prepared(
    rows, name=path, fields=features, keys=keys,
    classes={k: f.names for k, f in features.items() if isinstance(f, datasets.ClassLabel)},
    parts=[f"{os.path.basename(f)}:{os.path.getsize(f)}" for f in files],
  )  # fmt: skip
