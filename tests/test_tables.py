"""Rows of TSV, CSV and JSONL, and pairs of files in a folder."""

import csv
import io
import itertools
import json
import os
import pickle
import random

import pytest
from records import damage, noise, png, stands_in

from jepa_vl.data import common, sources, tables
from jepa_vl.data.transforms import DamagedRecord


def image(i):
  return png(noise((20, 24), i))


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "img").mkdir()
  for i in range(6):
    (tmp_path / "img" / f"{i}.png").write_bytes(image(i))
  return tmp_path


def open_table(path, content=None, **keys):
  if content is not None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return tables.Table(str(path), common.Keys(**keys))


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_three_kinds_give_the_same_records(folder, end, mark):
  lines = {
    "x.tsv": ["filepath\ttitle\tlabel", "img/0.png\ta, \"b\t7", "img/1.png\tc\t-1"],
    "x.csv": ["title,label,filepath", '"a, ""b",7,img/0.png', "c,-1,img/1.png"],
    "x.jsonl": [
      json.dumps({"filepath": "img/0.png", "title": 'a, "b', "label": 7}),
      json.dumps({"filepath": "img/1.png", "title": "c", "label": -1}),
    ],
  }
  for name, rows in lines.items():
    content = (end or "\n").join(rows) + end
    source = open_table(folder / name, (mark if name != "x.jsonl" else "") + content)
    assert [source[i] for i in range(len(source))] == [
      {"image": image(0), "caption": 'a, "b', "label": 7},
      {"image": image(1), "caption": "c", "label": -1},
    ]


def test_line_breaks_within_quotes_are_text_in_a_csv(folder, monkeypatch):
  content = 'path,text\nimg/0.png,"two\nlines, ""quoted"""\nimg/1.png,one\n'
  for size in (1 << 24, 1, 7):  # quotes count on from one block to the next
    monkeypatch.setattr(tables, "_BLOCK", size)
    source = open_table(folder / "x.csv", content)
    assert [source[i]["caption"] for i in range(len(source))] == ['two\nlines, "quoted"', "one"]


def test_a_quote_within_a_cell_is_text_and_costs_no_row(folder):
  captions = [f"picture {i}" for i in range(100)]
  captions[10] = 'a 5" disk'
  rows = "".join(f"img/{i % 6}.png,{caption}\n" for i, caption in enumerate(captions))
  source = open_table(folder / "x.csv", "path,text\n" + rows)
  assert [source[i]["caption"] for i in range(len(source))] == captions


def test_rows_of_a_csv_begin_where_the_csv_module_has_them(tmp_path, monkeypatch):
  rng, path = random.Random(0), tmp_path / "x.csv"
  for _ in range(600):
    content = "".join(rng.choices(("a", ",", '"', '""', ',"', '",', "\n", "\r\n"), k=30))
    path.write_text("\ufeff" * rng.randrange(2) + content, newline="")
    monkeypatch.setattr(tables, "_BLOCK", rng.choice((1, 2, 5, 1 << 24)))
    *rows, last = csv.reader(io.StringIO(content + "\nlast", newline=""))
    if last != ["last"]:  # it is within quotes
      with pytest.raises(ValueError, match="x.csv, line .*: the quote"):
        tables._row_starts(str(path))
      continue
    starts, data = tables._row_starts(str(path)), path.read_bytes()
    found = [data[a:b].decode("utf-8-sig") for a, b in itertools.pairwise(starts)]
    found = [next(csv.reader([row.rstrip("\r\n")]), []) for row in found]
    found = [row for row in found[:1] if row] + found[1:]  # a byte order mark alone
    assert found == [row for row in rows if row], repr(content)


@pytest.mark.parametrize("size", [1, 1 << 24])
def test_a_csv_that_ends_within_quotes_is_refused_with_the_line(folder, monkeypatch, size):
  monkeypatch.setattr(tables, "_BLOCK", size)
  content = 'path,text\nimg/0.png,"a\nb"\nimg/1.png,"never closed\nimg/2.png,c\n'
  with pytest.raises(ValueError, match="x.csv, line 4: the quote that opens a cell there is clos"):
    open_table(folder / "x.csv", content)


def test_several_tables_keys_and_root(folder):
  rows = "".join(f"{i}.png\tnumber {i}\tother {i}\n" for i in range(3))
  open_table(folder / "a.tsv", "file\tcaption\talt\n" + rows)
  more = "".join(f"other {i}\t{i}.png\n" for i in range(3, 6))
  keys = {"caption_key": "alt", "image_root": str(folder / "img")}
  source = open_table(folder / "b.tsv", "alt\tfile\n" + more, **keys)
  source = open_table(folder / "*.tsv", **keys)
  assert [source[i]["caption"] for i in range(6)] == [f"other {i}" for i in range(6)]
  assert pickle.loads(pickle.dumps(source))[5]["image"] == image(5)
  assert stands_in(source, 4) == 4


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_empty_lines_are_no_records(folder, end):
  lines = {
    "x.tsv": ["path\ttext", "img/0.png\ta", "\t", "img/1.png\tb"],
    "x.csv": ["path,text", 'img/0.png,"a\n\n"', ",", "img/1.png,b"],
    "x.jsonl": [json.dumps({"path": "img/0.png", "text": "a"}), "[", '{"path": "img/1.png"}'],
  }
  for name, rows in lines.items():
    for around in (0, 2):
      content = (end * around).join(["", *(row + end for row in rows), ""])
      source = open_table(folder / name, content)
      good = [i for i in range(len(source)) if i not in damage(source)]
      assert len(source) == 3 and good == ([0] if name == "x.jsonl" else [0, 2])
      assert source[0] == {"image": image(0), "caption": "a"}
  with pytest.raises(ValueError, match="hold no row"):
    open_table(folder / "x.jsonl", end * 3)


def test_a_csv_of_one_column_has_a_row_per_line_that_is_not_empty(folder):
  content = "path\nimg/0.png\n\nx\n\"\"\ny"
  keys = {"image_key": "path", "caption_key": "path"}
  source = open_table(folder / "x.csv", content, **keys)
  assert source[0] == {"image": image(0), "caption": "img/0.png"}
  assert len(source) == 4 and list(damage(source)) == [1, 2, 3]


def test_bad_rows_are_damaged_records(folder):
  rows = [
    b"path\ttext", b"img/0.png\tgood", b"img/none.png\tx", b"img/1.png\t", b"img/1.png",
    b"img/1.png\tk\xe4se", b"http://a.org/x.jpg\tx", b"x", b"\tx", b"img/2.png\t" + b"w " * 50_000,
  ]  # fmt: skip
  source = open_table(folder / "x.tsv", b"\n".join(rows) + b"\n")
  found = damage(source)
  expected = {
    1: "none.png' cannot be read", 2: "the caption is empty", 3: "1 cells, where", 4: "not UTF-8",
    5: "web address", 6: "1 cells", 7: "the image is empty",
  }  # fmt: skip
  assert found.keys() == expected.keys()
  for i, text in expected.items():
    assert text in found[i] and "x.tsv, the row at byte" in found[i]
  lines = ['{"path": "img/0.png", "text": "a"}', "{", "[]", '{"path": "img/0.png"}', '{"path": 3}']
  lines += ['{"path": 3, "text": "x"}', '{"path": "img/0.png", "text": ["a"]}']
  found = damage(open_table(folder / "x.jsonl", "\n".join(lines)))
  for i, text in enumerate(["JSON cannot", "no object", "no caption", "no caption", "no bytes"]):
    assert text in found[i + 1]
  assert "of type list" in found[6]


def test_a_column_captions_is_no_list_of_captions(folder):
  """Retrieval would take its letters for the image's captions; a caption it can be."""
  line = {"path": "img/0.png", "caption": "one", "captions": "one|two", "alt": "kept"}
  for name, content in {
    "x.jsonl": json.dumps(line),
    "x.csv": ",".join(line) + "\n" + ",".join(line.values()),
  }.items():
    record = {"image": image(0), "alt": "kept"}
    assert open_table(folder / name, content)[0] == record | {"caption": "one"}
    found = open_table(folder / name, content, caption_key="captions")[0]
    assert found == record | {"caption": "one|two"}


def test_what_is_no_table_is_said(folder):
  with pytest.raises(ValueError, match="first line must name the columns: no image.*found img/0.p"):
    open_table(folder / "x.tsv", "img/0.png\tno header\n")
  with pytest.raises(ValueError, match="first line must name the columns: .*new-line character"):
    open_table(folder / "x.csv", "path\rtext\nimg/0.png,a\n")
  with pytest.raises(ValueError, match="is a .tsv, .csv or .jsonl file"):
    open_table(folder / "x.txt", "a\tb\n")
  with pytest.raises(ValueError, match="hold no row"):
    open_table(folder / "x.tsv", "path\ttext\n")
  open_table(folder / "x.csv", "url,caption\nhttps://a.org/b.jpg,x\n")
  with pytest.raises(ValueError, match="'table', path .*web address: download.*img2dataset"):
    sources.open_source("table", str(folder / "x.csv"), "")


def test_a_table_that_changes_in_the_run_is_said(folder):
  source = open_table(folder / "x.tsv", "path\ttext\nimg/0.png\ta\nimg/1.png\tb\n")
  source[0]
  (folder / "x.tsv").write_text("path\ttext\n")
  with pytest.raises(DamagedRecord, match="x.tsv cannot be read any more .it has changed") as e:
    source[0]
  assert e.value.resume == 2


# --- folders


def test_a_folder_of_pairs(folder):
  for i in range(5):
    (folder / "img" / f"{i}.txt").write_text(f"number {i}\n")
  (folder / "a.b").mkdir()
  (folder / "a.b" / "x.JPG").write_bytes(image(7))
  (folder / "a.b" / "x.json").write_text('{"caption": "of the json", "label": 2}')
  for name in ("notes.md", ".hidden.txt", "Makefile"):
    (folder / name).write_text("no sample")
  source = sources.open_source("folder", str(folder), "")
  assert len(source) == 7
  assert source[0] == {"image": image(7), "caption": "of the json", "label": 2}
  assert [source[i]["caption"] for i in range(1, 6)] == [f"number {i}" for i in range(5)]
  assert list(damage(source)) == [6] and "img/5: no caption" in damage(source)[6]
  again = pickle.loads(pickle.dumps(source))
  assert again[3] == source[3] and again.identity == source.identity
  os.remove(folder / "img" / "2.png")
  with pytest.raises(DamagedRecord, match="img/2.*No such file"):
    source[3]


def test_pairs_whose_names_hold_dots_are_read_and_what_has_no_partner_is_said(tmp_path, caplog):
  names = ("a", "IMG_2020.01.05", "photo v1.2", "photo v1.3", "b", "b.2")
  for i, name in enumerate(names):
    (tmp_path / f"{name}.JPG").write_bytes(image(i))
    (tmp_path / f"{name}.txt").write_text(name)
  (tmp_path / "photo v1.3.seg.png").write_bytes(image(9))
  source = sources.open_source("folder", str(tmp_path), "")
  assert {source[i]["caption"]: source[i]["image"] for i in range(len(source))} == {
    name: image(i) for i, name in enumerate(names)
  }
  assert not caplog.messages
  for name in ("c.1.jpg", "d.1.2.txt", "notes.v2.md"):
    (tmp_path / name).write_bytes(image(0))
  assert len(sources.open_source("folder", str(tmp_path), "")) == len(names)
  assert "2 files have no partner of their name and are left out: c.1.jpg, d.1.2.txt" in caplog.text


def test_kinds_with_dots_stay_those_of_their_sample(tmp_path):
  """As WebDataset has them; the identity is what it was before pairs could hold dots."""
  for name in ("x.jpg", "x.seg.png", "x.thumb.jpg", "x.json", "y.jpg", "y.en.txt", "y.de.txt"):
    content = '{"caption": "of the json"}' if name == "x.json" else name
    (tmp_path / name).write_text(content)
  source = tables.Folder(str(tmp_path), common.USUAL)
  assert source[0] == {"image": b"x.jpg", "caption": "of the json"} and len(source) == 2
  assert source.identity == "2 records, 6170aa0f7d4805a8"
  keys = common.Keys(image_key="thumb.jpg")
  assert tables.Folder(str(tmp_path), keys)[0]["image"] == b"x.thumb.jpg"
  keys = common.Keys(caption_key="en.txt")
  assert tables.Folder(str(tmp_path), keys)[1] == {"image": b"y.jpg", "caption": "y.en.txt"}


def test_links_to_folders_are_followed_and_never_in_circles(tmp_path):
  places = ("pairs/a/1", "pairs/2", "else/3", "else/in/4", "other/5")
  for place in places:
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".jpg").write_bytes(b"image")
    path.with_suffix(".txt").write_text(place)
  links = {
    "pairs/up": ".", "pairs/a/top": "pairs", "pairs/again": "pairs/a", "pairs/b": "else",
    "pairs/c": "else/in", "else/on": "other", "other/back": "else", "other/home": "pairs",
  }  # fmt: skip
  for link, target in links.items():
    (tmp_path / link).symlink_to(tmp_path / target)
  source = tables.Folder(str(tmp_path / "pairs"), common.USUAL)
  assert sorted(source[i]["caption"] for i in range(len(source))) == sorted(places)


def test_what_is_no_folder_of_pairs_is_said(tmp_path):
  for path in ("gs://bucket/x", str(tmp_path / "none")):
    with pytest.raises(FileNotFoundError, match="is no folder"):
      sources.open_source("folder", path, "")
  with pytest.raises(ValueError, match="holds no x.jpg"):
    sources.open_source("folder", str(tmp_path), "")
