"""Questions about images with their answers: GQA, VQAv2 and POPE as they lie on their users' disks.

A record is `image` (encoded bytes), `question`, `answers` (ten of VQAv2's annotators, else one),
`kind` (what its figures are split by), `question_id` and `image_id` (texts): several questions are
about one image. There is no caption: for evaluations.
"""

import functools
import hashlib
import json
import os

from jepa_vl.data import common
from jepa_vl.data.transforms import DamagedRecord


class Questions:
  """The questions of a file, in its order.

  path: the file, for messages; folder: of the images; rows: (question_id, question, answers, kind,
  image's name) each.
  """

  def __init__(self, path, folder, rows):
    self._path, self._folder, self._rows = path, folder, rows

  def __len__(self):
    return len(self._rows)

  def __getitem__(self, index):
    """The record at `index`. Raises DamagedRecord."""
    name = self._rows[index][-1]
    return self.asked(index) | {"image": common.read_file(os.path.join(self._folder, name))}

  def asked(self, index):
    """The record at `index` without its image. Raises DamagedRecord."""
    number, question, answers, kind, name = self._rows[index]
    if not answers:
      message = f"{self.where(index)} has no answer; those of test splits are not published"
      raise DamagedRecord(message, "malformed")
    for text in (question, kind, *answers):
      if not isinstance(text, str) or not text.strip():
        message = f"{self.where(index)}: its question, kind and answers must be texts, got {text!r}"
        raise DamagedRecord(message, "malformed")
    return {
      "question": question.strip(),
      "answers": list(answers),
      "kind": kind,
      "question_id": str(number),
      "image_id": os.path.splitext(name)[0],
    }

  def where(self, index):
    """The file and the question's id."""
    return f"{self._path}, question {self._rows[index][0]}"

  @property
  def paths(self):
    """The files of all records' images."""
    return [os.path.join(self._folder, name) for name in dict.fromkeys(r[-1] for r in self._rows)]

  @functools.cached_property
  def identity(self):
    """Changes with the questions, their answers and a sample of the images."""
    digest = hashlib.sha256()
    for row in self._rows:  # one by one: a text of a million rows would be another 200 MB
      digest.update(repr(row).encode("utf-8", "surrogatepass"))
    return common.identity(self, [digest.hexdigest()])


def gqa(path, split, keys):
  """GQA: questions/SPLIT_balanced_questions.json, images/ID.jpg; train, val, testdev.

  The kind is the structural type (choose, compare, logical, query, verify). The train split of
  943,000 questions takes 0.4 GB, while it is read twice its file's size.

  Raises:
    FileNotFoundError: no such file, or no image where they may be.
    ValueError: JSON of another kind.
  """
  path, same = os.path.expanduser(path), _Same()
  file = os.path.join(path, "questions", f"{split}_balanced_questions.json")

  def reduce(found):  # called for every object of the JSON, inner ones first
    if "question" in found:
      image, question, answer, kind = map(
        same, (found.get("imageId"), found["question"], found.get("answer"), found.get("types"))
      )
      return question, (answer,) if answer is not None else (), kind, image
    return found.get("structural", found)

  content = _load("gqa", file, reduce)
  rows = [(number, *row[:3], same(f"{row[3]}.jpg")) for number, row in _rows(file, content.items())]
  return _questions(file, rows, "images", [os.path.join(path, "images")], keys)


def vqav2(path, split, keys):
  """VQAv2: v2_OpenEnded_mscoco_SPLIT2014_questions.json, v2_mscoco_SPLIT2014_annotations.json and
  SPLIT2014/COCO_SPLIT2014_000000000009.jpg, these also in ../coco; train, val.

  The kind is the answer's type (yes/no, number, other). The train split of 444,000 questions takes
  0.3 GB, while it is read 0.8.

  Raises:
    FileNotFoundError: no such file, or no image where they may be.
    ValueError: JSON of another kind.
  """
  path, part, same = os.path.expanduser(path), f"{split}2014", _Same()
  file = os.path.join(path, f"v2_OpenEnded_mscoco_{part}_questions.json")
  annotations = os.path.join(path, f"v2_mscoco_{part}_annotations.json")

  def reduce(found):
    if "answers" in found:
      return found.get("question_id"), (tuple(found["answers"]), same(found.get("answer_type")))
    if "question" in found:
      return found.get("question_id"), found["question"], found.get("image_id")
    return same(found["answer"]) if "answer" in found else found

  asked = _list("vqav2", file, "questions", reduce)
  answered = dict(_rows(annotations, _list("vqav2", annotations, "annotations", reduce)))
  rows = [
    (number, same(question), *answered.get(number, ((), None)), same(_coco_name(part, image)))
    for number, question, image in _rows(file, asked)
  ]
  return _questions(file, rows, part, _coco_places(path, part), keys)


def pope(path, split, keys):
  """POPE on COCO: coco_pope_SPLIT.json of a JSON object a line, val2014/COCO_val2014_*.jpg, these
  also in ../coco; random, popular, adversarial, which is the kind, too.

  Raises:
    FileNotFoundError: no such file, or no image where they may be.
    ValueError: no JSON lines.
  """
  path, rows = os.path.expanduser(path), []
  file = os.path.join(path, f"coco_pope_{split}.json")
  with _open("pope", file) as lines:
    for number, line in enumerate(lines, 1):
      if line.strip():
        found = _parse(f"{file}, line {number}", line)
        try:
          answer = (found["label"],)
          rows.append((found["question_id"], found["text"], answer, split, str(found["image"])))
        except (KeyError, TypeError) as e:
          raise ValueError(f"{file}, line {number}: no question as in POPE's JSON ({e!r})") from e
  return _questions(file, rows, "val2014", _coco_places(path, "val2014"), keys)


class _Same(dict):
  """Equal texts as one object: questions, answers and images come again and again."""

  def __call__(self, value):
    return self.setdefault(value, value) if isinstance(value, str) else value


def _coco_name(part, image):
  number = f"{image:012d}" if isinstance(image, int) else image
  return f"COCO_{part}_{number}.jpg"


def _coco_places(path, part):
  return [os.path.join(path, place, part) for place in ("", "images", "../coco")]


def _open(name, file):
  if not os.path.isfile(file):
    raise FileNotFoundError(f"{name}: looked for {file!r}, which is not there")
  return open(file, encoding="utf-8")


def _load(name, file, reduce):
  """The object of a JSON file, of whose inner objects `reduce` keeps what is of use: as dicts they
  would take ten times the memory. Raises ValueError."""
  with _open(name, file) as f:
    content = _parse(file, f.read(), reduce)
  if not isinstance(content, dict):
    raise ValueError(f"{file} holds no JSON object: it is no {name} file")
  return content


def _parse(where, text, reduce=None):
  try:
    return json.loads(text, object_hook=reduce)
  except (ValueError, RecursionError, TypeError) as e:  # TypeError: of `reduce`
    raise ValueError(f"{where} cannot be read as JSON of this data set ({e})") from e


def _list(name, file, key, reduce):
  found = _load(name, file, reduce).get(key)
  if not isinstance(found, list):
    raise ValueError(f"{file} has no list {key!r}: it is no {name} file")
  return found


def _rows(file, found):
  """Yields what `reduce` made of the entries. Raises ValueError for one that is of another kind."""
  for row in found:
    if not isinstance(row, tuple) or not isinstance(row[1], (tuple, str)):
      raise ValueError(f"{file}: an entry is no question or answer of this data set: {row!r:.200}")
    yield row


def _questions(file, rows, part, places, keys):
  """The rows with the folder of their images: below `image_root`, or one of `places`."""
  if not rows:
    raise ValueError(f"{file!r} holds no question")
  root = os.path.expanduser(keys.image_root)
  given = [root, os.path.join(root, part)] if root else []
  folder = common.image_folder(file, [row[-1] for row in rows], [*given, *places])
  return Questions(file, folder, rows)
