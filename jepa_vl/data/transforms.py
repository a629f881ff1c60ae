"""Decoding, augmentation and evaluation crops on uint8 RGB images, and the choice of caption."""

import io

import cv2
import numpy as np
import PIL.Image

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
  kind = _header(data)
  try:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
  except (cv2.error, TypeError, ValueError) as e:
    raise DamagedRecord(f"image cannot be decoded ({type(e).__name__})", "image_undecodable") from e
  if image is None:
    message = f"image cannot be decoded ({len(data)} bytes of {kind})"
    raise DamagedRecord(message, "image_undecodable")
  return image


def _header(data):
  """The format that the first bytes declare, in words. Raises DamagedRecord if it is too large.

  Pillow reads a header without its pixels. What it cannot read is left to OpenCV.
  """
  try:
    image = PIL.Image.open(io.BytesIO(data), formats=_FORMATS)
  except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as e:
    raise DamagedRecord(f"image is too large to be decoded ({e})", "image_too_large") from e
  except Exception:  # each format has a family of its own
    return "an unknown format"
  width, height = image.size
  if width * height > MAX_PIXELS:
    raise DamagedRecord(
      f"image is too large to be decoded ({width} x {height} pixels; at most {MAX_PIXELS})",
      "image_too_large",
    )
  return f"a damaged or truncated {image.format} of {width} x {height}"


def resize(image, height, width):
  """Antialiased along a side that shrinks (area), bicubic along one that grows."""
  h, w = image.shape[:2]
  small = min(width, w), min(height, h)
  if small != (w, h):
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


def random_resized_crop(image, size, rng, scale, ratio=(3 / 4, 4 / 3)):
  """A box of random area (a share of the image in `scale`) and aspect, resized to size x size."""
  h, w = image.shape[:2]
  for _ in range(10):
    area = h * w * rng.uniform(*scale)
    aspect = np.exp(rng.uniform(*np.log(ratio)))
    bh, bw = round((area / aspect) ** 0.5), round((area * aspect) ** 0.5)
    if 0 < bh <= h and 0 < bw <= w:
      top, left = rng.integers(h - bh + 1), rng.integers(w - bw + 1)
      return resize(image[top : top + bh, left : left + bw], size, size)
  # As torchvision: the largest central box of an allowed aspect. Not rare: at scale (0.8, 1) no
  # box fits an image wider than 5:3.
  aspect = np.clip(w / h, *ratio)
  return resize(_centre(image, round(w / aspect), round(h * aspect)), size, size)


def colour_jitter(image, rng, brightness, contrast, saturation, hue):
  """Random brightness, contrast, saturation and hue, in random order (torchvision's semantics)."""
  image = image.astype(np.float32) / 255.0
  factor = lambda s: rng.uniform(max(0.0, 1 - s), 1 + s)
  steps = [
    lambda x: x * factor(brightness),
    lambda x: _blend(x, _grey(x).mean(), factor(contrast)),
    lambda x: _blend(x, _grey(x), factor(saturation)),
    lambda x: _shift_hue(x, rng.uniform(-hue, hue)),
  ]
  for i in rng.permutation(len(steps)):
    image = np.clip(steps[i](image), 0.0, 1.0)
  return np.round(image * 255.0).astype(np.uint8)


def greyscale(image):
  """Luma in all three channels."""
  grey = _grey(image.astype(np.float32))
  return np.repeat(np.round(grey), 3, axis=2).astype(np.uint8)


def _grey(x):
  return x @ np.array([[0.299], [0.587], [0.114]], np.float32)  # (H, W, 1)


def _blend(x, other, factor):
  return factor * x + (1 - factor) * other


def _shift_hue(x, turn):
  hsv = cv2.cvtColor(x.astype(np.float32), cv2.COLOR_RGB2HSV)
  hsv[..., 0] = (hsv[..., 0] + 360.0 * turn) % 360.0
  return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def blur(image, rng, sigma):
  """Gaussian blur of 23 x 23 pixels, as DINO's; the standard deviation is uniform in `sigma`."""
  sd = rng.uniform(*sigma)
  return cv2.GaussianBlur(image, (23, 23), sd, sigmaY=sd, borderType=cv2.BORDER_REFLECT_101)


def solarise(image, threshold=128):
  """Inverts the values from `threshold` on."""
  return np.where(image < threshold, image, 255 - image)


def resize_only(image, rng, size, cfg):
  """No randomness: the whole image, resized to size x size (release 1)."""
  return {"image": resize(image, size, size)}


def standard(image, rng, size, cfg):
  """RandomResizedCrop, flip, colour jitter and greyscale of the config's strengths (release 2)."""
  return {"image": np.ascontiguousarray(_crop_and_colour(image, rng, size, cfg.crop_scale, cfg))}


def _crop_and_colour(image, rng, size, scale, cfg):
  image = random_resized_crop(image, size, rng, tuple(scale))
  if rng.random() < cfg.flip:
    image = image[:, ::-1]
  if rng.random() < cfg.jitter_prob:
    image = colour_jitter(image, rng, *cfg.jitter)
  if rng.random() < cfg.grey_prob:
    image = greyscale(image)
  return image


def dino(image, rng, size, cfg):
  """DINO's asymmetric multi-crop (Caron et al., arXiv 2104.14294), as LeVLJEPA+ uses it.

  `global` (Vg, S, S, 3) and, if there are any, `local` (Vl, S', S', 3): crop, flip, jitter and
  greyscale as `standard`, then blur and solarisation, whose probabilities differ by view.
  """

  def view(size, scale, kind):
    x = np.ascontiguousarray(_crop_and_colour(image, rng, size, scale, cfg))
    if rng.random() < cfg.blur_prob[kind]:
      x = blur(x, rng, (0.1, 2.0))
    return solarise(x) if rng.random() < cfg.solarise_prob[kind] else x

  views = [view(size, cfg.crop_scale, min(i, 1)) for i in range(cfg.global_views)]
  local = [view(cfg.local_size, cfg.local_scale, 2) for _ in range(cfg.local_views)]
  return {"global": np.stack(views)} | ({"local": np.stack(local)} if local else {})


# name: function (image, rng, size, cfg) -> the images' part of a row
AUGMENT = {"standard": standard, "resize": resize_only, "dino": dino}


def view_sides(cfg, size):
  """The side of every view that `cfg.augment` makes of an image; () for a single image."""
  if cfg.augment != "dino":
    return ()
  return (size,) * cfg.global_views + (cfg.local_size,) * cfg.local_views


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
