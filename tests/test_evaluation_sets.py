"""Class folders and caption files in the layouts that their data sets have on disk."""

import json
import os
import pickle

import jax
import made_up
import numpy as np
import pytest
from ml_collections import ConfigDict
from records import damage, noise, png, stands_in

from jepa_vl import sharding
from jepa_vl.data import common, sources
from jepa_vl.data.transforms import DamagedRecord
from jepa_vl.evals import retrieval


def image(i):
  return png(noise((20, 24), i))


def place(root, *names):
  for i, name in enumerate(names):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image(i))


# --- class folders


def test_imagenet_and_imagenet_9_are_read_as_they_lie_on_disk(tmp_path):
  place(tmp_path, "val/n02/ILSVRC2012_val_2.JPEG", "val/n01/ILSVRC2012_val_9.JPEG",
        "val/n01/ILSVRC2012_val_1.JPEG", "original/val/02_wheeled vehicle/n01_7.JPEG",
        "original/val/00_dog/deep/n02_1.png", "original/val/00_dog/.thumbs.png")  # fmt: skip
  (tmp_path / "val" / "synsets.txt").write_text("not a class")
  (tmp_path / "val" / ".cache").mkdir()
  source = sources.open_source("class_folder", str(tmp_path / "{split}"), "val")
  found = [source[i] for i in range(len(source))]
  assert [(r["class"], r["class_name"], r["file_name"]) for r in found] == [
    (0, "n01", "ILSVRC2012_val_1.JPEG"), (0, "n01", "ILSVRC2012_val_9.JPEG"),
    (1, "n02", "ILSVRC2012_val_2.JPEG"),
  ]  # fmt: skip
  assert [r["image"] for r in found] == [image(2), image(1), image(0)]
  assert "caption" not in found[0]
  source = sources.open_source("class_folder", str(tmp_path / "{split}" / "val"), "original")
  found = [(r["class"], r["class_name"], r["file_name"]) for r in map(source.__getitem__, (0, 1))]
  assert found == [(0, "00_dog", "deep/n02_1.png"), (1, "02_wheeled vehicle", "n01_7.JPEG")]
  assert len(source) == 2
  again = pickle.loads(pickle.dumps(source))
  assert again[1] == source[1] and again.identity == source.identity


def test_what_is_no_class_folder_is_said_with_what_was_looked_for(tmp_path):
  open_ = lambda name: sources.open_source("class_folder", str(tmp_path / name), "")
  with pytest.raises(FileNotFoundError, match="none' is no folder.*none/CLASS/x.jpg"):
    open_("none")
  place(tmp_path, "flat/a.JPEG", "flat/b.jpg", "some/cat/a.jpg", "some/dog/a.gif")
  with pytest.raises(ValueError, match="flat' holds no class folders .and 2 images.*flat/CLASS/x"):
    open_("flat")
  with pytest.raises(ValueError, match="some/dog' counts as a class and holds no image"):
    open_("some")
  place(tmp_path, "some/dog/a.jpg")
  cfg = ConfigDict({"source": "class_folder", "path": str(tmp_path / "some"), "split": "",
                    "mix": (), **vars(common.USUAL)})  # fmt: skip
  with pytest.raises(ValueError, match="'class_folder' has no captions: it is for evaluations"):
    sources.from_config(cfg)


def test_a_damaged_image_is_a_damaged_record(tmp_path):
  place(tmp_path, "a/0.jpg", "a/1.jpg", "b/0.jpg", "b/1.jpg")
  (tmp_path / "a" / "1.jpg").write_bytes(image(1)[:100])
  source = sources.open_source("class_folder", str(tmp_path), "")
  os.remove(tmp_path / "b" / "0.jpg")
  assert [stands_in(source, i) for i in range(4)] == [0, 3, 3, 3]
  with pytest.raises(DamagedRecord, match="b/0.jpg' cannot be read .No such file"):
    source[2]


# --- captions


def write_coco(root, name, count):
  """COCO's own layout: annotations/captions_NAME.json beside NAME, the annotations in any order."""
  entries = [{"id": 10 * i, "file_name": f"{10 * i:012d}.jpg", "width": 24} for i in range(count)]
  annotations = [
    {"id": 100 * i + k, "image_id": 10 * i, "caption": f" image {i}, caption {k}.\n"}
    for k in range(5)
    for i in np.random.default_rng(k).permutation(count).tolist()
  ]
  (root / "annotations").mkdir(parents=True, exist_ok=True)
  path = root / "annotations" / f"captions_{name}.json"
  path.write_text(json.dumps({"images": entries, "annotations": annotations, "info": {}}))
  place(root, *(f"{name}/{10 * i:012d}.jpg" for i in range(count)))
  return path


def write_karpathy(root, name, splits, places):
  """Karpathy's JSON: image i is of the i-th of `splits` and lies in the i-th of `places`."""
  entries = [
    {"filename": f"{i}.jpg", "split": split, "imgid": i, "sentids": [5 * i],
     "sentences": [{"raw": f"{split} {i}, {k}.", "tokens": []} for k in range(5 + i % 2)],
     **({"filepath": where} if where else {})}
    for i, (split, where) in enumerate(zip(splits, places, strict=True))
  ]  # fmt: skip
  root.mkdir(parents=True, exist_ok=True)
  (root / f"dataset_{name}.json").write_text(json.dumps({"images": entries, "dataset": name}))
  return root / f"dataset_{name}.json"


def test_coco_s_own_captions(tmp_path):
  write_coco(tmp_path, "val2017", 3)
  path = str(tmp_path / "annotations" / "captions_{split}2017.json")
  source = sources.open_source("coco_captions", path, "val")
  assert [source[i]["captions"] for i in range(3)] == [
    [f"image {i}, caption {k}." for k in range(5)] for i in range(3)
  ]
  assert source[2] == {
    "image": image(2), "caption": "image 2, caption 0.", "captions": source[2]["captions"],
    "file_name": "000000000020.jpg",
  }  # fmt: skip
  again = pickle.loads(pickle.dumps(source))
  assert again[1] == source[1] and again.identity == source.identity


@pytest.mark.parametrize("images", ["coco", "images", "elsewhere"])
def test_karpathy_s_splits_of_coco(tmp_path, images):
  """The images in `val2014` and `train2014`, which lie beside the JSON or where one says."""
  splits, places = ("train", "test", "restval", "test"), ("train2014", *["val2014"] * 3)
  path = write_karpathy(tmp_path / "coco", "coco", splits, places)
  root = {"coco": tmp_path / "coco", "images": tmp_path / "coco" / "images"}.get(images, tmp_path)
  place(root, *(f"{where}/{i}.jpg" for i, where in enumerate(places)))
  keys = common.Keys(image_root=str(tmp_path) if images == "elsewhere" else "")
  source = sources.open_source("coco_captions", str(path), "test", keys)
  assert [(r["file_name"], r["image"], len(r["captions"])) for r in (source[0], source[1])] == [
    ("val2014/1.jpg", image(1), 6), ("val2014/3.jpg", image(3), 6),
  ]  # fmt: skip
  both = sources.open_source("coco_captions", str(path), "train+restval", keys)
  assert [both[i]["caption"] for i in range(len(both))] == ["train 0, 0.", "restval 2, 0."]
  assert both.identity != source.identity


def test_karpathy_s_splits_of_flickr30k(tmp_path):
  path = write_karpathy(tmp_path, "flickr30k", ("train", "test"), ("", ""))
  place(tmp_path, "flickr30k-images/0.jpg", "flickr30k-images/1.jpg")
  # Of a table that training reads: it does not hinder.
  keys = common.Keys(image_root=str(tmp_path / "cc3m"))
  source = sources.open_source("coco_captions", str(path), "test", keys)
  assert len(source) == 1 and source[0]["file_name"] == "1.jpg"


def test_wrong_caption_files_say_what_was_looked_for(tmp_path):
  open_ = lambda path, split="": sources.open_source("coco_captions", str(path), split)
  with pytest.raises(FileNotFoundError, match="none.json' is no file.*captions_val2017.json"):
    open_(tmp_path / "none.json")
  path = write_karpathy(tmp_path, "coco", ("test",), ("val2014",))
  with pytest.raises(ValueError, match="dataset_coco.json has no split 'dev', only test"):
    open_(path, "test+dev")
  with pytest.raises(FileNotFoundError, match="image_root names .*images/val2014/0.jpg, "):
    open_(path, "test")
  for content, message in (
    ("{", "is no JSON"), ("[]", "no list `images`"), ('{"images": []}', "no list `images`"),
    ('{"images": [{"id": 1}], "annotations": [{"bbox": []}]}', "no captions in its `annotations`"),
    ('{"images": [{"id": 1}], "annotations": [{"caption": "", "image_id": 2}]}', "of image 2, wh"),
    ('{"images": [{"id": 1}], "annotations": [{"caption": "x", "image_id": 1}]}', "'file_name'"),
  ):  # fmt: skip
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
      open_(path)


def test_what_is_amiss_with_one_image_or_caption_is_a_damaged_record(tmp_path):
  path = write_coco(tmp_path, "val2017", 5)
  content = json.loads(path.read_text())
  content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 10]
  next(a for a in content["annotations"] if a["image_id"] == 20)["caption"] = " \n"
  path.write_text(json.dumps(content))
  os.remove(tmp_path / "val2017" / f"{30:012d}.jpg")
  (tmp_path / "val2017" / f"{40:012d}.jpg").write_bytes(b"no image")
  source = sources.open_source("coco_captions", str(path), "")
  found = damage(source)
  assert list(found) == [1, 2, 3]
  for i, text in ((1, "caption is missing"), (2, "caption is empty"), (3, "No such file")):
    assert text in found[i] and f"{10 * i:012d}.jpg" in found[i]
  assert stands_in(source, 4) == 0


# --- folds


def test_folds_are_means_over_parts_of_their_own_candidates(tmp_path):
  """COCO's 1k protocol, with parts of unequal size and images of unequal many captions."""
  count, folds, k = 11, 3, 2
  names = [f"{i}.jpg" for i in range(count)]
  path = write_karpathy(tmp_path, "coco", ["test"] * count, [""] * count)
  place(tmp_path, *names)
  mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
  encode, variables = made_up.make_encode(mesh), made_up.make_variables()
  cfg = {"source": "coco_captions", "path": str(path), "splits": ("test",)}
  found = retrieval.run(encode, variables, mesh, **cfg, ranks=(k,), folds=folds)["figures"]
  features = encode.features(variables, "coco_captions", str(path), "test")
  owner = [i for i in range(count) for _ in range(5 + i % 2)]
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  cosine = unit(features["z_img"].astype(float)) @ unit(features["z_txt"].astype(float)).T
  best = lambda scores, choices: sorted(choices, key=lambda c: -scores[c])[:k]
  recalls = {"i2t": [], "t2i": []}
  for images in np.array_split(range(count), folds):
    captions = [c for c, i in enumerate(owner) if i in images]
    recalls["i2t"].append(
      np.mean([any(owner[c] == i for c in best(cosine[i], captions)) for i in images])
    )
    recalls["t2i"].append(np.mean([owner[c] in best(cosine[:, c], images) for c in captions]))
  assert len({len(part) for part in np.array_split(range(count), folds)}) == 2
  for way, parts in recalls.items():
    assert found[f"test/{way}/embed/R@{k}"] == pytest.approx(np.mean(parts))
    assert len(set(parts)) > 1  # so that another weighting would show
