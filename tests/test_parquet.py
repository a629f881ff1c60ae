"""Rows of Parquet by number, whatever the row groups and however the images are held."""

import json
import os
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from records import noise, png, stands_in

from jepa_vl.data import common, parquet, sources
from jepa_vl.data.transforms import DamagedRecord


def image(i):
  return png(noise((20, 24), i))


def write(path, numbers, *, group=3, **columns):
  rows = {"image": [image(i) for i in numbers], "caption": [f"number {i}" for i in numbers]}
  pq.write_table(pa.table(rows | columns), path, row_group_size=group)
  return str(path)


def open_files(pattern, **keys):
  return parquet.Parquet(str(pattern), common.Keys(**keys))


def captions(source):
  return [source[i]["caption"] for i in range(len(source))]


@pytest.fixture
def files(tmp_path):
  write(tmp_path / "b.parquet", range(7, 20), group=5)
  write(tmp_path / "a.parquet", range(7))
  return tmp_path


def test_rows_come_in_the_order_of_files_and_row_groups(files):
  source = open_files(files)
  assert captions(source) == [f"number {i}" for i in range(20)]
  assert all(source[i]["image"] == image(i) for i in (0, 6, 7, 19))
  assert len(pickle.dumps(source)) < 3000 and pickle.loads(pickle.dumps(source))[9] == source[9]


def test_images_as_bytes_structs_and_paths(tmp_path):
  for name in ("x.png", "sub.png"):
    (tmp_path / name).write_bytes(image(1))
  structs = [{"bytes": image(0), "path": "a.png"}, {"bytes": None, "path": "x.png"}]
  path = write(tmp_path / "struct.parquet", [0, 1], image=structs, label=[4, 5], tags=[["a"], []])
  assert open_files(path)[0] == {
    "image": image(0), "caption": "number 0", "label": 4, "tags": ["a"]}  # fmt: skip
  assert open_files(path)[1]["image"] == image(1)
  rows = {"filepath": ["x.png", "none.png"], "text": ["a", "b"]}
  pq.write_table(pa.table(rows), tmp_path / "paths.parquet")
  source = open_files(tmp_path / "paths.parquet")
  assert source[0] == {"image": image(1), "caption": "a"}
  with pytest.raises(DamagedRecord, match="paths.parquet, .* 'none.png|none.png' cannot be read"):
    source[1]
  (tmp_path / "root").mkdir()
  (tmp_path / "root" / "none.png").write_bytes(image(2))
  root = str(tmp_path / "root")
  assert open_files(tmp_path / "paths.parquet", image_root=root)[1]["image"] == image(2)


def test_keys_name_columns_and_a_class_column_gives_its_name(tmp_path):
  info = {"info": {"features": {"kind": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
  table = pa.table({"photo": [image(0)], "image": [image(1)], "kind": [1], "text": ["t"]})
  pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), tmp_path / "x")
  assert open_files(tmp_path / "x")[0] == {"image": image(1), "caption": "t", "kind": 1}
  found = open_files(tmp_path / "x", image_key="photo", caption_key="kind")[0]
  assert found["image"] == image(0) and (found["caption"], found["kind"]) == ("dog", 1)
  with pytest.raises(ValueError, match="no caption: looked for 'alt', found photo, image, kind"):
    open_files(tmp_path / "x", caption_key="alt")


def test_what_has_no_class_is_a_damaged_record(tmp_path):
  """-1 is Hugging Face's mark for what has no label, and no place counted from the end."""
  info = {"info": {"features": {"text": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
  kinds = pa.array([1, -1, 2, None], pa.int64())
  table = pa.table({"image": [image(0)] * 4, "text": kinds})
  pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), tmp_path / "x")
  source = open_files(tmp_path / "x")
  assert source[0]["caption"] == "dog"
  for i in (1, 2, 3):
    with pytest.raises(DamagedRecord, match=f"row {i}: the caption is missing") as e:
      source[i]
    assert e.value.reason == "no_caption"


def test_bad_files_and_columns_are_named(files, monkeypatch):
  whole = (files / "a.parquet").read_bytes()
  for content in (b"", b"x" * 5000, whole[:-100]):
    (files / "a.parquet").write_bytes(content)
    with pytest.raises(ValueError, match="a.parquet is not a whole Parquet file"):
      open_files(files)
  pq.write_table(pa.table({"caption": ["x"]}), files / "c.parquet")
  (files / "a.parquet").write_bytes(whole)
  with pytest.raises(ValueError, match="c.parquet has no column .'image'., but .*a.parquet has"):
    open_files(files)
  with pytest.raises(FileNotFoundError, match="nothing.*matches no file"):
    open_files(files / "nothing*")
  write(files / "c.parquet", [])
  with pytest.raises(ValueError, match="hold no row"):
    open_files(files / "c.parquet")
  monkeypatch.setattr(parquet.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match="pip install pyarrow"):
    open_files(files)


def test_bad_rows_are_damaged_records(tmp_path):
  text = [b"good", b"k\xe4se", b"", None, b"good"]
  pictures = [image(0), image(1), image(2), image(3), None]
  source = open_files(write(tmp_path / "x", range(5), image=pictures, caption=text))
  assert source[0]["caption"] == "good"
  for i, reason in {1: "not UTF-8", 2: "is empty", 3: "missing", 4: "image is empty"}.items():
    with pytest.raises(DamagedRecord, match=f"x, row group .*, row .*{reason}"):
      source[i]
  path = write(tmp_path / "web", [0, 1], image=["https://a.org/b.jpg"] * 2)
  with pytest.raises(ValueError, match="web address: download .*img2dataset"):
    sources.open_source("parquet", path, "")


def test_a_file_that_vanishes_changes_or_is_damaged_in_the_run(files):
  write(files / "c.parquet", range(20, 26))
  source = open_files(files)
  os.remove(files / "a.parquet")
  with pytest.raises(DamagedRecord, match="a.parquet cannot be read any more") as e:
    source[1]
  assert e.value.resume == 7 and stands_in(source, 1) == 7
  data = bytearray((files / "b.parquet").read_bytes())
  data[4:400] = bytes(396)  # within the first row group
  (files / "b.parquet").write_bytes(data)
  source = pickle.loads(pickle.dumps(source))
  with pytest.raises(DamagedRecord, match="b.parquet: its row group 0 cannot be read") as e:
    source[8]
  assert e.value.resume == 12 and source[12]["caption"] == "number 12"
  write(files / "c.parquet", range(3))
  with pytest.raises(DamagedRecord, match="c.parquet cannot be read any more .it has changed"):
    source[25]


def test_few_row_groups_are_kept_and_large_ones_said(files, monkeypatch, caplog):
  monkeypatch.setattr(parquet, "_CACHE_BYTES", 1)
  monkeypatch.setattr(parquet, "_LARGE_GROUP", 1)
  source = open_files(files)
  assert "each record costs reading a row group of 0 MB" in caplog.text
  assert captions(source) == [f"number {i}" for i in range(20)]
  assert source._group.cache_info().currsize == 1


def test_a_bucket_is_read_through_fsspec(files):
  """fsspec's in-memory store stands for gs:// and s3://."""
  import fsspec

  store = fsspec.filesystem("memory")
  for path in files.iterdir():
    store.pipe(f"/bucket/{path.name}", path.read_bytes())
  source = open_files("memory://bucket/*.parquet")
  assert captions(source) == [f"number {i}" for i in range(20)]
  assert source.identity == open_files(files).identity


def test_identity_tells_data_apart(tmp_path):
  a, b, again = (
    open_files(write(tmp_path / name, numbers)).identity
    for name, numbers in (("x", [0, 1]), ("x", [0, 2]), ("x", [0, 1]))
  )
  assert a == again != b
