"""Zero-shot classification: images against the class names in prompts."""

import pathlib
import re

import numpy as np
import scipy.sparse
import tqdm

from jepa_vl.evals import common

PROTOCOL = """
The class whose prompts have the highest cosine with the image; nothing is fitted. A class's prompts
are embedded, normalised, averaged and normalised again, as CLIP does (arXiv 2103.00020). Classes of
one name count as one. Ties count against the model.
"""
TEMPLATES = pathlib.Path(__file__).resolve().parent / "templates"
_TEXTS = 8192  # prompts that are encoded in one go
_ROWS = 4096  # images whose scores are held in one go
_SHOWN = 30  # classes in the table and the confusion matrix


def load_templates(templates):
  """A tuple of templates, or the name of a list in `templates/`, as a tuple; each with one {}.

  Raises ValueError.
  """
  if isinstance(templates, str):
    path = TEMPLATES / f"{templates}.txt"
    if not path.is_file():
      known = ", ".join(sorted(p.stem for p in TEMPLATES.glob("*.txt")))
      raise ValueError(
        f"templates={templates!r} must be a tuple of templates, such as ('a photo of a {{}}.',), "
        f"or the name of a list: {known}"
      )
    lines = path.read_text(encoding="utf-8").splitlines()
    templates = [line for line in lines if line and not line.startswith("#")]
  bad = [t for t in templates if not isinstance(t, str) or t.count("{}") != 1]
  if bad or not templates:
    raise ValueError(f"templates: each must be a text with one {{}} in it, got {bad or 'none'}")
  return tuple(templates)


def load_names(classes):
  """The class names of a tuple, or of a text file with one per line, in the labels' order.

  Raises FileNotFoundError and ValueError.
  """
  if isinstance(classes, str):
    path = pathlib.Path(classes).expanduser()
    if not path.is_file():
      raise FileNotFoundError(
        f"classes={classes!r} is no file; expected one class name per line, in the labels' order"
      )
    classes = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    if "" in classes:
      raise ValueError(f"{path}, line {classes.index('') + 1}: a class without a name")
  return tuple(classes)


def own_names(records, label):
  """The class names that records hold in `class_name`, by their label; numbers and _ are left out.

  "00_dog" is "dog", "american_bulldog" "american bulldog". Raises ValueError if a class has no
  name, or two.
  """
  names = {}
  for record in records:
    name = record.get("class_name")
    if name is None:
      raise ValueError(
        "classes is empty, and the records have no `class_name`: give the names as a tuple, or a "
        "text file with one per line"
      )
    if names.setdefault(record[label], name) != name:
      raise ValueError(
        f"class {record[label]} is {names[record[label]]!r} in one record and {name!r} in another: "
        "all splits must have the same class folders"
      )
  missing = sorted(set(range(max(names) + 1)) - set(names))
  if missing:
    raise ValueError(f"classes is empty, and class {missing[0]} has no record to take its name of")
  return tuple(_readable(names[c]) for c in range(len(names)))


def _readable(name):
  return re.sub(r"^\d+[._]", "", name).replace("_", " ")


def class_embeddings(encode, variables, names, templates):
  """What each class's prompts say: z_txt, p_txt (C, D) of unit length.

  The embeddings of a class's prompts are normalised, averaged over templates, and normalised again
  (CLIP's ensemble, arXiv 2103.00020, section 3.1.4).
  """
  step = max(_TEXTS // len(templates), 1)
  starts = range(0, len(names), step)
  found = {}
  for start in tqdm.tqdm(starts, desc="prompts", disable=None if len(starts) > 1 else True):
    some = names[start : start + step]
    prompts = [template.replace("{}", name) for name in some for template in templates]
    for key, x in encode.texts(variables, prompts).items():
      x = common.unit(x).reshape(len(some), len(templates), -1)
      found.setdefault(key, []).append(common.unit(x.mean(axis=1)))
  return {key: np.concatenate(parts) for key, parts in found.items()}


def classify(images, texts, labels, groups, reading):
  """How many wrong classes are ranked before the right one, and the class that is taken.

  images: dict of (N, D) features; texts: dict of (C, D); labels (N,) int; groups (C,) int, equal
  where two classes have one name and cannot be told apart. -> (N,) int each. Of a tie, a wrong
  class is taken.
  """
  first, taken = [], []
  keys = {key for key, _ in common.READINGS[reading]}
  for start in range(0, len(labels), _ROWS):
    rows = slice(start, start + _ROWS)
    scores = common.similarity({k: images[k][rows] for k in keys}, texts, reading)
    right = groups[labels[rows], None] == groups
    first.append(common.first_hit(scores, right))
    scores = np.where(np.isnan(scores), np.inf, scores)
    wrong = np.argmax(np.where(right, -np.inf, scores), axis=1)
    taken.append(np.where(first[-1] == 0, labels[rows], wrong))
  return np.concatenate(first), np.concatenate(taken)


def per_class(hits, labels):
  """Mean accuracy of the classes that there are, with the ends of its 95% interval.

  hits: (N, R) bool; labels: (N,) int -> value, low, high: (R,) each. Images are resampled.
  """
  _, column = np.unique(labels, return_inverse=True)
  count = len(labels)
  members = scipy.sparse.csr_array((np.ones(count), (column, np.arange(count))))  # (C, N)

  def mean(weights):
    sums, counts = members @ (hits * weights[:, None]), members @ weights
    return np.mean(sums[counts > 0] / counts[counts > 0, None], axis=0)

  rng = np.random.default_rng(0)
  draws = [mean(np.bincount(rng.integers(count, size=count), minlength=count)) for _ in range(1000)]
  return mean(np.ones(count)), *np.percentile(draws, (2.5, 97.5), axis=0)


def run(encode, variables, mesh, *, source, path, splits, label, classes, templates):
  """In every reading "SPLIT/READING/top1", "top5" of more than five classes, and "per_class".

  label: the record's field that holds the class; classes: their names, as a tuple, or the path of a
  text file with one per line, or "" for those that the records hold in `class_name`; templates: a
  tuple of prompts with one {} each, or the name of a list in evals/templates. "per_class" is the
  mean of the classes' own accuracies (Pets, Caltech).

  Raises:
    ValueError, FileNotFoundError: names or templates that cannot be read, or a class without one.
  """
  templates = load_templates(templates)
  names = names_of(encode, source, path, splits, label, classes)
  texts = class_embeddings(encode, variables, names, templates)
  groups = np.unique(names, return_inverse=True)[1]
  figures, sizes, details = {}, {"templates": len(templates)}, []
  for split in splits:
    features = encode.features(variables, source, path, split)
    data = encode.split(source, path, split)
    labels = common.labels(data, label)
    found = {r: classify(features, texts, labels, groups, r) for r in encode.readings}
    figures |= _figures(split, {r: first for r, (first, _) in found.items()}, labels, groups)
    sizes[split] = {"images": len(data), "classes": len(names), "left_out": len(data.left_out)}
    details += _details(split, names, labels, found[encode.readings[-1]][1])
  return common.result(figures, protocol=PROTOCOL, sizes=sizes, details=details)


def names_of(encode, source, path, splits, label, classes):
  """The class names that `classes` gives, or else the records; one for every label."""
  data = {split: encode.split(source, path, split) for split in splits}
  if not classes:
    return own_names([record for split in data.values() for record in split.records], label)
  names = load_names(classes)
  for split, found in data.items():
    last = common.labels(found, label).max()
    if last >= len(names):
      raise ValueError(
        f"split {split!r} has an image of class {last}, and classes names {len(names)}, counted "
        "from 0"
      )
  return names


def _figures(split, firsts, labels, groups):
  classes = groups.max() + 1
  counts = np.sort(np.bincount(labels))[::-1]
  figures = {}
  for k in (1, 5) if classes > 5 else (1,):
    hits = {f"{split}/{reading}/top{k}": first < k for reading, first in firsts.items()}
    figures |= common.means(hits)
    for key in hits:
      figures[f"{key}@random"] = k / classes
      figures[f"{key}@majority"] = counts[:k].sum() / len(labels)
  found = per_class(np.stack([first < 1 for first in firsts.values()], axis=1), labels)
  for reading, value, low, high in zip(firsts, *found, strict=True):
    key = f"{split}/{reading}/per_class"
    figures |= {key: value, f"{key}@low": low, f"{key}@high": high}
    figures |= {f"{key}@random": 1 / classes, f"{key}@majority": 1 / np.sum(counts > 0)}
  return figures


def _details(split, names, labels, taken):
  """The table and the confusion matrix of at most 30 classes, the most confused ones."""
  shown = most_confused(labels, taken, len(names))
  rows = []
  for c in shown:
    found = np.bincount(taken[labels == c], minlength=len(names))
    count, right = found.sum(), found[c]
    found[c] = 0
    other = names[found.argmax()] if found.any() else "-"
    share = right / count if count else float("nan")
    rows.append([names[c], int(count), float(share), other, int(found.max())])
  counts = np.zeros((len(shown), len(shown)), int)
  both = np.isin(labels, shown) & np.isin(taken, shown)
  np.add.at(counts, tuple(np.searchsorted(shown, x[both]) for x in (labels, taken)), 1)
  hint = "The reading that the table of figures shows."
  if len(shown) < len(names):
    hint += f" The {len(shown)} most confused of {len(names)} classes."
  return [
    {"kind": "table", "title": f"Zero-shot by class, {split}", "hint": hint, "rows": rows,
     "columns": ["class", "images", "top-1", "most often taken for", "so often"]},
    {"kind": "matrix", "title": f"Zero-shot confusion, {split}", "counts": counts,
     "names": [names[c] for c in shown],
     "hint": f"Rows: what the images show; columns: what they are taken for. {hint}"},
  ]  # fmt: skip


def most_confused(labels, taken, classes):
  """At most 30 classes, in order: those with most images taken for another, or others' for them."""
  wrong = labels != taken
  trouble = np.bincount(labels[wrong], minlength=classes)
  trouble += np.bincount(taken[wrong], minlength=classes)
  return np.sort(np.argsort(-trouble, kind="stable")[:_SHOWN])
