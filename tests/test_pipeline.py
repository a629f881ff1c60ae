"""Batches are a function of (seed, step); bad records are replaced or named, never dropped."""

import collections
import colorsys

import cv2
import msgpack
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from jepa_vl.data import pipeline, sources, tokenizer, transforms
from jepa_vl.data.sources import DamagedRecord

N, BATCH, SEED = 23, 8, 5  # N is no multiple of BATCH: epochs end within batches


def png(image):
  return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


def noise(shape, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def record(i, **changes):
  fields = {"image": png(noise((20, 24), i)), "caption": f"number {i}", "tags": ["red", "blue"]}
  return fields | changes


def write(path, records):
  """Records as ArrayRecord; bytes are written as they are, everything else as msgpack."""
  writer = ArrayRecordWriter(str(path), "group_size:1")
  for r in records:
    writer.write(r if isinstance(r, bytes) else msgpack.packb(r))
  writer.close()
  return str(path)


@pytest.fixture(scope="module")
def tok():
  return tokenizer.load("emoji")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  write(folder / "a.array_record", [record(i) for i in range(10)])
  write(folder / "b.array_record", [record(i) for i in range(10, N)])
  return sources.open_source("array_record", str(folder / "*.array_record"), "")


@pytest.fixture
def cfg(config):
  c = config.copy_and_resolve_references().unlock().data
  c.jitter_prob, c.grey_prob, c.flip = 0.5, 0.2, 0.5
  c.image_size, c.text_length, c.readout = 16, 12, "eot"
  return c


def take(source, tok, cfg, steps, *, start=0, batch=BATCH, seed=SEED, **process):
  batches = pipeline.batches(
    source, tok, cfg, batch_size=batch, seed=seed, start_step=start, **process
  )
  return [next(batches) for _ in range(steps)]


def rows(batches):
  """One dict of all the batches' rows."""
  return {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}


def assert_equal(found, expected):
  assert found.keys() == expected.keys()
  for k in found:
    np.testing.assert_array_equal(found[k], expected[k], err_msg=k)


# --- order


def test_shapes_and_types(source, tok, cfg):
  (batch,) = take(source, tok, cfg, 1)
  shapes = {k: (v.shape, v.dtype.name) for k, v in batch.items()}
  assert shapes == {
    "image": ((BATCH, 16, 16, 3), "uint8"),
    "text": ((BATCH, 12), "int32"),
    "mask": ((BATCH, 12), "bool"),
    "index": ((BATCH,), "int64"),
    "bad": ((BATCH,), "int64"),
    "truncated": ((BATCH,), "bool"),
  }


@pytest.mark.parametrize("start", [1, 2, 7])
def test_a_batch_does_not_depend_on_where_the_run_started(source, tok, cfg, start):
  whole = take(source, tok, cfg, 9)
  assert_equal(rows(take(source, tok, cfg, 9 - start, start=start)), rows(whole[start:]))


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_rows_of_one_global_batch(source, tok, cfg, processes):
  steps = 7  # 2.4 epochs
  parts = [
    take(source, tok, cfg, steps, process=p, processes=processes) for p in range(processes)
  ]
  joined = [rows(shares) for shares in zip(*parts, strict=True)]
  assert_equal(rows(joined), rows(take(source, tok, cfg, steps)))


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_do_not_change_the_batches(source, tok, cfg, workers):
  alone = rows(take(source, tok, cfg, 5, start=2))
  cfg.workers = workers
  assert_equal(rows(take(source, tok, cfg, 5, start=2)), alone)


def test_batch_must_divide_over_the_processes(source, tok, cfg):
  with pytest.raises(ValueError, match="batch_size=8 is not a multiple of the 3 processes"):
    take(source, tok, cfg, 1, processes=3)


def test_unknown_augmentation_is_refused(source, tok, cfg):
  cfg.augment = "strong"
  with pytest.raises(ValueError, match="data.augment must be one of standard, resize, got"):
    take(source, tok, cfg, 1)


def test_every_epoch_is_another_permutation(source, tok, cfg):
  index = rows(take(source, tok, cfg, 9))["index"][: 3 * N].reshape(3, N)
  for epoch in index:
    assert sorted(epoch) == list(range(N))
  assert len({tuple(epoch) for epoch in index}) == 3
  assert tuple(index[0]) != tuple(range(N))


def test_the_seed_decides_order_and_augmentation(source, tok, cfg):
  a, b = (rows(take(source, tok, cfg, 3, seed=seed)) for seed in (SEED, SEED + 1))
  assert a["index"].tolist() != b["index"].tolist()
  images = [dict(zip(x["index"].tolist(), x["image"], strict=False)) for x in (a, b)]
  differing = sum((images[0][i] != images[1][i]).any() for i in range(N))
  assert differing > N / 2


def test_augmentation_is_keyed_by_seed_epoch_and_example_alone(source, tok, cfg):
  """Whatever the batch size and the row, equal triples give equal rows and epochs differ."""

  def by_epoch(batch):
    all_rows = rows(take(source, tok, cfg, 2 * N // batch + 1, batch=batch))
    return {
      (p // N, int(all_rows["index"][p])): (all_rows["image"][p], all_rows["text"][p])
      for p in range(2 * N)
    }

  a, b = by_epoch(8), by_epoch(3)
  assert a.keys() == b.keys() and len(a) == 2 * N
  for key in a:
    np.testing.assert_array_equal(a[key][0], b[key][0])
    np.testing.assert_array_equal(a[key][1], b[key][1])
  assert all((a[0, i][0] != a[1, i][0]).any() for i in range(N))
  assert sum((a[0, i][1] != a[1, i][1]).any() for i in range(N)) > N / 4


# --- bad records


BAD = {
  4: b"\xc1 no msgpack",
  11: record(11, image=b"no image"),
  12: record(12, image=b""),
  13: {"image": png(noise((4, 4))), "text": "no caption"},
  14: record(14, caption=None),
  15: record(15, tags=[1]),
  22: [1, 2, 3],
}
STANDS_IN = {4: 5, **dict.fromkeys(range(11, 16), 16), 22: 0}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
  path = tmp_path_factory.mktemp("bad") / "x.array_record"
  return sources.ArrayRecord(write(path, [BAD.get(i, record(i)) for i in range(N)]))


def test_a_bad_record_is_replaced_by_the_next_readable_and_named(source, damaged, tok, cfg):
  good, found = rows(take(source, tok, cfg, 6)), rows(take(damaged, tok, cfg, 6))
  is_bad = np.isin(good["index"], list(BAD))
  assert is_bad.sum() >= len(BAD)
  expected = [STANDS_IN.get(i, i) for i in good["index"].tolist()]
  assert found["index"].tolist() == expected
  assert found["bad"].tolist() == np.where(is_bad, good["index"], -1).tolist()
  for k in ("image", "text", "mask"):
    np.testing.assert_array_equal(found[k][~is_bad], good[k][~is_bad])


@pytest.mark.parametrize("index", BAD)
def test_a_bad_record_is_damaged_not_a_crash(damaged, index):
  with pytest.raises(DamagedRecord):
    transforms.decode(damaged[index]["image"])


def test_evaluation_leaves_bad_records_out_and_says_which(damaged):
  records, images, left_out = pipeline.evaluation_rows(damaged, image_size=16, resize_ratio=1.0)
  assert left_out == list(BAD)
  assert [r["caption"] for r in records] == [f"number {i}" for i in range(N) if i not in BAD]
  assert all("image" not in r for r in records)
  assert images.shape == (N - len(BAD), 16, 16, 3)
  np.testing.assert_array_equal(images[0], transforms.centre_crop(noise((20, 24), 0), 16, 1.0))


def test_only_bad_records_is_an_error(tmp_path, tok, cfg):
  source = sources.ArrayRecord(write(tmp_path / "x", [b"no record"] * 3))
  with pytest.raises(ValueError, match="3 records in a row from . cannot be used .*data.path"):
    take(source, tok, cfg, 1)
  with pytest.raises(ValueError, match="none of the 3 records"):
    pipeline.evaluation_rows(source, image_size=16, resize_ratio=1.0)


# --- sources


def test_a_pattern_without_files_names_the_key():
  with pytest.raises(FileNotFoundError, match="data.path='/nowhere/.*' matches no file"):
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


def test_files_are_joined_in_the_order_of_their_names(source):
  assert [source[i]["caption"] for i in (0, 9, 10, N - 1)] == [
    "number 0", "number 9", "number 10", f"number {N - 1}"
  ]  # fmt: skip
  assert len(source) == N


def test_identity_tells_data_sets_apart(source, damaged):
  first, second = map(sources.ArrayRecord, source.paths)
  assert len({s.identity for s in (source, first, second, damaged)}) == 4
  assert sources.ArrayRecord(source.paths[0]).identity == first.identity
  assert source.identity.startswith(f"{N} records, ")


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("tfds", "data.source must be one of emoji, array_record, got 'tfds'"),
    ("array_record", "data.path is empty"),
  ],
)
def test_open_source_says_what_is_missing(name, message):
  with pytest.raises(ValueError, match=message):
    sources.open_source(name, "", "train")


# --- captions and tokens


LONG = " ".join(["grinning face"] * 20)


@pytest.mark.parametrize("readout", ["eot", "last"])
@pytest.mark.parametrize("caption", ["", "smile", "red heart with an arrow", LONG])
def test_tokens(tok, caption, readout):
  """Own tokens, cut to what fits, then EOT to the end; "eot" reads the first EOT, "last" none."""
  L = 9
  ids, mask, truncated = tokenizer.tokenize(tok, ["x", caption], length=L, readout=readout)
  assert ids.shape == mask.shape == (2, L) and ids.dtype == np.int32 and mask.dtype == bool
  room = L - 1 if readout == "eot" else L
  tokens = tok.encode(caption)
  kept = tokens[:room]
  assert tok.eot not in tokens
  assert ids[1].tolist() == kept + [tok.eot] * (L - len(kept))
  covered = len(kept) + (readout == "eot")
  assert mask[1].tolist() == [True] * covered + [False] * (L - covered)
  assert truncated.tolist() == [False, len(tokens) > room]
  assert truncated[1] == (caption == LONG)


def test_a_caption_that_just_fits_is_not_truncated(tok):
  n = len(tok.encode("red heart with an arrow"))
  for readout, own in (("eot", 1), ("last", 0)):
    for length, cut in ((n + own, False), (n + own - 1, True)):
      found = tokenizer.tokenize(
        tok, ["red heart with an arrow"], length=length, readout=readout
      )
      assert found[2].tolist() == [cut]


def test_long_captions_are_flagged_in_the_batch(tmp_path, tok, cfg):
  captions = {i: LONG if i % 3 == 0 else "short" for i in range(8)}
  records = [record(i, caption=c, tags=[]) for i, c in captions.items()]
  (batch,) = take(sources.ArrayRecord(write(tmp_path / "x", records)), tok, cfg, 1)
  assert batch["truncated"].tolist() == [i % 3 == 0 for i in batch["index"].tolist()]


def test_unknown_readout_is_refused(tok):
  with pytest.raises(ValueError, match="text.readout must be 'eot' or 'last', got 'mean'"):
    tokenizer.tokenize(tok, ["x"], length=4, readout="mean")


def test_a_tokenizer_that_is_no_model_is_refused(tmp_path):
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(ValueError, match="no SentencePiece .model"):
    tokenizer.load(str(tmp_path / "tokenizer.json"))
  with pytest.raises(FileNotFoundError, match="text.tokenizer='' is no file"):
    tokenizer.load("")


def test_training_caption_draws_every_subset_size_and_order_alike():
  r = {"caption": "c", "tags": ["t0", "t1", "t2"]}
  rng, draws = np.random.default_rng(0), 6000
  found = collections.Counter(transforms.training_caption(r, rng, 0.5) for _ in range(draws))
  assert len(found) == 1 + 3 + 6 + 6  # alone, and the ordered subsets of one, two, three tags
  assert found["c"] / draws == pytest.approx(0.5, abs=0.03)
  for subset, count in found.items():
    if size := subset.count(","):
      share = 0.5 / 3 / {1: 3, 2: 6, 3: 6}[size]
      assert count / draws == pytest.approx(share, abs=0.012), subset


@pytest.mark.parametrize("tags", [{}, {"tags": []}, {"tags": None}])
def test_a_caption_without_tags_stands_alone(tags):
  r = {"caption": "c", **tags}
  assert transforms.training_caption(r, np.random.default_rng(0), 1.0) == "c"
  assert transforms.full_caption(r) == "c"


def test_full_caption_keeps_the_tags_in_order():
  r = {"caption": "c", "tags": ["b", "a"]}
  assert transforms.full_caption(r) == "c, b, a"


# --- images


def test_decode_is_rgb():
  image = noise((5, 7))
  np.testing.assert_array_equal(transforms.decode(png(image)), image)


@pytest.mark.parametrize("data", [b"", b"abc", None, "text", 3])
def test_decode_refuses_what_is_no_image(data):
  with pytest.raises(DamagedRecord, match="image cannot be decoded"):
    transforms.decode(data)


SHAPES = [(1, 1), (3, 500), (500, 3), (1, 20_000), (37, 64), (64, 64), (200, 20), (15, 17)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", [1.0, 256 / 224])
def test_centre_crop_has_the_size_and_keeps_a_flat_colour(shape, ratio):
  image = np.full((*shape, 3), (10, 100, 200), np.uint8)
  cropped = transforms.centre_crop(image, 16, ratio)
  assert cropped.shape == (16, 16, 3)
  assert (cropped == (10, 100, 200)).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_centre_crop_takes_the_centre(axis):
  """Of a 1:8 ramp, the middle eighth: half of it at each side of the middle value."""
  ramp = np.repeat(np.linspace(0, 255, 256)[:, None], 32, axis=1)
  image = np.repeat(np.round(ramp)[..., None], 3, axis=2).astype(np.uint8)
  cropped = transforms.centre_crop(np.swapaxes(image, 0, axis), 16, 1.0).astype(float)
  assert cropped.mean() == pytest.approx(127.5, abs=1)
  assert np.ptp(cropped) == pytest.approx(30, abs=2)


def test_centre_crop_keeps_the_share_of_the_shorter_side():
  ramp = np.repeat(np.arange(128, dtype=np.uint8)[:, None, None], 128, axis=1).repeat(3, axis=2)
  assert np.ptp(transforms.centre_crop(ramp, 32, 1.0)) == pytest.approx(124, abs=2)
  assert np.ptp(transforms.centre_crop(ramp, 32, 2.0)) == pytest.approx(62, abs=2)


@pytest.mark.parametrize("shape", [(64, 8), (8, 64), (64, 64)])
def test_resize_does_not_alias_along_a_side_that_shrinks(shape):
  """One-pixel lines, one in four, average out, also when the other side grows."""
  shrinking = [axis for axis in (0, 1) if shape[axis] > 16]
  lines = np.indices(shape)[shrinking].sum(axis=0) % 4 == 1
  image = np.repeat(255 * lines[..., None], 3, axis=2).astype(np.uint8)
  resized = transforms.resize(image, 16, 16)
  assert resized.shape == (16, 16, 3)
  assert np.abs(resized - 255 / 4).max() <= 2


@pytest.mark.parametrize("shape", SHAPES)
def test_random_resized_crop_has_the_size(shape):
  image = np.full((*shape, 3), 7, np.uint8)
  for seed in range(3):
    crop = transforms.random_resized_crop(image, 16, np.random.default_rng(seed), (0.05, 1.0))
    assert crop.shape == (16, 16, 3) and (crop == 7).all()


def boxes(monkeypatch, shape, scale, draws=300):
  """(top, left, height, width) of the boxes that random_resized_crop cuts."""
  coordinates = np.stack([*np.indices(shape), np.zeros(shape)], axis=-1)
  found = []

  def spy(image, height, width):
    found.append((*image[0, 0, :2], *image.shape[:2]))

  monkeypatch.setattr(transforms, "resize", spy)
  rng = np.random.default_rng(0)
  for _ in range(draws):
    transforms.random_resized_crop(coordinates, 16, rng, scale)
  return np.array(found)


def test_crop_boxes_cover_the_stated_areas_aspects_and_places(monkeypatch):
  top, left, h, w = boxes(monkeypatch, (120, 120), (0.2, 0.6)).T
  area, aspect = h * w / 120**2, w / h
  assert 0.19 < area.min() < 0.23 and 0.57 < area.max() < 0.61
  assert area.mean() == pytest.approx(0.4, abs=0.03)
  assert 0.73 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.36
  assert np.log(aspect).mean() == pytest.approx(0, abs=0.04)
  for start, room in ((top, 120 - h), (left, 120 - w)):
    place = start / room
    assert place.min() >= 0 and place.max() <= 1 and np.mean(place) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize(
  ("shape", "box"),
  [((90, 180), (0, 30, 90, 120)), ((180, 90), (30, 0, 120, 90)), ((1, 9), (0, 4, 1, 1))],
)
def test_an_image_that_no_box_fits_gives_its_centre_at_the_nearest_aspect(monkeypatch, shape, box):
  assert set(map(tuple, boxes(monkeypatch, shape, (0.95, 1.0), 5).tolist())) == {box}


def test_jitter_of_no_strength_is_the_identity():
  image = noise((16, 16))
  found = transforms.colour_jitter(image, np.random.default_rng(0), 0, 0, 0, 0)
  assert np.abs(found.astype(int) - image).max() <= 1


@pytest.mark.parametrize(
  ("strengths", "check"),
  [
    ((0.5, 0, 0, 0), lambda x, y: y.mean() / x.mean()),
    ((0, 0.5, 0, 0), lambda x, y: y.std() / x.std()),
    ((0, 0, 0.5, 0), lambda x, y: np.ptp(y, axis=2).mean() / np.ptp(x, axis=2).mean()),
  ],
)
def test_jitter_scales_brightness_contrast_or_saturation(strengths, check):
  """By factors from [0.5, 1.5]; the image stays within a range where nothing clips."""
  image = (100 + noise((16, 16)) / 255 * 50).astype(np.uint8)
  factors = [
    check(image.astype(float), transforms.colour_jitter(image, rng, *strengths).astype(float))
    for rng in map(np.random.default_rng, range(60))
  ]
  assert 0.45 < min(factors) < 0.6 and 1.4 < max(factors) < 1.55


def test_saturation_keeps_each_pixels_luma_and_contrast_the_mean():
  image = (100 + noise((16, 16)) / 255 * 50).astype(np.uint8)
  luma = lambda x: x.astype(float) @ (0.299, 0.587, 0.114)
  for rng in map(np.random.default_rng, range(10)):
    found = transforms.colour_jitter(image, rng, 0, 0, 0.5, 0)
    assert np.abs(luma(found) - luma(image)).max() <= 1.5
    found = transforms.colour_jitter(image, rng, 0, 0.5, 0, 0)
    assert luma(found).mean() == pytest.approx(luma(image).mean(), abs=0.5)


@pytest.mark.parametrize("turn", [-0.5, 0.5, 0.25])
def test_hue_turns_keep_saturation_and_value(turn):
  image = np.array([[[200, 40, 40], [30, 90, 160]]], np.float32) / 255
  found = transforms._shift_hue(image, turn)
  for before, after in zip(image[0], found[0], strict=True):
    h, s, v = colorsys.rgb_to_hsv(*before.tolist())
    np.testing.assert_allclose(after, colorsys.hsv_to_rgb((h + turn) % 1, s, v), atol=1e-4)


def test_greyscale_is_luma_in_equal_channels():
  image = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]], np.uint8)
  assert transforms.greyscale(image)[0].tolist() == [[v] * 3 for v in (76, 150, 29, 255)]


@pytest.mark.parametrize(
  ("key", "expected"),
  [
    ("flip", lambda image: image[:, ::-1]),
    ("grey_prob", transforms.greyscale),
    (None, lambda image: image),
  ],
)
def test_standard_applies_what_the_config_asks_for(cfg, key, expected):
  cfg.crop_scale, cfg.flip, cfg.jitter_prob, cfg.grey_prob = (1.0, 1.0), 0.0, 0.0, 0.0
  if key:
    cfg[key] = 1.0
  image = noise((16, 16))
  for seed in range(5):  # the only box of all the area is the whole image
    found = transforms.standard(image, np.random.default_rng(seed), 16, cfg)
    np.testing.assert_array_equal(found, expected(image))
    assert found.flags.c_contiguous


def test_resize_only_draws_nothing(cfg):
  rng = np.random.default_rng(0)
  before = rng.bit_generator.state
  assert transforms.AUGMENT["resize"](noise((20, 30)), rng, 16, cfg).shape == (16, 16, 3)
  assert rng.bit_generator.state == before
