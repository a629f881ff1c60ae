"""Sources join their files in order, tell data sets apart and name what is broken."""

import pickle

import pytest
from records import record, write

from jepa_vl.data import sources
from jepa_vl.data.transforms import REASONS, DamagedRecord


def test_a_pattern_without_files_names_the_key():
  with pytest.raises(FileNotFoundError, match="path '/nowhere/.*' matches no file.*data.path"):
    sources.open_source("array_record", "/nowhere/*.array_record", "")


@pytest.mark.parametrize("damage", ["empty", "truncated", "foreign"])
def test_a_broken_file_is_named(tmp_path, damage):
  write(tmp_path / "a.array_record", [record(0)])
  write(tmp_path / "b.array_record", [record(i) for i in range(99)])
  whole = (tmp_path / "b.array_record").read_bytes()
  content = {"empty": b"", "truncated": whole[: len(whole) // 2], "foreign": b"x" * 100_000}
  (tmp_path / "b.array_record").write_bytes(content[damage])
  with pytest.raises(ValueError, match="b.array_record is not a whole ArrayRecord file"):
    sources.ArrayRecord(str(tmp_path / "*.array_record"))


def test_files_are_joined_in_the_order_of_their_names(tmp_path):
  write(tmp_path / "b.array_record", [record(i) for i in range(3, 7)])
  write(tmp_path / "a.array_record", [record(i) for i in range(3)])
  source = sources.open_source("array_record", str(tmp_path / "*.array_record"), "")
  assert [source[i]["caption"] for i in range(len(source))] == [f"number {i}" for i in range(7)]


def test_a_file_with_a_bracket_in_its_name_is_found_by_it(tmp_path):
  for name in ("a[1].array_record", "b*.array_record", "b1.array_record"):
    write(tmp_path / name, [record(0, caption=name)])
  for _ in range(2):
    source = sources.open_source("array_record", str(tmp_path / "a[1].array_record"), "")
    assert [source[i]["caption"] for i in range(len(source))] == ["a[1].array_record"]
    write(tmp_path / "a1.array_record", [record(0, caption="another")])
  assert len(sources.ArrayRecord(str(tmp_path / "b*.array_record"))) == 2
  assert len(sources.ArrayRecord(str(tmp_path / "a[0-9].array_record"))) == 1


def test_identity_tells_data_sets_apart(tmp_path):
  """Also files of one name, size and number of records; the folder that they lie in is nothing."""
  for folder, first in (("one", 0), ("two", 1), ("again", 0)):
    (tmp_path / folder).mkdir()
    write(tmp_path / folder / "a", [record(i) for i in range(first, first + 3)])
  write(tmp_path / "two" / "b", [record(0)])
  patterns = ("one/a", "two/a", "two/*", "again/a")
  one, two, both, again = (sources.ArrayRecord(str(tmp_path / p)).identity for p in patterns)
  assert len({one, two, both}) == 3
  assert one == again
  assert one.startswith("3 records, ")


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("tar", "data.source must be one of emoji, .*array_record, .*, got 'tar'"),
    ("array_record", "data.path is empty"),
  ],
)
def test_open_source_says_what_is_missing(name, message):
  with pytest.raises(ValueError, match=message):
    sources.open_source(name, "", "train")


def test_an_empty_caption_is_a_damaged_record(tmp_path):
  source = sources.ArrayRecord(write(tmp_path / "x", [record(0), record(1, caption=" \n")]))
  with pytest.raises(sources.DamagedRecord, match="record 1: the caption is empty"):
    source[1]


def test_data_without_a_usable_record_is_refused_at_the_start(tmp_path):
  path = write(tmp_path / "x", [record(i, caption="") for i in range(40)])
  with pytest.raises(ValueError, match="x': none of the records looked at.*caption is empty"):
    sources.open_source("array_record", path, "")


@pytest.mark.parametrize("name", ["array_record", "webdataset", "table"])
def test_a_bucket_that_cannot_be_read_is_refused_in_words(name):
  with pytest.raises(ValueError, match="s3://bucket/x.*mount the bucket .* or copy"):
    sources.open_source(name, "s3://bucket/x*", "")


@pytest.mark.parametrize("name", sorted(sources.EXAMPLES))
def test_every_source_needs_a_path_and_shows_one(name):
  with pytest.raises(ValueError, match=f"data.source='{name}' needs one.*--config.data.path='"):
    sources.open_source(name, "", "train")


def test_a_damaged_record_keeps_its_reason_on_every_way(tmp_path):
  """Counted per reason: behind a place's name, within a mixture, and through a pickle."""
  e = DamagedRecord("gone", "unreadable", 7).at("x.tar")
  assert (str(e), e.reason, e.resume) == ("x.tar: gone", "unreadable", 7)
  e = pickle.loads(pickle.dumps(e))
  assert (str(e), e.reason, e.resume) == ("x.tar: gone", "unreadable", 7)
  assert e.reason in REASONS
