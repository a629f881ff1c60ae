"""Decoding, crops and colours have torchvision's semantics; captions draw their tags evenly."""

import collections
import colorsys
import io
import zlib

import cv2
import numpy as np
import PIL.Image
import pytest
from records import noise, png

from jepa_vl.data import transforms
from jepa_vl.data.transforms import DamagedRecord

# --- captions


def test_training_caption_draws_every_subset_size_and_order_alike():
  r = {"caption": "c", "tags": ["t0", "t1", "t2"]}
  rng, draws = np.random.default_rng(0), 6000
  found = collections.Counter(transforms.training_caption(r, rng, 0.5) for _ in range(draws))
  assert len(found) == 1 + 6 + 18 + 24  # alone, and with one, two, three tags in any order
  assert found["c"] / draws == pytest.approx(0.5, abs=0.03)
  for subset, count in found.items():
    if size := subset.count(","):
      share = 0.5 / 3 / {1: 6, 2: 18, 3: 24}[size]
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


# --- decoding, file by file

IMAGE = cv2.resize(noise((6, 8)), (64, 48), interpolation=cv2.INTER_CUBIC)  # smooth, for lossy ones
RAMP = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))
JPEG = {"format": "JPEG", "quality": 95, "subsampling": 0}
LOSSLESS_WEBP = {"format": "WEBP", "lossless": True}


def encoded(image, **options):
  """The bytes that Pillow writes of an image or array; `format` and its options."""
  image = image if isinstance(image, PIL.Image.Image) else PIL.Image.fromarray(image)
  file = io.BytesIO()
  image.save(file, **options)
  return file.getvalue()


def as_pillow(image):
  """What is in the file, by another decoder."""
  return np.asarray(image.convert("RGB") if isinstance(image, PIL.Image.Image) else image)


GREY = PIL.Image.fromarray(IMAGE).convert("L")
PALETTE = PIL.Image.fromarray(IMAGE).quantize(32)


@pytest.mark.parametrize(
  ("image", "options"),
  [
    (PALETTE, {"format": "PNG"}),
    (PALETTE, {"format": "PNG", "transparency": 3}),
    (GREY, {"format": "PNG"}),
    (GREY.convert("1"), {"format": "PNG"}),
    (PIL.Image.merge("LA", (GREY, PIL.Image.fromarray(RAMP))), {"format": "PNG"}),
    (PIL.Image.fromarray(np.dstack([IMAGE, RAMP])), {"format": "PNG"}),
    (PIL.Image.fromarray(np.dstack([IMAGE, RAMP])), {**LOSSLESS_WEBP, "exact": True}),
    (GREY, JPEG),
    (IMAGE, JPEG),
    (IMAGE, {**JPEG, "progressive": True}),
    (PIL.Image.fromarray(IMAGE).convert("CMYK"), JPEG),
    (IMAGE[:1, :1], {"format": "PNG"}),
    (IMAGE[:1, :1], JPEG),
  ],
)
def test_decode_gives_the_colours_of_any_kind_of_file(image, options):
  """Palette, grey, two or four channels (what is beneath transparency), CMYK, one pixel."""
  found = transforms.decode(encoded(image, **options))
  expected = as_pillow(image)
  assert found.dtype == np.uint8 and found.shape == expected.shape
  tolerance = 12 if options["format"] == "JPEG" else 0
  assert np.abs(found.astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize("channels", [1, 3])
def test_decode_keeps_the_high_bits_of_sixteen(channels):
  deep = IMAGE[..., :channels].astype(np.uint16) * 256 + 200
  found = transforms.decode(cv2.imencode(".png", deep[..., ::-1])[1].tobytes())
  np.testing.assert_array_equal(found, np.broadcast_to(IMAGE[..., :channels], IMAGE.shape))


@pytest.mark.parametrize("options", [{"format": "GIF"}, {"format": "PNG"}, LOSSLESS_WEBP])
def test_decode_takes_the_first_frame_of_an_animation(options):
  first, second = PALETTE.convert("RGB"), PIL.Image.fromarray(255 - IMAGE)
  data = encoded(first, save_all=True, append_images=[second], duration=100, **options)
  np.testing.assert_array_equal(transforms.decode(data), np.asarray(first))


def test_decode_turns_a_jpeg_upright():
  exif = PIL.Image.Exif()
  exif[0x0112] = 6  # to be turned a quarter clockwise
  upright = transforms.decode(encoded(IMAGE, exif=exif, **JPEG))
  np.testing.assert_array_equal(upright, np.rot90(transforms.decode(encoded(IMAGE, **JPEG)), -1))


@pytest.mark.parametrize("left", [0.1, 0.5, 0.9, -2])
@pytest.mark.parametrize(
  "options",
  [JPEG, {**JPEG, "progressive": True}, {"format": "PNG"}, {"format": "GIF"}, LOSSLESS_WEBP],
)
def test_decode_refuses_a_file_that_was_cut_short(options, left):
  """Some decoders give such a JPEG half grey, without a word. -2: all but its last marker."""
  data = encoded(IMAGE, **options)
  transforms.decode(data)
  data = data[: left if left < 0 else int(left * len(data))]
  kind = f"{options['format']} of 64 x 48|unknown format"  # 0.1 may end within the header
  with pytest.raises(DamagedRecord, match=rf"cannot be decoded \({len(data)} bytes of .*({kind})"):
    transforms.decode(data)


def declares(kind, side):
  """An image of 64 x 48 whose header says side x side."""
  data = bytearray(encoded(IMAGE, format=kind))
  place, order, size = {
    "PNG": (16, "big", 4),
    "GIF": (6, "little", 2),
    "JPEG": (data.find(b"\xff\xc0") + 5, "big", 2),
    "BMP": (18, "little", 4),
  }[kind]
  data[place : place + 2 * size] = 2 * side.to_bytes(size, order)
  if kind == "PNG":
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
  return bytes(data)


@pytest.mark.parametrize("side", [10_001, 12_000, 60_000])
@pytest.mark.parametrize("kind", ["PNG", "GIF", "JPEG", "BMP"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decode_refuses_a_huge_size_before_any_memory_is_taken(monkeypatch, kind, side):
  """OpenCV, that would take 3 bytes a pixel, does not see it."""
  monkeypatch.setattr(cv2, "imdecode", None)
  with pytest.raises(DamagedRecord, match="image is too large to be decoded"):
    transforms.decode(declares(kind, side))


def test_decode_takes_just_as_many_pixels_as_it_says(monkeypatch):
  monkeypatch.setattr(transforms, "MAX_PIXELS", 48 * 64)
  assert transforms.decode(png(IMAGE)).shape == (48, 64, 3)
  with pytest.raises(DamagedRecord, match="65 x 48 pixels; at most 3072"):
    transforms.decode(png(noise((48, 65))))


# --- crops


def one_stream(seed):
  """Streams of which all are one."""
  rng = np.random.default_rng(seed)
  return lambda *view: rng


def streams(*key):
  return np.random.default_rng(key)


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


def test_centre_crop_rounds_as_torchvision():
  """The longer side down, the box's corner to the nearest pixel, halves to the even one."""
  columns = lambda n: np.repeat(np.arange(n, dtype=np.uint8)[None, :, None], 8, 0).repeat(3, 2)
  first = lambda n: int(transforms.centre_crop(columns(n), 8, 1.0)[0, 0, 0])
  assert [first(n) for n in (8, 9, 10, 11, 12, 13, 15)] == [0, 0, 1, 2, 2, 2, 4]
  assert [first(n) for n in (17, 18, 20, 21, 40)] == [4, 5, 6, 6, 16]  # only the middle resized


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
    wanted = [(np.random.default_rng(seed), 16, (0.05, 1.0))]
    (crop,) = transforms.crops(png(image), wanted)
    assert crop.shape == (16, 16, 3) and (crop == 7).all()


def boxes(shape, scale, draws=300):
  """(top, left, height, width) of random boxes."""
  rng = np.random.default_rng(0)
  return np.array([transforms.random_box(*shape, rng, scale) for _ in range(draws)])


def test_crop_boxes_cover_the_stated_areas_aspects_and_places():
  top, left, h, w = boxes((120, 120), (0.2, 0.6)).T
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
def test_an_image_that_no_box_fits_gives_its_centre_at_the_nearest_aspect(shape, box):
  assert set(map(tuple, boxes(shape, (0.95, 1.0), 5).tolist())) == {box}


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
  image = np.array([[[200, 40, 40], [30, 90, 160]]], np.uint8)
  found = transforms.adjust_hue(image, turn)
  for before, after in zip(image[0] / 255, found[0] / 255, strict=True):
    h, s, v = colorsys.rgb_to_hsv(*before.tolist())
    np.testing.assert_allclose(after, colorsys.hsv_to_rgb((h + turn) % 1, s, v), atol=3 / 255)


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
    found = transforms.standard(png(image), one_stream(seed), 16, cfg)["image"]
    np.testing.assert_array_equal(found, expected(image))
    assert found.flags.c_contiguous


def test_resize_only_draws_nothing(cfg):
  found = transforms.AUGMENT["resize"](png(noise((20, 30))), None, 16, cfg)["image"]
  np.testing.assert_array_equal(found, transforms.resize(noise((20, 30)), 16, 16))


JITTER = {"jitter_prob": 1.0, "jitter": (0.4, 0.4, 0.2, 0.1), "grey_prob": 0.2, "flip": 0.5}
VIEWS = {"global_views": 3, "local_views": 2, "local_size": 8}


def test_a_view_does_not_depend_on_the_others(cfg):
  """Neither on how many there are, nor on what they draw."""
  cfg.update({**JITTER, **VIEWS, "solarise_prob": (0.5, 0.5, 0.5)})
  all_views = transforms.dino(png(IMAGE), streams, 16, cfg)
  cfg.update({"global_views": 1, "local_views": 1})
  fewer = transforms.dino(png(IMAGE), streams, 16, cfg)
  np.testing.assert_array_equal(all_views["global"][:1], fewer["global"])
  np.testing.assert_array_equal(all_views["local"][:1], fewer["local"])
  assert (all_views["global"][1] != all_views["global"][0]).any()


# --- reduced decoding

PHOTO = cv2.resize(noise((24, 32)), (640, 480), interpolation=cv2.INTER_CUBIC)


def spy_on_decoding(monkeypatch):
  found, decode = [], cv2.imdecode

  def imdecode(*arguments):
    image = decode(*arguments)
    found.append(image.shape[:2])
    return image

  monkeypatch.setattr(cv2, "imdecode", imdecode)
  return found


@pytest.mark.parametrize(
  ("side", "divisor"), [(241, 1), (240, 2), (121, 2), (120, 4), (61, 4), (60, 8), (30, 8)]
)
def test_a_jpeg_is_decoded_at_the_smallest_size_that_the_crop_fills(monkeypatch, side, divisor):
  sizes = spy_on_decoding(monkeypatch)
  wanted = lambda: [(np.random.default_rng(0), side, (1.0, 1.0))]
  # the whole image is the only box; an aspect beyond 4:3 would give none
  (crop,) = transforms.crops(encoded(PHOTO, **JPEG), wanted())
  assert sizes == [(480 // divisor, 640 // divisor)]
  (exact,) = transforms.crops(png(transforms.decode(encoded(PHOTO, **JPEG))), wanted())
  assert sizes[1:] == [(480, 640)] * 2
  assert crop.shape == (side, side, 3)
  assert np.abs(crop.astype(int) - exact).mean() < 3


def test_the_largest_view_decides_and_boxes_do_not_depend_on_the_reduction(monkeypatch):
  sizes = spy_on_decoding(monkeypatch)
  wanted = lambda: [(streams(v), side, (0.3, 1.0)) for v, side in enumerate((100, 16, 40, 30))]
  data = encoded(PHOTO[:479, :637], **JPEG)  # sides that 2 does not divide
  reduced = transforms.crops(data, wanted())
  exact = transforms.crops(png(transforms.decode(data)), wanted())
  assert sizes[0] == (240, 319)
  for a, b in zip(reduced, exact, strict=True):
    assert np.abs(a.astype(int) - b).mean() < 3


def test_a_turned_jpeg_is_cropped_upright():
  exif = PIL.Image.Exif()
  exif[0x0112] = 6
  wanted = lambda: [(np.random.default_rng(3), 32, (0.2, 0.5))]
  turned = transforms.crops(encoded(PHOTO, exif=exif, **JPEG), wanted())
  upright = transforms.crops(png(np.rot90(PHOTO, -1).copy()), wanted())
  assert np.abs(turned[0].astype(int) - upright[0]).mean() < 2
  exif[0x0112] = 1
  assert transforms._header(encoded(PHOTO, exif=exif, **JPEG)).reducible


@pytest.mark.parametrize("divisor", [2, 4, 8])
@pytest.mark.parametrize("left", [0.1, 0.5, 0.9, -2])
@pytest.mark.parametrize("options", [JPEG, {**JPEG, "progressive": True}])
def test_reduced_decoding_refuses_a_file_that_was_cut_short(options, left, divisor):
  data = encoded(IMAGE, **options)
  header = transforms._header(data)
  assert transforms._pixels(data, header, divisor).shape == (48 // divisor, 64 // divisor, 3)
  with pytest.raises(DamagedRecord, match="cannot be decoded"):
    transforms._pixels(data[: left if left < 0 else int(left * len(data))], header, divisor)


@pytest.mark.parametrize(
  "options",
  [JPEG, {**JPEG, "progressive": True}, {"format": "JPEG"}, {"format": "PNG"}, LOSSLESS_WEBP,
   {"format": "GIF"}, {"format": "BMP"}, {"format": "TIFF"}, {"format": "PPM"}, {"format": "AVIF"},
   {"format": "JPEG2000"}],
)  # fmt: skip
@pytest.mark.parametrize("kind", [IMAGE, GREY, PALETTE], ids=["colour", "grey", "palette"])
def test_pillow_gives_what_opencv_gives(options, kind):
  try:
    data = encoded(kind, **options)
  except OSError:  # there is no such file
    pytest.skip("no such file")
  opencv = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
  assert opencv is not None
  assert np.abs(transforms._pillow(data).astype(int) - opencv).max() <= 1


def test_pillow_turns_images_upright_and_keeps_the_high_bits():
  exif = PIL.Image.Exif()
  exif[0x0112] = 6
  data = encoded(IMAGE, exif=exif, **JPEG)
  np.testing.assert_array_equal(transforms._pillow(data), transforms.decode(data))
  deep = cv2.imencode(".png", IMAGE[..., 0].astype(np.uint16) * 256 + 200)[1].tobytes()
  np.testing.assert_array_equal(transforms._pillow(deep), transforms.decode(deep))


def test_pillow_stands_in_only_where_opencv_may_lack_the_format(monkeypatch):
  monkeypatch.setattr(cv2, "imdecode", lambda *_: None)
  lossless = encoded(IMAGE, format="TIFF")
  np.testing.assert_array_equal(transforms.decode(lossless), IMAGE)
  with pytest.raises(DamagedRecord, match="of a damaged or truncated TIFF of 64 x 48"):
    transforms.decode(lossless[:2000])
  with pytest.raises(DamagedRecord, match="of a damaged or truncated PNG of 64 x 48"):
    transforms.decode(png(IMAGE))
