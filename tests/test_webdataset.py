"""Tars are read by an index, in a fixed order; what is amiss is a counted record, not a crash."""

import io
import json
import logging
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from records import damage, noise, pair, png, stands_in, write_tar

from jepa_vl.data import common, pipeline, sources, webdataset
from jepa_vl.data.transforms import DamagedRecord

LOGGER = "jepa_vl.data.webdataset"


def open_tars(pattern, **keys):
  return webdataset.WebDataset(str(pattern), common.Keys(**keys))


def pairs(*numbers):
  return [member for i in numbers for member in pair(i)]


@pytest.fixture
def shards(tmp_path):
  for name, numbers in (("b-01", range(5, 9)), ("b-00", range(5)), ("c-02", range(9, 23))):
    write_tar(tmp_path / f"{name}.tar", pairs(*numbers))
  return tmp_path


def captions(source):
  return [source[i]["caption"] for i in range(len(source))]


# --- order, patterns, keys


def test_tars_come_by_name_and_samples_in_file_order(shards):
  source = open_tars(shards / "*.tar")
  assert captions(source) == [f"number {i}" for i in range(23)]
  assert source[7]["image"] == png(noise((20, 24), 7))
  assert captions(open_tars(shards)) == captions(source)  # the folder itself


def test_braces_and_lists_expand_and_missing_names_are_said(shards, caplog):
  with caplog.at_level(logging.WARNING, "jepa_vl"):
    source = open_tars(shards / "{b,c}-{00..03}.tar")
  assert captions(source) == [f"number {i}" for i in range(23)]
  assert "5 of the 8 names" in caplog.text and "b-02.tar" in caplog.text
  assert common.expand_braces("x{8..11}{a,b}")[3:6] == ["x9b", "x10a", "x10b"]
  assert common.expand_braces("{split}-{0}") == ["{split}-{0}"]


def test_members_in_any_order_and_long_names_are_grouped_by_key(tmp_path):
  long, folder = "l" * 300, "a.b/c"  # GNU or PAX headers; a dot in the folder is not the key's end
  a, b = pair(1, long), pair(2, folder)
  for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
    with tarfile.open(tmp_path / "x.tar", "w", format=form) as tar:
      for name, data in (a[0], b[0], ("README", b"no key"), b[1], a[1]):
        info = tarfile.TarInfo(name)
        info.size, info.mtime = len(data), 0.5  # a PAX header of its own
        tar.addfile(info, io.BytesIO(data))
      tar.addfile(tarfile.TarInfo("folder.jpg/"))
    assert captions(open_tars(tmp_path / "x.tar")) == ["number 1", "number 2"]


def test_keys_name_members_and_fields_of_the_json(tmp_path):
  fields = {"caption": "of the json", "alt": "another", "label": 3, "tags": ["x"], "exif": {}}
  sample = [("1.PNG", png(noise((4, 4), 1))), ("1.mask.png", png(noise((4, 4), 2)))]
  sample += [("1.json", json.dumps(fields).encode()), ("1.cls", b" 7\n")]
  path = write_tar(tmp_path / "x.tar", sample)
  record = open_tars(path)[0]
  assert record == {
    "image": sample[0][1], "caption": "of the json", "alt": "another", "label": 3, "tags": ["x"],
    "cls": 7,
  }  # fmt: skip
  assert open_tars(path, caption_key="alt")[0]["caption"] == "another"
  assert open_tars(path, image_key="mask.png")[0]["image"] == sample[1][1]
  with pytest.raises(ValueError, match="no image: looked for 'jpg', found png, mask.png, "):
    sources.open_source("webdataset", path, "", common.Keys(image_key="jpg"))
  with pytest.raises(ValueError, match="looked for 'txt', found png, .*, alt.*data.caption_key"):
    sources.open_source("webdataset", path, "", common.Keys(caption_key="txt"))
  # A member goes before a field.
  fields = json.dumps({**fields, "txt": "a field"}).encode()
  members = [*sample[:2], ("1.json", fields), ("1.txt", b"of the txt")]
  path = write_tar(tmp_path / "x.tar", members)
  assert open_tars(path)[0]["caption"] == "of the txt"


def test_a_text_named_captions_is_a_caption_if_asked_for_and_else_left_out(tmp_path):
  fields = {"caption": "one", "captions": "a red cat"}
  members = [("1.png", png(noise((4, 4)))), ("1.json", json.dumps(fields).encode())]
  path = write_tar(tmp_path / "x.tar", members)
  assert open_tars(path)[0] == {"image": members[0][1], "caption": "one"}
  found = open_tars(path, caption_key="captions")[0]
  assert found == {"image": members[0][1], "caption": "a red cat"}


def test_identity_tells_data_apart_but_not_folders(tmp_path):
  for folder, first in (("one", 0), ("two", 1), ("again", 0)):
    (tmp_path / folder).mkdir()
    write_tar(tmp_path / folder / "a.tar", pairs(first, first + 2))
  one, two, again = (open_tars(tmp_path / f).identity for f in ("one", "two", "again"))
  assert one == again != two and one.startswith("2 records, ")


# --- the index


def test_the_index_is_made_once_and_again_when_the_tar_changes(shards, monkeypatch):
  built = []
  build = webdataset.build_index
  monkeypatch.setattr(webdataset, "build_index", lambda p, **k: built.append(p) or build(p, **k))
  open_tars(shards)
  assert len(built) == 3
  assert sorted(p.name for p in shards.glob("*.jepa-index"))[0] == "b-00.tar.jepa-index"
  open_tars(shards / "*")  # the indexes are no data
  assert len(built) == 3
  write_tar(shards / "b-01.tar", pairs(30))  # another size
  os.utime(shards / "c-02.tar", ns=(1, 1))  # another time
  whole = (shards / "b-00.tar.jepa-index").read_bytes()
  (shards / "b-00.tar.jepa-index").write_bytes(whole[:-40])  # cut short
  source = open_tars(shards)
  assert len(built) == 6 and len(source) == 20
  assert (shards / "b-00.tar.jepa-index").read_bytes() == whole
  assert not list(shards.glob("*.part"))


def test_the_index_goes_where_it_can(shards, tmp_path, monkeypatch):
  inside = tmp_path / "elsewhere"
  assert len(open_tars(shards / "b-*.tar", index_dir=str(inside))) == 9
  assert len(list(inside.iterdir())) == 2 and not list(shards.glob("*.jepa-index"))

  write, home = webdataset._write, tmp_path / "cache"
  monkeypatch.setenv("XDG_CACHE_HOME", str(home))

  def read_only(path, content):
    if os.path.dirname(path) == str(shards):
      raise PermissionError(13, "Read-only file system")
    return write(path, content)

  monkeypatch.setattr(webdataset, "_write", read_only)
  assert len(open_tars(shards / "b-*.tar")) == 9
  assert len(list((home / "jepa_vl").iterdir())) == 2
  with pytest.raises(OSError, match="cannot be written .*data.index_dir"):
    open_tars(shards / "b-*.tar", index_dir=str(shards / "b-00.tar" / "x"))


def test_many_tars_are_indexed_in_processes(tmp_path, monkeypatch):
  for i in range(16):
    write_tar(tmp_path / f"{i:02d}.tar", pairs(i))
  monkeypatch.setattr(os, "cpu_count", lambda: 2)
  assert captions(open_tars(tmp_path)) == [f"number {i}" for i in range(16)]


def test_the_command_line_says_how_much_there_is(shards, capsys):
  webdataset.main([str(shards / "*.tar")])
  assert capsys.readouterr().out == "3 tars, 23 samples\n"


# --- reading


def test_a_source_is_small_to_send_and_holds_few_files(shards, monkeypatch):
  monkeypatch.setattr(webdataset, "_OPEN_FILES", 1)
  source = open_tars(shards)
  before = len(os.listdir("/proc/self/fd"))
  assert [source[i]["caption"] for i in (0, 20, 6, 1)] == [f"number {i}" for i in (0, 20, 6, 1)]
  assert len(os.listdir("/proc/self/fd")) == before + 2  # one tar, one index
  sent = pickle.dumps(source)
  assert len(sent) < 2000
  assert pickle.loads(sent)[20] == source[20]


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_do_not_change_the_batches(shards, tok, cfg, workers):
  source = open_tars(shards)

  def take(workers):
    cfg.workers = workers
    batches = pipeline.batches(source, tok, cfg, batch_size=8, seed=5, start_step=1)
    return [next(batches) for _ in range(6)]

  for a, b in zip(take(0), take(workers), strict=True):
    assert a["index"].tolist() == b["index"].tolist()
    np.testing.assert_array_equal(a["image"], b["image"])


# --- what is amiss


def test_a_truncated_tar_keeps_what_is_whole_and_says_what_is_left_over(tmp_path, caplog):
  whole = Path(write_tar(tmp_path / "x.tar", pairs(0, 1, 2))).read_bytes()
  with tarfile.open(tmp_path / "x.tar") as tar:
    third, caption = (tar.getmember(f"000002.{kind}") for kind in ("png", "txt"))
  for cut, count in ((third.offset_data + 100, 2), (third.offset + 200, 2), (third.offset, 2)):
    caplog.clear()
    (tmp_path / "x.tar").write_bytes(whole[:cut])
    with caplog.at_level(logging.WARNING, LOGGER):
      source = open_tars(tmp_path / "x.tar")
    assert captions(source) == ["number 0", "number 1"] and len(source) == count
    left = cut - third.offset
    expected = f"{left} bytes from byte {third.offset} on" if left else "no end mark"
    assert expected in caplog.text and "x.tar" in caplog.text
  # Within the caption: its sample stays, as a record that says so.
  (tmp_path / "x.tar").write_bytes(whole[: caption.offset_data + 3])
  source = open_tars(tmp_path / "x.tar")
  assert len(source) == 3 and "sample '000002': no caption" in damage(source)[2]


@pytest.mark.parametrize(
  ("content", "said"),
  [(b"", "it is empty"), (b"<html>" * 500, "3000 bytes"), (bytes(10240), "no file with a key")],
)
def test_an_empty_or_foreign_tar_is_said_and_left_out(tmp_path, caplog, content, said):
  write_tar(tmp_path / "b.tar", pairs(1))
  (tmp_path / "a.tar").write_bytes(content)
  with caplog.at_level(logging.WARNING, LOGGER):
    assert captions(open_tars(tmp_path)) == ["number 1"]
  assert "a.tar: " in caplog.text and said in caplog.text
  with pytest.raises(ValueError, match="the 1 tars of .* hold no sample"):
    open_tars(tmp_path / "a.tar")


def test_garbage_in_the_middle_is_said_and_passed_over(tmp_path, caplog):
  whole = bytearray(Path(write_tar(tmp_path / "x.tar", pairs(0, 1, 2))).read_bytes())
  with tarfile.open(tmp_path / "x.tar") as tar:
    at, after = (tar.getmember(f"000001.{kind}").offset for kind in ("png", "txt"))
  whole[at : at + 512] = b"x" * 512
  (tmp_path / "x.tar").write_bytes(whole)
  with caplog.at_level(logging.WARNING, LOGGER):
    source = open_tars(tmp_path / "x.tar")
  assert f"{after - at} bytes from byte {at} on are no whole member" in caplog.text
  assert source[0]["caption"] == "number 0" and source[2]["caption"] == "number 2"
  assert list(damage(source)) == [1] and "no image" in damage(source)[1]
  assert source[2]["image"] == png(noise((20, 24), 2))


@pytest.mark.parametrize("cut", [0, 700, 1000, 1536])
@pytest.mark.parametrize("end_mark", [True, False])
def test_tars_in_one_file_are_all_read(tmp_path, caplog, cut, end_mark):
  """One after the other, the first without its end mark or cut anywhere: headers shift with it."""
  names = [Path(write_tar(tmp_path / f"{i}.tar", pairs(i, i + 1))) for i in (0, 2)]
  first, second = (path.read_bytes() for path in names)
  with tarfile.open(names[0]) as tar:
    last = tar.getmembers()[-1]
  end = len(first) if end_mark else last.offset_data + 512
  (tmp_path / "x").write_bytes((first[: last.offset - cut] if cut else first[:end]) + second)
  with caplog.at_level(logging.WARNING, LOGGER):
    source = open_tars(tmp_path / "x")
  assert [source[i]["caption"] for i in (0, -2 + len(source), -1 + len(source))] == [
    "number 0", "number 2", "number 3"]  # fmt: skip
  assert list(damage(source)) == ([1] if cut and len(source) == 4 else [])
  assert ("bytes from byte" in caplog.text) == bool(cut)


def test_a_size_that_is_made_up_costs_its_own_file_alone(tmp_path, caplog):
  """One that goes beyond the end, with the right checksum; and one below zero."""
  for size in (8**11 - 1, -1024):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
      for name, data in pairs(0, 1, 2):
        info = tarfile.TarInfo(name)
        info.size = size if name == "000001.png" else len(data)
        tar.fileobj.write(info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512))
    source = open_tars(tmp_path / "x.tar")
    assert list(damage(source)) == [1] and source[2]["image"] == png(noise((20, 24), 2))
    assert "are no whole member" in caplog.text


@pytest.mark.parametrize("end_mark", [True, False])
def test_a_tar_within_a_whole_tar_is_a_file_as_any_other(tmp_path, caplog, end_mark):
  inner = Path(write_tar(tmp_path / "inner", pairs(7))).read_bytes()
  path = write_tar(tmp_path / "x.tar", [*pairs(0), ("a.tar", inner), *pairs(1), ("b.tar", inner)])
  if not end_mark:
    with tarfile.open(path) as tar:
      end = tar.getmember("b.tar").offset_data + len(inner)
    os.truncate(path, end)
  source = open_tars(path)
  assert len(source) == 4 and list(damage(source)) == [1, 3]  # a and b, without an image
  assert "are no whole member" not in caplog.text


def test_a_header_at_the_edge_of_what_is_read_at_once_is_found(tmp_path):
  tar = Path(write_tar(tmp_path / "x.tar", pairs(1))).read_bytes()
  for ahead in (1, 255, 262, 511):  # of its bytes come with the first megabyte
    garbage = (b"ustar" * (1 << 18))[: 512 + (1 << 20) - ahead]
    (tmp_path / "x.tar").write_bytes(garbage + tar)
    assert captions(open_tars(tmp_path / "x.tar")) == ["number 1"]


def test_compressed_tars_and_buckets_are_refused_in_words(tmp_path):
  with tarfile.open(tmp_path / "x.tar", "w:gz") as tar:
    tar.addfile(tarfile.TarInfo("a.txt"))
  with pytest.raises(ValueError, match="x.tar is compressed.*unpack"):
    open_tars(tmp_path / "x.tar")
  with pytest.raises(ValueError, match="gs://bucket.*mount the bucket"):
    open_tars("gs://bucket/*.tar")


DEFECTS = {
  "no-image": ([("k.txt", b"alone")], "no image"),
  "no-caption": ([("k.png", png(noise((4, 4))))], "no caption"),
  "bad-image": ([("k.png", b"no image"), ("k.txt", b"x")], None),  # found on decoding
  "empty-image": ([("k.png", b""), ("k.txt", b"x")], "the image is empty"),
  "empty-caption": ([("k.png", png(noise((4, 4)))), ("k.txt", b" \n")], "the caption is empty"),
  "latin-1": ([("k.png", png(noise((4, 4)))), ("k.txt", "käse".encode("latin-1"))], "not UTF-8"),
  "bad-json": ([*pair(0, "k"), ("k.json", b"{")], "JSON cannot be read"),
  "list-json": ([*pair(0, "k"), ("k.json", b"[]")], "JSON is no object"),
  "surrogate": (
    [("k.png", png(noise((4, 4)))), ("k.json", b'{"caption": "\\ud800"}')], "no valid Unicode"),
  "number": ([("k.png", png(noise((4, 4)))), ("k.json", b'{"caption": 1}')], "of type int"),
}  # fmt: skip


def test_the_pipeline_runs_over_tars_with_every_defect(tmp_path, tok, cfg):
  """Each bad sample is a record, named, replaced by the next good one; a long caption is cut."""
  for i, (name, (members, _)) in enumerate(DEFECTS.items()):
    members = [*pair(2 * i, "a"), *members, *pair(2 * i + 1, "z")]
    write_tar(tmp_path / f"{i:02d}-{name}.tar", members)
  duplicates = [*pair(50), *pair(51, "000050"), *pair(52)]
  write_tar(tmp_path / "80-duplicate.tar", duplicates)
  write_tar(tmp_path / "81-traversal.tar", pair(60, "../../up") + pair(61, "/etc/x"))
  long = ("word " * 20_000).encode()  # 100 kB
  write_tar(tmp_path / "82-long.tar", [("k.png", png(noise((20, 24)))), ("k.txt", long)])
  (tmp_path / "90-empty.tar").touch()
  whole = Path(write_tar(tmp_path / "91-cut.tar", pairs(70, 71))).read_bytes()
  (tmp_path / "91-cut.tar").write_bytes(whole[: len(pair(70)[0][1]) + 2000])

  source = sources.open_source("webdataset", str(tmp_path / "*.tar"), "")
  reasons = damage(source)
  for i, (name, (_, reason)) in enumerate(DEFECTS.items()):
    if reason:
      assert reason in reasons[3 * i + 1] and name in reasons[3 * i + 1]
  assert "sample '000050': the key is there 1 times before" in reasons[31]
  bad = set(reasons) | {3 * list(DEFECTS).index("bad-image") + 1}
  assert bad == {*range(1, 30, 3), 31}
  assert [source[i]["caption"] for i in (30, 32, 33, 34)] == [
    "number 50", "number 52", "number 60", "number 61"]  # fmt: skip

  batches = pipeline.batches(source, tok, cfg, batch_size=len(source), seed=0, start_step=0)
  batch = next(batches)
  assert set(batch["bad"].tolist()) - {-1} == bad
  taken = {b: i for b, i in zip(batch["bad"].tolist(), batch["index"].tolist(), strict=True)}
  assert all(taken[b] == b + 1 for b in bad)
  assert batch["truncated"][batch["index"].tolist().index(35)]
  assert not (tmp_path.parent.parent / "up.png").exists()


def test_a_tar_that_vanishes_or_changes_in_the_run_is_named_and_stepped_over(shards, monkeypatch):
  source = open_tars(shards)
  os.remove(shards / "b-01.tar")  # 5 .. 8
  with pytest.raises(DamagedRecord, match="b-01.tar cannot be read any more .No such file") as e:
    source[6]
  assert e.value.resume == 9
  monkeypatch.setattr(pipeline, "_GIVE_UP", 2)  # the shard counts once, however long it is
  assert stands_in(source, 6) == 9
  write_tar(shards / "c-02.tar", pairs(*range(40, 50)))
  with pytest.raises(DamagedRecord, match="c-02.tar .*has changed since it was indexed"):
    pickle.loads(pickle.dumps(source))[12]
  os.truncate(shards / "b-00.tar", 600)  # while it is open
  fresh = open_tars(shards / "c-02.tar")
  fresh[0]
  os.truncate(shards / "c-02.tar", 600)
  with pytest.raises(DamagedRecord, match="c-02.tar has been cut short"):
    fresh[5]
  with pytest.raises(ValueError, match="23 records in a row from 6 .*cannot be read any more"):
    monkeypatch.setattr(pipeline, "_GIVE_UP", 1000)
    stands_in(pickle.loads(pickle.dumps(source)), 6)
