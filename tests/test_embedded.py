"""The embedded emoji dataset is complete, its splits are disjoint, and its tokenizer covers it."""

import hashlib
from pathlib import Path

import pytest
import sentencepiece

from jepa_vl.data import embedded, emoji_build, transforms

FIELDS = {
  "id": str,
  "image": bytes,
  "caption": str,
  "tags": list,
  "style": str,
  "concept": str,
  "family": str,
  "group": int,
  "subgroup": int,
}
# The splits that hold each part of the families, in all styles.
PARTS = (("train", "A"), ("val", "val_style"), ("B", "C"))


@pytest.fixture(scope="module")
def splits():
  return {split: embedded.read_records(split) for split in embedded.SPLITS}


@pytest.fixture(scope="module")
def tokenizer():
  path = embedded.DIRECTORY / "tokenizer.model"
  return sentencepiece.SentencePieceProcessor(model_file=str(path))


def values(records, field):
  return {record[field] for record in records}


def test_size():
  assert sum(path.stat().st_size for path in embedded.DIRECTORY.iterdir()) <= 6_000_000


def test_dataset_json_describes_the_files(splits):
  dataset = embedded.info()
  assert set(dataset["splits"]) == set(embedded.SPLITS)
  for split, entry in dataset["splits"].items():
    path = Path(embedded.split_path(split))
    assert path.name == entry["file"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
    assert len(splits[split]) == entry["records"]
    assert len(values(splits[split], "concept")) == entry["concepts"]
    assert len(values(splits[split], "family")) == entry["families"]


def test_records_have_the_fields(splits):
  dataset = embedded.info()
  seen = set()
  for split, records in splits.items():
    keys = [(record["concept"], record["style"]) for record in records]
    assert keys == sorted(set(keys))
    for record in records:
      assert {field: type(value) for field, value in record.items()} == FIELDS
      assert record["id"] == f"{record['style']}/{record['concept']}"
      assert record["style"] in emoji_build.PARTS_OF_SPLITS[split][1]
      assert record["caption"] and record["caption"] == record["caption"].lower()
      assert record["caption"] not in record["tags"]
      assert 0 <= record["group"] < len(dataset["groups"]) == 8
      assert 0 <= record["subgroup"] < len(dataset["subgroups"])
      seen.add(record["id"])
  assert len(seen) == sum(dataset["splits"][split]["records"] for split in splits)


def test_images_decode(splits):
  for records in splits.values():
    for record in records:
      assert transforms.decode(record["image"]).shape == (64, 64, 3)


def test_no_family_is_shared(splits):
  train, val, test = (
    {record["family"] for split in part for record in splits[split]} for part in PARTS
  )
  assert not train & val
  assert not train & test
  assert not val & test


def test_no_image_is_shared(splits):
  train, val, test = (
    {emoji_build.image_hash(record["image"]) for split in part for record in splits[split]}
    for part in PARTS
  )
  assert not train & val
  assert not train & test
  assert not val & test


def test_concepts_of_the_test_splits(splits):
  concepts = {split: values(records, "concept") for split, records in splits.items()}
  assert concepts["A"] == concepts["train"]
  assert concepts["val_style"] == concepts["val"]
  assert concepts["B"] == concepts["C"]
  assert not concepts["B"] & (concepts["train"] | concepts["val"])


@pytest.mark.parametrize(
  ("labels", "subgroup", "family"),
  [
    (["man running", "woman running", "person running: facing right"], "person-sport", "running"),
    (["left arrow", "up-down arrow", "down-right arrow"], "arrow", "arrow"),
    (["one o’clock", "twelve-thirty"], "time", "clock face"),
    (["waxing crescent moon", "waning crescent moon"], "sky-weather", "crescent moon"),
    (["kiss: woman, man", "kiss: man, man", "kiss"], "family", "kiss"),
    (["man: bald", "woman: bald"], "person", "bald"),
    (["black small square", "black medium-small square"], "geometric", "black square"),
    (["upside-down face"], "face-smiling", "upside-down face"),
    (["left luggage"], "transport-sign", "left luggage"),
    (["woman", "man", "person"], "person", "person"),
    (["keycap: 3"], "keycap", "keycap: 3"),
  ],
)
def test_family_name(labels, subgroup, family):
  assert {emoji_build.family_name(label, subgroup) for label in labels} == {family}


def test_identical_images_share_a_family(splits):
  first, second, third = splits["train"][0], splits["train"][2], splits["train"][4]
  records = [
    {"family": "b", "image": first["image"]},
    {"family": "a", "image": first["image"]},
    {"family": "b", "image": second["image"]},
    {"family": "c", "image": second["image"]},
    {"family": "d", "image": third["image"]},
  ]
  emoji_build.merge_families(records)
  assert [record["family"] for record in records] == ["a", "a", "a", "a", "d"]


def test_tags_that_repeat_the_label_are_dropped():
  assert emoji_build.own_tags("left arrow", ["arrow", "Left Arrow", "West", "west"]) == ["west"]


def test_tokenizer_covers_the_training_captions(splits, tokenizer):
  assert tokenizer.id_to_piece(tokenizer.eos_id()) == emoji_build.END_OF_TEXT
  assert (tokenizer.bos_id(), tokenizer.pad_id()) == (-1, -1)
  for record in splits["train"]:
    for text in (record["caption"], transforms.full_caption(record)):
      tokens = tokenizer.encode(text)
      assert tokenizer.unk_id() not in tokens
      assert tokenizer.decode(tokens) == text.casefold()


@pytest.mark.parametrize("text", ["Une Œuvre À VOIR", "日本語", "🦙 llama"])
def test_tokenizer_encodes_any_text(tokenizer, text):
  tokens = tokenizer.encode(text)
  assert tokenizer.unk_id() not in tokens
  assert tokenizer.decode(tokens) == text.casefold()


def test_licences_name_every_source():
  text = (embedded.DIRECTORY / "LICENSES.md").read_text(encoding="utf-8")
  for package, version in embedded.info()["sources"].items():
    assert f"`{package}` {version}" in text
  assert "CC-BY 4.0" in text


def test_unknown_split_names_the_known_ones():
  with pytest.raises(ValueError, match="'D'.*train, val, val_style, A, B, C"):
    embedded.split_path("D")


def test_sheet_writes_a_png(tmp_path):
  path = tmp_path / "sheet.png"
  arguments = ["--split", "C", "--out", str(path), "--columns", "4", "--limit", "6"]
  embedded.main(arguments)
  assert path.read_bytes().startswith(b"\x89PNG")


def test_broken_archive_says_what_to_do(tmp_path):
  archive = tmp_path / "package.tgz"
  archive.write_bytes(b"\x1f\x8b truncated")
  with pytest.raises(SystemExit, match="delete it and build again"):
    emoji_build.read_archive(archive, ("package/",))


def test_build_without_npm_says_what_to_do(tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", str(tmp_path))
  with pytest.raises(SystemExit, match="needs the command `npm`.*install Node.js"):
    emoji_build.fetch_package("emojibase-data", tmp_path)
