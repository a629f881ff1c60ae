"""Splits and features are the same kept, streamed, from the cache, and on every mesh."""

import json
import os

import jax
import numpy as np
import pytest
from made_up import look, make_encode, make_variables
from records import record, write

from jepa_vl import sharding
from jepa_vl.data import embedded, transforms
from jepa_vl.evals import encode as encode_lib

VAL = ("emoji", "", "val")


@pytest.fixture(scope="module")
def variables():
  return make_variables()


@pytest.fixture(scope="module")
def encode():
  return make_encode(sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1]))


@pytest.mark.parametrize("data", [1, 8])
@pytest.mark.parametrize("batch_size", [8, 64])
def test_features_do_not_depend_on_batches_or_devices(encode, variables, data, batch_size):
  """Neither the padding of the last batch nor the mesh can be seen, and order is kept."""
  mesh = sharding.make_mesh(data=data, fsdp=1, tensor=1, devices=jax.devices()[:data])
  images = encode.split(*VAL).images()[:27]
  captions = encode.split(*VAL).captions[:11]
  found = make_encode(mesh, batch_size=batch_size)
  found = found.images(variables, images) | found.texts(variables, captions)
  ids, mask, _ = encode.tokenize(captions)
  direct = look(variables, {"image": images, "text": ids, "mask": mask})
  assert set(found) == {"z_img", "p_img", "cls", "pooled", "z_txt", "p_txt"}
  pooled = np.asarray(direct["patches"], np.float32).mean(axis=1)
  for k, v in found.items():
    assert isinstance(v, np.ndarray) and v.dtype == np.float32
    np.testing.assert_allclose(v, pooled if k == "pooled" else direct[k], atol=1e-5, err_msg=k)


def test_patches_lie_on_their_grid(encode, variables):
  images = np.zeros((3, 16, 16, 3), np.uint8)
  images[:, :8, 8:, 1] = 255  # top right is green
  found = encode.patches(variables, images)
  assert found.shape == (3, 2, 2, 3) and found.dtype == np.float32
  assert (found[:, 0, 1] == [0, 1, 0]).all() and found.sum() == 3


def test_features_follow_the_variables(mesh, variables):
  """They are kept for one state and computed anew for the next."""
  encode, other = make_encode(mesh), jax.tree.map(lambda x: 2 * x, variables)
  first = encode.features(variables, *VAL)
  assert encode.features(variables, *VAL) is first
  second = encode.features(other, *VAL)
  np.testing.assert_allclose(second["z_img"], 2 * first["z_img"], rtol=1e-5)


@pytest.mark.parametrize("features_first", [True, False])
def test_a_split_too_large_to_keep_gives_the_same(
  encode, variables, mesh, monkeypatch, features_first
):
  """In stretches of 64, each read again when asked for."""
  expected = encode.split(*VAL), encode.features(variables, *VAL)
  monkeypatch.setattr(encode_lib, "KEEP_BYTES", 1000)
  monkeypatch.setattr(encode_lib, "STRETCH_BYTES", 1000)
  streamed = make_encode(mesh)
  if features_first:
    features, split = streamed.features(variables, *VAL), streamed.split(*VAL)
  else:
    split, features = streamed.split(*VAL), streamed.features(variables, *VAL)
  assert split._kept is None
  rows = [3, 200, 7]
  np.testing.assert_array_equal(split.images(rows), expected[0].images(rows))
  same(split, expected[0], features, expected[1])


def same(split, other, features, others):
  assert (split.records, split.captions) == (other.records, other.captions)
  assert split.left_out == other.left_out and (split.relevant != other.relevant).nnz == 0
  np.testing.assert_array_equal(split.thumbnails, other.thumbnails)
  assert set(features) == set(others)
  for k in features:
    np.testing.assert_allclose(features[k], others[k], atol=1e-6)


def test_the_cache_gives_the_same_without_reading(
  variables, mesh, tmp_path, monkeypatch, caplog
):
  first = make_encode(mesh, cache=str(tmp_path))
  features, split = first.features(variables, *VAL), first.split(*VAL)
  assert len(list(tmp_path.iterdir())) == 2
  monkeypatch.setattr(encode_lib.pipeline, "evaluation_rows", None)
  again = make_encode(mesh, cache=str(tmp_path))
  same(again.split(*VAL), split, again.features(variables, *VAL), features)
  with pytest.raises(TypeError):  # other weights have other features, and must be computed
    again.features(jax.tree.map(lambda x: x + 1, variables), *VAL)
  for file in tmp_path.iterdir():
    file.write_bytes(file.read_bytes()[:100])
  monkeypatch.undo()
  monkeypatch.setattr(encode_lib.log, "propagate", True)
  damaged = make_encode(mesh, cache=str(tmp_path))
  same(damaged.split(*VAL), split, damaged.features(variables, *VAL), features)
  assert "cannot be read" in caplog.text


def test_split_has_one_caption_per_concept_and_both_styles_as_hits(encode):
  data, records = encode.split(*VAL), embedded.read_records("val")
  assert data.images().shape == (len(records), 16, 16, 3) and data.left_out == []
  concepts = list(dict.fromkeys(r["concept"] for r in records))
  relevant = data.relevant.toarray()
  assert len(data.captions) == len(concepts) == relevant.shape[1]
  for r, row in zip(records, relevant, strict=True):
    c = concepts.index(r["concept"])
    assert row[c] and data.captions[c] == transforms.full_caption(r)
  assert relevant.sum(axis=0).min() == 2
  assert encode.split(*VAL) is data


def images_of(count):
  return list({r["concept"]: r["image"] for r in embedded.read_records("val")}.values())[:count]


def test_equal_images_or_equal_captions_are_hits_for_each_other(encode, tmp_path):
  a, b, c = images_of(3)
  pairs = [(a, "one"), (a, "two"), (b, "three"), (c, "three"), (b"broken", "four")]
  write(tmp_path / "x", [{"image": data, "caption": caption} for data, caption in pairs])
  split = encode.split("array_record", str(tmp_path / "x"), "")
  assert split.captions == ["one", "two", "three"] and split.left_out == [4]
  assert split.indices.tolist() == [0, 1, 2, 3] and len(split) == 4
  expected = [[1, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 1]]
  assert split.relevant.toarray().astype(int).tolist() == expected


def test_each_of_several_captions_is_a_candidate():
  """And one that another image has, too, is right for both."""
  records = [{"caption": "a", "captions": ["a", "b"]}, {"caption": "b", "captions": ["b", "c"]}, {}]
  captions, relevant = encode_lib.match_captions(records, np.arange(3, dtype=np.uint8)[:, None])
  assert captions == ["a", "b", "b", "c"]
  assert relevant.toarray().astype(int).tolist() == [[1, 1, 1, 0], [0, 1, 1, 1], [0] * 4]


@pytest.mark.parametrize("other", ["x|y", "", 3, [1, 2], {"a": "b"}])
def test_a_field_named_captions_that_is_no_list_of_texts_is_no_caption(other):
  records = [{"caption": "a", "captions": other}, {"caption": "b", "captions": other}]
  captions, relevant = encode_lib.match_captions(records, np.arange(2, dtype=np.uint8)[:, None])
  assert captions == ["a", "b"] and (relevant.toarray() == np.eye(2)).all()


def test_the_cache_does_not_give_what_files_held_before(variables, mesh, tmp_path):
  """Not of the eight records either that the source's identity looks at."""
  folder, (image, other) = tmp_path / "pairs", images_of(2)
  folder.mkdir()
  for i in range(20):
    (folder / f"{i:02d}.png").write_bytes(image)
    (folder / f"{i:02d}.txt").write_text(f"number {i}")
  where = ("folder", str(folder), "")
  read = lambda encode: (encode.features(variables, *where), encode.split(*where))
  before, _ = read(make_encode(mesh, cache=str(tmp_path / "cache")))
  (folder / "01.txt").write_text("corrected")
  (folder / "03.png").write_bytes(other)
  features, split = read(make_encode(mesh, cache=str(tmp_path / "cache")))
  assert split.captions[1] == "corrected"
  changed = np.any(features["z_img"] != before["z_img"], axis=1)
  assert np.flatnonzero(changed).tolist() == [3]


@pytest.mark.parametrize("source", ["class_folder", "segmentation_folder", "coco_captions"])
def test_the_cache_knows_every_file_of_a_source(mesh, tmp_path, source):
  (image,) = images_of(1)
  files = {
    "class_folder": ("cat/{}.png",),
    "segmentation_folder": ("images/val/{}.png", "annotations/val/{}.png"),
    "coco_captions": ("val/{}.png",),
  }[source]
  for name in files:
    for i in range(20):
      path = tmp_path / name.format(i)
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(image)
  rows = [{"id": i, "file_name": f"{i}.png"} for i in range(20)]
  said = [{"image_id": i, "caption": "x"} for i in range(20)]
  listed = tmp_path / "captions_val.json"
  listed.write_text(json.dumps({"images": rows, "annotations": said}))
  path = listed if source == "coco_captions" else tmp_path

  def version():
    encode = make_encode(mesh, cache=str(tmp_path / "cache"))
    return encode.version(encode.source(source, str(path), "val"))

  seen = {version(), version()}
  assert len(seen) == 1
  for name in files:
    os.utime(tmp_path / name.format(13), (1, 1))
    assert version() not in seen
    seen.add(version())


def test_texts_that_are_no_unicode_go_through_the_cache(variables, mesh, tmp_path):
  """Half a surrogate pair in a JSON, and a file name that is not UTF-8."""
  (image,) = images_of(1)
  for folder in ("pairs", "classes/cat"):
    (tmp_path / folder).mkdir(parents=True)
  (tmp_path / "pairs" / "x.png").write_bytes(image)
  (tmp_path / "pairs" / "x.json").write_text('{"caption": "sun", "title": "sun \\ud83d"}')
  (tmp_path / "classes" / "cat" / os.fsdecode(b"caf\xe9.png")).write_bytes(image)
  for source, path, field, text in (
    ("folder", "pairs", "title", "sun \ud83d"),
    ("class_folder", "classes", "file_name", os.fsdecode(b"caf\xe9.png")),
  ):
    for _ in ("read", "from the cache"):
      encode = make_encode(mesh, cache=str(tmp_path / "cache"))
      encode.features(variables, source, str(tmp_path / path), "")
      (found,) = encode.split(source, str(tmp_path / path), "").records
      assert found[field] == text


def test_only_bad_records_is_an_error(encode, tmp_path):
  write(tmp_path / "x", [{"image": b"broken", "caption": "x"}] * 3)
  with pytest.raises(ValueError, match="none of the 3 records"):
    encode.split("array_record", str(tmp_path / "x"), "")


def test_other_records_in_another_process_are_refused(mesh, tmp_path, monkeypatch):
  write(tmp_path / "x", [record(i) for i in range(3)])
  monkeypatch.setattr(encode_lib.distributed, "exchange", lambda mine: [mine, ("other", 3)])
  with pytest.raises(ValueError, match="not the same in every process"):
    make_encode(mesh).split("array_record", str(tmp_path / "x"), "")
