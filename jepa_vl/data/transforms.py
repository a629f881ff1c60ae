"""Decoding, augmentation and evaluation crops on uint8 RGB images, and the choice of caption."""

import io
import math
from typing import NamedTuple

import cv2
import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps

cv2.setNumThreads(0)  # parallelism is the pipeline's: threads here would fight its workers
# What cannot be decoded is said by whoever asked, with its place.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

# What an image may declare, 300 MB as RGB: a file of a few kilobytes can declare any size, and
# OpenCV takes it at its word up to 2^30 pixels, in every worker. Pillow warns from 89 million on.
MAX_PIXELS = 100_000_000

# Pillow looks for each format in turn, so the frequent ones come first and the exotic ones never.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "JPEG2000", "PPM")


# Why a record cannot be used, for counts; the message of the one record says more.
REASONS = (
  "unreadable",  # its file or shard is gone, has changed, is cut short or cannot be read
  "malformed",  # no record of its format: JSON, msgpack, CSV, another library's
  "duplicate_key",
  "no_image",
  "image_undecodable",
  "image_too_large",
  "image_too_small",  # for `prepare`
  "no_caption",  # missing or empty
  "caption_encoding",  # not UTF-8, or no valid Unicode
)


class DamagedRecord(Exception):
  """One record that cannot be used; the message says which and why.

  reason: one of REASONS. resume: where a whole file is damaged, the first index after it.
  """

  def __init__(self, message, reason, resume=0):
    super().__init__(message, reason, resume)  # all of them, so that it can be pickled
    self.reason, self.resume = reason, resume

  def __str__(self):
    return self.args[0]

  def at(self, where):
    """The same with the place before the message."""
    return DamagedRecord(f"{where}: {self}", self.reason, self.resume)


def decode(data):
  """Encoded bytes -> (H, W, 3) uint8 RGB, of an animation the first frame. Raises DamagedRecord.

  The eight high bits of sixteen are kept, transparency is dropped (the colours beneath it show) and
  a JPEG is turned upright by its EXIF. A file that was cut short is refused, not half grey.
  """
  return _pixels(data, _header(data))


class _Header(NamedTuple):
  """What a file says of itself before its pixels are decoded; `kind` is "" if Pillow cannot say."""

  kind: str
  height: int
  width: int
  reducible: bool  # a JPEG that stands upright as it is


def _header(data):
  """Raises DamagedRecord if the image is too large. Pillow reads a header without its pixels."""
  try:
    image = PIL.Image.open(io.BytesIO(data), formats=_FORMATS)
  except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as e:
    raise DamagedRecord(f"image is too large to be decoded ({e})", "image_too_large") from e
  except Exception:  # each format has a family of its own
    return _Header("", 0, 0, False)
  width, height = image.size
  if width * height > MAX_PIXELS:
    raise DamagedRecord(
      f"image is too large to be decoded ({width} x {height} pixels; at most {MAX_PIXELS})",
      "image_too_large",
    )
  return _Header(image.format, height, width, image.format == "JPEG" and is_upright(image))


def is_upright(image):
  """Whether a PIL image's EXIF turns it not at all."""
  if "exif" not in image.info:
    return True
  try:
    return image.getexif().get(PIL.ExifTags.Base.Orientation, 1) == 1
  except Exception:  # damaged EXIF raises what it likes
    return False


def _pixels(data, header, divisor=1):
  """The image, of a reducible one its sides divided by 1, 2, 4 or 8 in the decoder."""
  try:
    flags = cv2.IMREAD_COLOR_RGB | _REDUCED[divisor]
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
  except (cv2.error, TypeError, ValueError) as e:
    message = f"image cannot be decoded ({type(e).__name__})"
    raise DamagedRecord(message, "image_undecodable") from e
  if image is None:
    image = _pillow(data) if header.kind in _OPTIONAL else None
  if image is None:
    what = "a damaged or truncated {0} of {2} x {1}" if header.kind else "an unknown format"
    message = f"image cannot be decoded ({len(data)} bytes of {what.format(*header)})"
    raise DamagedRecord(message, "image_undecodable")
  return image


_REDUCED = {1: 0, 2: 16, 4: 32, 8: 64}  # bits of OpenCV's IMREAD_REDUCED_*


# What OpenCV reads in part, or not in every build. Of the others its refusal counts: Pillow would
# take some that are cut short.
_OPTIONAL = ("AVIF", "TIFF", "JPEG2000", "PPM")


def _pillow(data):
  """As `decode`, by Pillow; None if it cannot either."""
  try:
    image = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data), formats=_FORMATS))
    if image.mode.startswith("I;16"):
      return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    return np.array(image.convert("RGB"))
  except Exception:  # each format has a family of its own
    return None


def resize(image, height, width):
  """Antialiased along a side that shrinks (area), bicubic along one that grows."""
  h, w = image.shape[:2]
  small = min(width, w), min(height, h)
  if small != (w, h):
    # Of fractional ratios, twice the size and then halves: as close to PyTorch's filters as
    # INTER_AREA itself and three times as fast. Beyond 2.5 the first step would leave out pixels.
    if height < h <= 2.5 * height and width < w <= 2.5 * width:
      image = cv2.resize(image, (2 * width, 2 * height), interpolation=cv2.INTER_LINEAR)
    image = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
  if small != (width, height):
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
  return image


def centre_crop(image, size, resize_ratio):
  """The evaluation crop: shorter side to size * resize_ratio, then the central size x size.

  Rounded as torchvision's Resize and CenterCrop round: a pixel of shift is a change of the images.
  """
  short, long = sorted(image.shape[:2])
  # No more than the crop can show: resizing all of a 1 x 20000 image would take gigabytes. An even
  # number goes, so that the centre stays where it is.
  limit = 2 * short + long % 2
  image = _centre(image, limit, limit)
  scaled = [max(int(round(size * resize_ratio) * n / short), size) for n in image.shape[:2]]
  top, left = (round((n - size) / 2) for n in scaled)
  return resize(image, *scaled)[top : top + size, left : left + size]


def _centre(image, height, width):
  """The central part, at most height x width."""
  h, w = image.shape[:2]
  top, left = max(h - height, 0) // 2, max(w - width, 0) // 2
  return image[top : top + height, left : left + width]


class Box(NamedTuple):
  """Part of an image, in pixels."""

  top: int
  left: int
  height: int
  width: int


def random_box(height, width, rng, scale, ratio=(3 / 4, 4 / 3)):
  """A box of random area (a share of the image in `scale`), aspect and place, as torchvision's."""
  for _ in range(10):
    area = height * width * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    h, w = round((area / aspect) ** 0.5), round((area * aspect) ** 0.5)
    if 0 < h <= height and 0 < w <= width:
      return Box(int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w)
  # As torchvision: the largest central box of an allowed aspect. Not rare: at scale (0.8, 1) no
  # box fits an image wider than 5:3.
  aspect = min(max(width / height, ratio[0]), ratio[1])
  h, w = min(height, round(width / aspect)), min(width, round(height * aspect))
  return Box((height - h) // 2, (width - w) // 2, h, w)


def crops(data, wanted):
  """Random resized crops of one encoded image.

  wanted: for each crop its generator, its side and its range of area shares. A JPEG is decoded at
  the smallest size that no crop need be enlarged from, which is where most of the time goes.

  Returns:
    list of (side, side, 3) uint8. Raises DamagedRecord.
  """
  header, image = _header(data), None
  if not header.reducible:
    image = _pixels(data, header)
  height, width = (header.height, header.width) if image is None else image.shape[:2]
  boxes = [random_box(height, width, rng, scale) for rng, _, scale in wanted]
  if image is None:
    room = min(
      min(box.height, box.width) / side for box, (_, side, _) in zip(boxes, wanted, strict=True)
    )
    image = _pixels(data, header, max(n for n in _REDUCED if n <= max(room, 1)))
  down, right = image.shape[0] / height, image.shape[1] / width
  found = []
  for box, (_, side, _) in zip(boxes, wanted, strict=True):
    rows = slice(round(box.top * down), round((box.top + box.height) * down))
    columns = slice(round(box.left * right), round((box.left + box.width) * right))
    found.append(resize(image[rows, columns], side, side))
  return found


def colour_jitter(image, rng, brightness, contrast, saturation, hue):
  """Random brightness, contrast, saturation and hue, in random order (torchvision's semantics).

  Every step rounds to uint8, as torchvision's do on PIL images.
  """
  factor = lambda s: rng.uniform(max(0.0, 1 - s), 1 + s)
  steps = [
    lambda x: adjust_brightness(x, factor(brightness)),
    lambda x: adjust_contrast(x, factor(contrast)),
    lambda x: adjust_saturation(x, factor(saturation)),
    lambda x: adjust_hue(x, rng.uniform(-hue, hue)),
  ]
  for i in rng.permutation(len(steps)):
    image = steps[i](image)
  return image


def adjust_brightness(image, factor):
  """All values times `factor`."""
  return cv2.convertScaleAbs(image, alpha=factor)


def adjust_contrast(image, factor):
  """Their distance from the mean luma times `factor`."""
  mean = cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0]
  return cv2.addWeighted(image, factor, image, 0, (1 - factor) * mean)


def adjust_saturation(image, factor):
  """Their distance from the pixel's luma times `factor`."""
  return cv2.addWeighted(image, factor, greyscale(image), 1 - factor, 0)


def adjust_hue(image, turn):
  """The hue turned by `turn` of the whole circle, in steps of 1/256."""
  steps = round(turn * 256) % 256
  if not steps:
    return image
  hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
  hsv[..., 0] += np.uint8(steps)  # which wraps, as the hue does
  return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def greyscale(image):
  """Luma in all three channels."""
  return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def blur(image, rng, sigma):
  """Gaussian blur of 23 x 23 pixels, as DINO's; the standard deviation is uniform in `sigma`."""
  sd = rng.uniform(*sigma)
  return cv2.GaussianBlur(image, (23, 23), sd, sigmaY=sd, borderType=cv2.BORDER_REFLECT_101)


def solarise(image, threshold=128):
  """Inverts the values from `threshold` on."""
  return np.where(image < threshold, image, 255 - image)


# What keys a random stream beside (seed, epoch, example): a view's does not depend on how many
# others there are, nor on what they draw.
CAPTION, GLOBAL, LOCAL = range(3)


def resize_only(data, streams, size, cfg):
  """No randomness: the whole image, resized to size x size (release 1)."""
  return {"image": resize(decode(data), size, size)}


def standard(data, streams, size, cfg):
  """RandomResizedCrop, flip, colour jitter and greyscale of the config's strengths (release 2)."""
  rng = streams(GLOBAL, 0)
  (crop,) = crops(data, [(rng, size, cfg.crop_scale)])
  return {"image": _colour(crop, rng, cfg)}


def _colour(image, rng, cfg):
  if rng.random() < cfg.flip:
    image = cv2.flip(image, 1)
  if rng.random() < cfg.jitter_prob:
    image = colour_jitter(image, rng, *cfg.jitter)
  if rng.random() < cfg.grey_prob:
    image = greyscale(image)
  return image


def dino(data, streams, size, cfg):
  """DINO's asymmetric multi-crop (Caron et al., arXiv 2104.14294), as LeVLJEPA+ uses it.

  `global` (Vg, S, S, 3) and, if there are any, `local` (Vl, S', S', 3): crop, flip, jitter and
  greyscale as `standard`, then blur and solarisation, whose probabilities differ by view.
  """
  wanted = [(streams(GLOBAL, v), size, cfg.crop_scale) for v in range(cfg.global_views)]
  wanted += [(streams(LOCAL, v), cfg.local_size, cfg.local_scale) for v in range(cfg.local_views)]
  views = []
  for i, (image, (rng, _, _)) in enumerate(zip(crops(data, wanted), wanted, strict=True)):
    kind = min(i, 1) if i < cfg.global_views else 2
    image = _colour(image, rng, cfg)
    if rng.random() < cfg.blur_prob[kind]:
      image = blur(image, rng, (0.1, 2.0))
    views.append(solarise(image) if rng.random() < cfg.solarise_prob[kind] else image)
  first, local = views[: cfg.global_views], views[cfg.global_views :]
  return {"global": np.stack(first)} | ({"local": np.stack(local)} if local else {})


# name: function (encoded bytes, streams, size, cfg) -> the images' part of a row, where
# streams(kind, view) is the generator of one view. Raises DamagedRecord.
AUGMENT = {"standard": standard, "resize": resize_only, "dino": dino}


def view_sides(cfg, size):
  """The side of every view that `cfg.augment` makes of an image; () for a single image."""
  if cfg.augment != "dino":
    return ()
  return (size,) * cfg.global_views + (cfg.local_size,) * cfg.local_views


def image_side(cfg, size, step):
  """The side of a single training image in that step: `cfg.low_res`'s in the first, then `size`."""
  side, steps = cfg.low_res or (size, 0)
  return side if step < steps else size


def training_caption(record, rng, tag_prob):
  """The caption or, with probability `tag_prob`, the caption and a random subset of the tags.

  They stand in random order, the caption among the tags: no two epochs show one image with quite
  the same words, and what is learned of the tags does not hang on a caption known by heart.
  """
  tags = record.get("tags") or []
  if not tags or rng.random() >= tag_prob:
    return record["caption"]
  chosen = rng.permutation(len(tags))[: rng.integers(1, len(tags) + 1)]
  parts = [record["caption"], *(tags[i] for i in chosen)]
  return ", ".join(parts[i] for i in rng.permutation(len(parts)))


def full_caption(record):
  """The caption and all its tags in their own order: what evaluations use."""
  return ", ".join([record["caption"], *(record.get("tags") or [])])
