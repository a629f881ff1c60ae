"""Question sets in the layouts that they have on their users' disks."""

import json
import pickle

import pytest
from records import damage, noise, png

from jepa_vl.data import common, sources
from jepa_vl.data.transforms import DamagedRecord


def image(i):
  return png(noise((20, 24), i))


def place(root, *names):
  for i, name in enumerate(names):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(image(i))


def gqa_entry(image_id, question, answer, structural, **changes):
  """An entry with all that GQA's have."""
  return {
    "semantic": [{"operation": "select", "dependencies": [], "argument": "cat (12)"}],
    "entailed": ["1"], "equivalent": ["1"], "question": question, "imageId": image_id,
    "isBalanced": True, "groups": {"global": "color", "local": "10-cat_color"}, "answer": answer,
    "semanticStr": "select: cat (12)->query: color [0]",
    "annotations": {"answer": {"0": "12"}, "question": {"4": "12"}, "fullAnswer": {"1": "12"}},
    "types": {"detailed": "attr", "semantic": "attr", "structural": structural},
    "fullAnswer": f"It is {answer}.", **changes,
  }  # fmt: skip


def write_gqa(root, entries, split="testdev"):
  (root / "questions").mkdir(parents=True, exist_ok=True)
  path = root / "questions" / f"{split}_balanced_questions.json"
  path.write_text(json.dumps(entries))
  return path


def write_vqav2(root, split="val", answers=None):
  """Three questions about two images, the annotations in another order."""
  info = {"info": {"version": "2.0"}, "license": {"name": "CC"}, "data_subtype": f"{split}2014"}
  rows = [
    (9000, 9, "Is it day?", "yes/no", ["yes"] * 9 + ["no"]),
    (9001, 9, "How many cats are there?", "number", ["2"] * 4 + ["3"] * 6),
    (581929000, 581929, "What is this?", "other", answers or ["a dog"] * 10),
  ]
  questions = [{"image_id": i, "question": q, "question_id": n} for n, i, q, _, _ in rows]
  annotations = [
    {"question_type": "what", "multiple_choice_answer": answers[0], "image_id": i,
     "answer_type": kind, "question_id": n,
     "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": k + 1}
                 for k, a in enumerate(answers)]}
    for n, i, _, kind, answers in rows[::-1]
  ]  # fmt: skip
  root.mkdir(parents=True, exist_ok=True)
  (root / f"v2_OpenEnded_mscoco_{split}2014_questions.json").write_text(
    json.dumps({**info, "task_type": "Open-Ended", "questions": questions})
  )
  (root / f"v2_mscoco_{split}2014_annotations.json").write_text(
    json.dumps({**info, "annotations": annotations})
  )


def pope_line(number, name, text, label):
  return json.dumps({"question_id": number, "image": name, "text": text, "label": label})


def write_pope(root, split, lines):
  root.mkdir(parents=True, exist_ok=True)
  (root / f"coco_pope_{split}.json").write_text("\n".join(lines) + "\n")


def everything(source):
  return [source[i] for i in range(len(source))]


def test_gqa(tmp_path):
  write_gqa(tmp_path, {
    "201307251": gqa_entry("n161313", "Is it overcast?", "no", "verify"),
    "05515938": gqa_entry("2370799", "What color is the cat? ", "gray", "query"),
    "05515939": gqa_entry("2370799", "Is the cat left of a dog?", "no", "verify"),
  })  # fmt: skip
  place(tmp_path, "images/n161313.jpg", "images/2370799.jpg")
  source = sources.open_source("gqa", str(tmp_path), "testdev")
  found = everything(source)
  assert found[1] == {
    "image": image(1), "question": "What color is the cat?", "answers": ["gray"], "kind": "query",
    "question_id": "05515938", "image_id": "2370799",
  }  # fmt: skip
  assert [r["image_id"] for r in found] == ["n161313", "2370799", "2370799"]
  assert [r["kind"] for r in found] == ["verify", "query", "verify"]
  assert found[0]["image"] == image(0) and "caption" not in found[0]
  assert source.asked(1) | {"image": image(1)} == found[1]
  assert source.where(2).endswith("testdev_balanced_questions.json, question 05515939")
  again = pickle.loads(pickle.dumps(source))
  assert again[1] == source[1] and again.identity == source.identity


def test_equal_texts_are_held_once(tmp_path):
  """A million questions name 70,000 images and 1,800 answers."""
  write_gqa(tmp_path, {
    str(i): gqa_entry("17", f"Is it {i % 2}?", "no", "verify") for i in range(6)
  })  # fmt: skip
  place(tmp_path, "images/17.jpg")
  rows = sources.open_source("gqa", str(tmp_path), "testdev")._rows
  for column in (1, 3, 4):
    assert rows[0][column] is rows[2][column]
  assert rows[0][2][0] is rows[1][2][0]


@pytest.mark.parametrize("where", ["vqav2", "vqav2/images", "coco", "elsewhere"])
def test_vqav2(tmp_path, where):
  """The annotations are joined by id; COCO's images lie beside them or with COCO."""
  write_vqav2(tmp_path / "vqav2")
  names = [f"COCO_val2014_{i:012d}" for i in (9, 581929)]
  place(tmp_path / where / "val2014", *(f"{name}.jpg" for name in names))
  keys = common.Keys(image_root=str(tmp_path / "elsewhere") if where == "elsewhere" else "")
  found = everything(sources.open_source("vqav2", str(tmp_path / "vqav2"), "val", keys))
  assert found[1] == {
    "image": image(0), "question": "How many cats are there?", "answers": ["2"] * 4 + ["3"] * 6,
    "kind": "number", "question_id": "9001", "image_id": names[0],
  }  # fmt: skip
  assert [(r["question_id"], r["kind"], r["image_id"]) for r in found] == [
    ("9000", "yes/no", names[0]), ("9001", "number", names[0]), ("581929000", "other", names[1]),
  ]  # fmt: skip
  assert all(len(r["answers"]) == 10 for r in found) and found[2]["image"] == image(1)


@pytest.mark.parametrize("split", ["random", "popular", "adversarial"])
def test_pope(tmp_path, split):
  names = [f"COCO_val2014_{i:012d}.jpg" for i in (16631, 310196)]
  write_pope(tmp_path / "pope", split, [
    pope_line(1, names[0], "Is there a person in the image?", "yes"),
    pope_line(2, names[0], "Is there a refrigerator in the image?", "no"), "",
    pope_line(3, names[1], "Is there a snowboard in the image?", "yes"),
  ])  # fmt: skip
  place(tmp_path / "coco" / "val2014", *names)
  found = everything(sources.open_source("pope", str(tmp_path / "pope"), split))
  assert found[1] == {
    "image": image(0), "question": "Is there a refrigerator in the image?", "answers": ["no"],
    "kind": split, "question_id": "2", "image_id": "COCO_val2014_000000016631",
  }  # fmt: skip
  assert [r["answers"][0] for r in found] == ["yes", "no", "yes"]


def test_splits_and_answers_change_the_identity(tmp_path):
  names = [f"COCO_val2014_{i:012d}.jpg" for i in (9, 581929)]
  place(tmp_path / "val2014", *names)
  line = lambda label: pope_line(1, names[0], "Is there a person in the image?", label)
  found = set()
  for split, label in (("random", "yes"), ("popular", "yes"), ("random", "no")):
    write_pope(tmp_path, split, [line(label)])
    found.add(sources.open_source("pope", str(tmp_path), split).identity)
  assert len(found) == 3


@pytest.mark.parametrize(("name", "split", "missing"), [
  ("gqa", "testdev", "questions/testdev_balanced_questions.json"),
  ("vqav2", "train", "v2_OpenEnded_mscoco_train2014_questions.json"),
  ("pope", "popular", "coco_pope_popular.json"),
])  # fmt: skip
def test_a_missing_file_says_which_was_looked_for(tmp_path, name, split, missing):
  with pytest.raises(FileNotFoundError, match=f"{name}: looked for '{tmp_path}/{missing}'"):
    sources.open_source(name, str(tmp_path), split)


def test_missing_annotations_and_images_say_where_they_were_looked_for(tmp_path):
  write_vqav2(tmp_path)
  with pytest.raises(FileNotFoundError, match=f"{tmp_path}/val2014/COCO_val2014_000000000009.jpg"):
    sources.open_source("vqav2", str(tmp_path), "val")
  (tmp_path / "v2_mscoco_val2014_annotations.json").unlink()
  with pytest.raises(FileNotFoundError, match="looked for .*v2_mscoco_val2014_annotations.json"):
    sources.open_source("vqav2", str(tmp_path), "val")


@pytest.mark.parametrize(("content", "message"), [
  ("{", "cannot be read as JSON"), ("[]", "holds no JSON object"), ("{}", "holds no question"),
  ('{"1": 2}', "an entry is no question or answer of this data set: .'1', 2"),
  ('{"1": {"answer": "no"}}', "an entry is no question"),
])  # fmt: skip
def test_what_is_no_gqa_file_is_said(tmp_path, content, message):
  write_gqa(tmp_path, {}).write_text(content)
  with pytest.raises(ValueError, match=f"testdev_balanced_questions.json.* {message}"):
    sources.open_source("gqa", str(tmp_path), "testdev")


def test_what_is_no_vqav2_or_pope_file_is_said(tmp_path):
  write_vqav2(tmp_path)
  path = tmp_path / "v2_mscoco_val2014_annotations.json"
  for content, message in (
    ('{"questions": []}', "no list 'annotations'"), ('{"annotations": [3]}', "an entry is no"),
    ('{"annotations": [{"answers": 3}]}', "cannot be read as JSON of this data set"),
  ):  # fmt: skip
    path.write_text(content)
    with pytest.raises(ValueError, match=f"annotations.json.*{message}"):
      sources.open_source("vqav2", str(tmp_path), "val")
  for lines, message in (
    (["{}"], "line 1: no question as in POPE's"), (["3"], "line 1: no question"),
    ([pope_line(1, "a", "b", "c"), "{"], "line 2 cannot be read"), ([], "holds no question"),
  ):  # fmt: skip
    write_pope(tmp_path, "random", lines)
    with pytest.raises(ValueError, match=f"coco_pope_random.json.*{message}"):
      sources.open_source("pope", str(tmp_path), "random")


def test_what_is_amiss_with_one_question_is_a_damaged_record(tmp_path):
  without = gqa_entry("2", "What is it?", "", "query")
  del without["answer"]
  write_gqa(tmp_path, {
    "a": gqa_entry("0", "Is it?", "no", "verify"),
    "b": gqa_entry("1", "Is it?", "no", "verify"),
    "c": without,
    "d": gqa_entry("3", " ", "no", "verify"),
    "e": gqa_entry("3", "Is it?", "no", "verify", types={}),
    "f": gqa_entry("3", "Is it?", 3, "verify"),
  })  # fmt: skip
  place(tmp_path, "images/0.jpg")
  source = sources.open_source("gqa", str(tmp_path), "testdev")
  found = damage(source)
  assert list(found) == [1, 2, 3, 4, 5]
  assert "images/1.jpg' cannot be read" in found[1]
  assert "question c has no answer; those of test splits are not published" in found[2]
  for i, number in ((3, "d"), (4, "e"), (5, "f")):
    assert f"question {number}: its question, kind and answers must be texts" in found[i]
  assert source.asked(1)["question"] == "Is it?"
  with pytest.raises(DamagedRecord):
    source.asked(2)


def test_a_question_without_annotation_is_a_damaged_record(tmp_path):
  write_vqav2(tmp_path)
  place(tmp_path / "val2014", *(f"COCO_val2014_{i:012d}.jpg" for i in (9, 581929)))
  path = tmp_path / "v2_mscoco_val2014_annotations.json"
  content = json.loads(path.read_text())
  content["annotations"] = content["annotations"][1:]
  path.write_text(json.dumps(content))
  found = damage(sources.open_source("vqav2", str(tmp_path), "val"))
  assert list(found) == [2] and "question 581929000 has no answer" in found[2]
