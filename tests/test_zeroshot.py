"""Zero-shot classification is what plain loops in float64 count."""

import numpy as np
import pytest

from jepa_vl.evals import common, zeroshot

LIST = zeroshot.load_templates("imagenet80")


class Texts:
  """In place of an encoder's text side: a random embedding per prompt, of any length."""

  def texts(self, variables, texts):
    draw = lambda text, k: np.random.default_rng([*text.encode(), k]).normal(size=8) * (1 + k)
    return {
      key: np.stack([draw(text, k) for text in texts]).astype(np.float32)
      for k, key in enumerate(("z_txt", "p_txt"))
    }


def features(rows, seed=0):
  rng = np.random.default_rng(seed)
  return {k: rng.normal(size=(rows, 8)).astype(np.float32) for k in ("z_img", "p_img")}


def test_the_list_of_80_is_clip_s():
  assert len(LIST) == len(set(LIST)) == 80
  assert all(t.count("{}") == 1 and t.strip() == t for t in LIST)
  assert {"a photo of a {}.", "itap of my {}.", "the {} in a video game."} < set(LIST)
  assert sum(" the {}" in t or t.startswith("the {}") for t in LIST) == 24


def test_an_ensemble_is_the_unit_mean_of_unit_embeddings(monkeypatch):
  """For each text feature; however many prompts are encoded at once; braces in names are names."""
  names, encode = ("cat", "{dog}", "great owl"), Texts()
  found = zeroshot.class_embeddings(encode, None, names, LIST[:7])
  monkeypatch.setattr(zeroshot, "_TEXTS", 7)
  parts = zeroshot.class_embeddings(encode, None, names, LIST[:7])
  for key in ("z_txt", "p_txt"):
    for c, name in enumerate(names):
      total = np.zeros(8)
      for template in LIST[:7]:
        before, after = template.split("{}")
        x = encode.texts(None, [before + name + after])[key][0].astype(np.float64)
        total += x / np.sqrt((x**2).sum())
      np.testing.assert_allclose(found[key][c], total / np.sqrt((total**2).sum()), atol=1e-6)
    np.testing.assert_array_equal(found[key], parts[key])


@pytest.mark.parametrize("reading", list(common.READINGS))
def test_ranks_and_taken_classes_are_what_a_loop_finds(monkeypatch, reading):
  """In every reading, with two classes of one name, over chunks with a ragged last one."""
  monkeypatch.setattr(zeroshot, "_ROWS", 16)
  names = ("a", "b", "c", "b", "d", "e", "f")
  images, texts = features(40), zeroshot.class_embeddings(Texts(), None, names, LIST[:2])
  labels = np.random.default_rng(1).integers(0, 7, 40)
  groups = np.array([names.index(name) for name in names])
  first, taken = zeroshot.classify(images, texts, labels, groups, reading)
  pairs = {"embed": "zz", "image_to_text": "pz", "text_to_image": "zp", "predictions": "pp"}
  cosine = lambda a, b: a @ b / np.sqrt((a @ a) * (b @ b))
  for i, label in enumerate(labels):
    x = {k[0]: v[i].astype(np.float64) for k, v in images.items()}
    t = {k[0]: v.astype(np.float64) for k, v in texts.items()}
    scores = [
      np.mean([cosine(x[a], t[b][c]) for a, b in ([pairs[reading]] if reading in pairs else
                                                  ("pz", "zp"))])
      for c in range(7)
    ]  # fmt: skip
    best = max(scores[c] for c in range(7) if names[c] == names[label])
    assert first[i] == sum(s > best + 1e-6 for s in scores)
    expected = label if first[i] == 0 else int(np.argmax(scores))
    assert names[taken[i]] == names[expected]


def test_a_tie_is_a_miss_and_a_class_that_is_not_there_counts_nothing():
  images = dict.fromkeys(("z_img", "p_img"), np.ones((4, 8), np.float32))
  texts = dict.fromkeys(("z_txt", "p_txt"), np.ones((3, 8), np.float32))
  labels = np.array([0, 0, 0, 2])
  first, taken = zeroshot.classify(images, texts, labels, np.arange(3), "avg")
  assert (first == 2).all() and (taken != labels).all()
  hits = np.array([[1], [1], [0], [0]])
  value, low, high = zeroshot.per_class(hits, labels)
  assert value == pytest.approx((2 / 3 + 0) / 2) and 0 <= low <= value <= high


def test_the_most_confused_classes_are_shown():
  labels = np.repeat(np.arange(100), 3)
  taken = labels.copy()
  taken[3 * 7], taken[3 * 90 + 1] = 50, 12  # 7 for 50, 90 for 12
  shown = zeroshot.most_confused(labels, taken, 100)
  assert len(shown) == 30 and {7, 12, 50, 90} < set(shown) and (np.diff(shown) > 0).all()
  assert zeroshot.most_confused(labels[:9], taken[:9], 3).tolist() == [0, 1, 2]


def test_names_come_from_a_file_or_from_the_class_folders(tmp_path):
  path = tmp_path / "names.txt"
  path.write_text("\ufefftench\n goldfish \n", encoding="utf-8")
  assert zeroshot.load_names(str(path)) == ("tench", "goldfish")
  assert zeroshot.load_names(["a", "b"]) == ("a", "b")
  records = [{"class": c, "class_name": name} for c, name in (
    (1, "02_wheeled vehicle"), (0, "00_dog"), (2, "american_bulldog"), (3, "747-200"), (0, "00_dog")
  )]  # fmt: skip
  assert zeroshot.own_names(records, "class") == (
    "dog", "wheeled vehicle", "american bulldog", "747-200"
  )  # fmt: skip


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda path: zeroshot.load_templates("imagenet81"), "imagenet81.*name of a list: imagenet80"),
    (lambda path: zeroshot.load_templates(("a {}", "{} or {}", "x")), "got .*or {}', 'x'"),
    (lambda path: zeroshot.load_templates(()), "got none"),
    (lambda path: zeroshot.load_names(str(path)), "names.txt, line 2: a class without a name"),
    (lambda path: zeroshot.load_names("nowhere.txt"), "no file; expected one class name per line"),
    (lambda path: zeroshot.own_names([{"class": 0}], "class"), "have no `class_name`: give"),
    (lambda path: zeroshot.own_names([{"class": 1, "class_name": "x"}], "class"), "class 0 has no"),
    (lambda path: zeroshot.own_names([{"class": 0, "class_name": x} for x in "xy"], "class"),
     "0 is 'x' in one record and 'y' in another"),
  ],
)  # fmt: skip
def test_what_is_wrong_with_names_and_templates_is_said(tmp_path, call, message):
  (tmp_path / "names.txt").write_text("a\n\nb\n")
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    call(tmp_path / "names.txt")
