"""Data sets of TFDS and Hugging Face, read by number with their images as they are.

Skipped without the packages of requirements-formats.txt.
"""

import io
import pickle
import sys

import pytest
from records import noise, png

from jepa_vl.data import common, prepared, sources
from jepa_vl.data.transforms import DamagedRecord


def image(i):
  return png(noise((20, 24), i))


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
  """`pairs_for_test`, prepared: seven records to train on and three to test."""
  tfds = pytest.importorskip("tensorflow_datasets")
  pytest.importorskip("importlib_resources")

  class PairsForTest(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      features = {
        "image": tfds.features.Image(),
        "text": tfds.features.Text(),
        "label": tfds.features.ClassLabel(names=["cat", "dog"]),
        "tags": tfds.features.Sequence(tfds.features.Text()),
      }
      features = tfds.features.FeaturesDict(features)
      return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, _):
      return {"train": self._generate_examples(0, 7), "test": self._generate_examples(7, 10)}

    def _generate_examples(self, first, end):
      for i in range(first, end):
        text = f"number {i}" if i != 4 else ""
        tags = ["red", "\xe9"][: i % 3]
        yield f"{i}", {"image": io.BytesIO(image(i)), "text": text, "label": i % 2, "tags": tags}

  folder = tmp_path_factory.mktemp("tfds")
  PairsForTest(data_dir=folder, file_format="array_record").download_and_prepare()
  return folder / "pairs_for_test" / "1.0.0"


def usable(source):
  records = {}
  for i in range(len(source)):
    try:
      record = source[i]
      records[record["caption"]] = record
    except DamagedRecord as e:
      assert "the caption is empty" in str(e)
  return records


def test_tfds(tfds_folder):
  source = sources.open_source("tfds", str(tfds_folder), "train")
  assert len(source) == 7
  found = usable(source)
  assert found == {
    f"number {i}": {"image": image(i), "caption": f"number {i}", "label": i % 2}
    | ({"tags": ["red", "\xe9"][: i % 3]} if i % 3 else {})
    for i in (0, 1, 2, 3, 5, 6)
  }
  test = sources.open_source("tfds", str(tfds_folder), "test")
  assert len(test) == 3 and test.identity != source.identity
  again = pickle.loads(pickle.dumps(source))
  assert usable(again) == found and again.identity == source.identity
  assert "tensorflow" not in sys.modules
  classes = common.Keys(caption_key="label")
  named = sources.open_source("tfds", str(tfds_folder), "test", classes)
  assert {(r["caption"], r["label"]) for r in (named[i] for i in range(3))} == {
    ("dog", 1), ("cat", 0)}  # fmt: skip


def test_tfds_says_what_is_missing(tfds_folder):
  with pytest.raises(ValueError, match="split 'nope': Unknown split.*\n.*data.split"):
    sources.open_source("tfds", str(tfds_folder), "nope")
  with pytest.raises(ValueError, match="cannot open 'none_such'.*not found.*\n.*prepared"):
    sources.open_source("tfds", "none_such", "train")
  with pytest.raises(ValueError, match="looked for 'alt', found (image|text|label|tags), "):
    sources.open_source("tfds", str(tfds_folder), "train", common.Keys(caption_key="alt"))


def test_hugging_face_on_disk(tmp_path):
  datasets = pytest.importorskip("datasets")
  rows = {
    "image": [{"bytes": image(i), "path": None} for i in range(6)],
    "text": [f"number {i}" for i in range(5)] + [None],
    "label": [0, 1, 0, 1, 0, 1],
    "other": [{"bytes": b"no image", "path": None}] * 6,
  }
  features = {
    "image": datasets.Image(), "text": datasets.Value("string"), "other": datasets.Image(),
    "label": datasets.ClassLabel(names=["cat", "dog"]),
  }  # fmt: skip
  data = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
  data.save_to_disk(tmp_path / "one")
  datasets.DatasetDict({"train": data, "test": data.select([5, 4])}).save_to_disk(tmp_path / "two")
  source = sources.open_source("hugging_face", str(tmp_path / "one"), "train")
  assert source[3] == {"image": image(3), "caption": "number 3", "label": 1}
  with pytest.raises(DamagedRecord, match="record 5: the caption is missing"):
    source[5]
  again = pickle.loads(pickle.dumps(source))
  assert again[2] == source[2] and again.identity == source.identity
  test = sources.open_source("hugging_face", str(tmp_path / "two"), "test")
  assert len(test) == 2 and test[1]["caption"] == "number 4"
  keys = common.Keys(caption_key="label")
  assert sources.open_source("hugging_face", str(tmp_path / "one"), "", keys)[3]["caption"] == "dog"
  with pytest.raises(ValueError, match="no split 'val', only train, test"):
    sources.open_source("hugging_face", str(tmp_path / "two"), "val")
  with pytest.raises(ValueError, match="save_to_disk wrote; .*data.source='parquet'"):
    sources.open_source("hugging_face", str(tmp_path), "train")


def test_tags_of_bytes_are_texts():
  rows = [{"image": image(0), "text": b"t", "tags": [b"red", "\xe9".encode(), b"k\xe4se", "x"]}]
  source = prepared.Prepared(
    rows, name="x", fields=["image", "text", "tags"], classes={}, parts=[], keys=common.USUAL
  )
  assert source[0]["tags"] == ["red", "\xe9", "k\ufffdse", "x"]


def test_what_has_no_class_is_a_damaged_record():
  rows = [{"image": image(0), "text": number} for number in (1, None, -1, 2)]
  source = prepared.Prepared(
    rows, name="x", fields=["image", "text"], classes={"text": ["cat", "dog"]}, parts=[],
    keys=common.USUAL,
  )  # fmt: skip
  assert source[0]["caption"] == "dog"
  for i in (1, 2, 3):
    with pytest.raises(DamagedRecord, match=f"x, record {i}: the caption is missing"):
      source[i]


@pytest.mark.parametrize(
  ("open_", "module"),
  [(prepared.open_tfds, "tensorflow_datasets"), (prepared.open_hugging_face, "datasets")],
)
def test_a_missing_library_is_said(monkeypatch, open_, module):
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(ValueError, match="pip install"):
    open_("x", "train", common.USUAL)
