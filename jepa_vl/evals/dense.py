"""What evaluations of dense prediction share: images with maps, patch features, the linear head.

The head is one linear layer on standardised patch tokens; its output is upsampled bilinearly to the
map (DINOv2's linear protocol, arXiv 2304.07193, with plain standardisation for its BatchNorm).
"""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from jepa_vl.data import maps, transforms
from jepa_vl.evals import fit as fitting

MODES = ("resize", "slide")
KEEP_BYTES = 2 << 30  # of a split's images that are kept
_AT_ONCE = 64  # images that are read and encoded in one go
_CHANNELS = 64  # that OpenCV takes at once; it has a limit
_SHOWN = 6  # pictures in the report


class Dense:
  """A split's images and maps, and the patch tokens of its images.

  size: pixels. mode "resize": the image becomes a square of that side; "slide": its shorter side
  does, and windows of that side, `stride` pixels apart, cover it; features are those of windows.
  0 is the model's size, and a stride of 0 has windows that touch.
  """

  def __init__(self, encode, where, field, *, size, mode, stride):
    _check(mode)
    self._encode, self._field = encode, field
    self.size, self._mode = size or encode.image_size, mode
    self._stride = stride or self.size
    self.source = encode.source(*where)
    self.name = where[-1]
    self._parts = {}
    self._bytes = 0

  def __len__(self):
    return len(self.source)

  def read(self, rows):
    """(rows that can be read, list of images, list of maps)."""
    key = tuple(rows)
    if key not in self._parts:
      part = maps.read(self.source, rows, self._field)
      size = sum(x.nbytes for some in part[1:] for x in some)
      if self._bytes + size > KEEP_BYTES:
        return part
      self._bytes += size
      self._parts[key] = part
    return self._parts[key]

  def stretches(self, what):
    """Ranges of rows, all in order, with a progress bar."""
    starts = range(0, len(self), _AT_ONCE)
    silent = True if jax.process_index() or len(starts) < 8 else None
    for start in tqdm.tqdm(starts, f"{what} {self.name}", disable=silent, leave=False):
      yield range(start, min(start + _AT_ONCE, len(self)))

  def patch_size(self, features):
    """Pixels along a patch whose token `features` gives."""
    return self.size // features(np.zeros((1, self.size, self.size, 3), np.uint8)).shape[1]

  def squares(self, images):
    """Images as training sees them: (n, size, size, 3) uint8."""
    return np.stack([transforms.resize(x, self.size, self.size) for x in images])

  def outputs(self, images, head):
    """head(windows (n, S, S, 3)) -> (n, h, w, C) upsampled to each image's working size.

    Yields (H, W, C) float32 per image; overlapping windows are averaged.
    """
    if not images:  # a stretch of which none can be read
      return
    if self._mode == "resize":
      for out in head(self.squares(images)):
        yield _upsample(out, (self.size, self.size))
      return
    for image in images:
      image = shorter_side(image, self.size)
      boxes = windows(image.shape[:2], self.size, self._stride)
      parts = head(np.stack([image[y : y + self.size, x : x + self.size] for y, x in boxes]))
      total = np.zeros((*image.shape[:2], parts.shape[-1]), np.float32)
      count = np.zeros((*image.shape[:2], 1), np.float32)
      for (y, x), part in zip(boxes, parts, strict=True):
        total[y : y + self.size, x : x + self.size] += _upsample(part, (self.size, self.size))
        count[y : y + self.size, x : x + self.size] += 1
      yield total / count


def check(encode, keys):
  """Raises ValueError for a mode that `Dense` does not know."""
  _check(keys.mode)


def _check(mode):
  if mode not in MODES:
    raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")


def shorter_side(image, size):
  """The image with its shorter side of `size` pixels."""
  ratio = size / min(image.shape[:2])
  height, width = (max(round(n * ratio), size) for n in image.shape[:2])
  return transforms.resize(image, height, width)


def windows(shape, size, stride):
  """Top left corners (y, x) of windows that cover (H, W), the last ones flush with the borders."""
  along = lambda n: sorted({*range(0, n - size, stride), n - size})
  return [(y, x) for y in along(shape[0]) for x in along(shape[1])]


def _upsample(x, shape):
  """(h, w, C) -> (H, W, C), bilinear, as PyTorch's interpolate without align_corners."""
  out = np.empty((*shape, x.shape[-1]), np.float32)
  for c in range(0, x.shape[-1], _CHANNELS):
    some = np.ascontiguousarray(x[..., c : c + _CHANNELS], np.float32)
    grown = cv2.resize(some, shape[::-1], interpolation=cv2.INTER_LINEAR)
    out[..., c : c + _CHANNELS] = grown.reshape(*shape, -1)
  return out


def to_map(out, shape):
  """(H, W, C) of an image's working size -> of its map's, bilinear."""
  return out if out.shape[:2] == tuple(shape) else _upsample(out, shape)


def targets(found, side):
  """Maps of any size -> (n, side, side), each pixel the nearest one's."""
  return np.stack([
    cv2.resize(m, (side, side), interpolation=cv2.INTER_NEAREST_EXACT) for m in found
  ])  # fmt: skip


def pixels(size, tokens=8):
  """The raw-pixel floor's features: squares (n, S, S, 3) -> (n, S / p, S / p, 3 q q).

  Patches of `size` pixels, each shrunk to a side of at most `tokens` pixels.
  """
  q = min(size, tokens)

  def features(images):
    n, S = images.shape[:2]
    grid = S // size
    small = np.stack([transforms.resize(x, grid * q, grid * q) for x in images])
    parts = small.reshape(n, grid, q, grid, q, 3).transpose(0, 1, 3, 2, 4, 5)
    return parts.reshape(n, grid, grid, -1).astype(np.float32)

  return features


class Head:
  """standardise, then one linear layer: (n, h, w, W) -> (n, h, w, C)."""

  def __init__(self, mean, std, weights):
    self._mean, self._std, self._weights = mean, std, weights  # (W,), (W,), (W + 1, C)

  def __call__(self, features):
    w = self._weights[:-1] / self._std[:, None]
    return features @ w + (self._weights[-1] - self._mean @ w)


def fit(train, features, goal, loss, start, how, side, keep, mesh):
  """The head with the best held-out loss among those of the learning rates.

  Args:
    train: Dense; features: squares (n, S, S, 3) uint8 -> (n, h, w, W); goal: maps -> what `loss`
      compares with, of `side` pixels; loss: (outputs (n, s, s, C), goals) -> (sum, count).
    start: goals -> (C,), the outputs that the heads begin with; how: fitting.Fit; keep: GiB of
      features that are held in memory, of more the rest is made again in every epoch.

  Returns:
    Head, and the learning rate that was chosen.
  """
  bank, y, (mean, std) = _gather(train, features, lambda found: goal(targets(found, side)), keep)
  rows, chooses = fitting.part(len(y))
  first = start(y[rows])

  def mean_loss(weights, images, goals):
    # As of standardised features, which then need not be made.
    w = weights[:-1] / std[:, None]
    out = jnp.einsum("nhwf,fc->nhwc", images.astype(jnp.float32), w) + (weights[-1] - mean @ w)
    total, count = loss(_grow(out, side), goals)
    return total / jnp.maximum(count, 1)

  weights = np.concatenate([np.zeros((len(mean), len(first)), np.float32), np.float32([first])])
  take = lambda places: (bank[places], y[places])
  weights = fitting.adamw(mean_loss, weights, take, rows, how, mesh, f"fitting on {train.name}")
  heads = [Head(mean, std, w) for w in weights]
  score = _scores(bank, y, chooses, heads, loss, side)
  best = int(np.argmin(np.where(np.isnan(score), np.inf, score)))
  return heads[best], how.lrs[best]


def _gather(train, features, goal, keep):
  """Bank of the images' features, their goals, and moments of those that are not held out."""
  of_rows = lambda rows: features(train.squares(train.read(rows)[1]))
  bank, ys, moments = fitting.Bank(of_rows, keep), [], fitting.Moments()
  for rows in train.stretches("features of"):
    rows, images, found = train.read(rows)
    if images:
      x = features(train.squares(images))
      places = np.arange(len(bank), len(bank) + len(rows))
      moments.add(x[~fitting.held_out(places)])
      bank.add(rows, x)
      ys.append(goal(found))
  if not ys:
    raise ValueError(f"split {train.name!r}: no image and map can be read")
  return bank, np.concatenate(ys), moments.read()


def _grow(out, side):
  """(n, h, w, C) -> (n, side, side, C), bilinear."""
  return jax.image.resize(out, (out.shape[0], side, side, out.shape[-1]), "linear", antialias=False)


def _scores(bank, y, rows, heads, loss, side):
  """Mean loss of every head over the rows."""
  sums = np.zeros((len(heads), 2))
  for some in np.split(rows, range(_AT_ONCE, len(rows), _AT_ONCE)):
    x = bank[some].astype(np.float32)
    for i in range(0, len(some), 8):
      for total, head in zip(sums, heads, strict=True):
        total += np.array(loss(_grow(jnp.asarray(head(x[i : i + 8])), side), y[some[i : i + 8]]))
  return sums[:, 0] / np.maximum(sums[:, 1], 1)


def shown(data):
  """Rows of the pictures in the report: a few, spread over the split."""
  return set(np.linspace(0, len(data) - 1, min(_SHOWN, len(data))).astype(int).tolist())


def picture(image, truth, prediction, side=192):
  """An image with its maps, as squares that a page can hold."""
  small = lambda m: cv2.resize(m, (side, side), interpolation=cv2.INTER_NEAREST_EXACT)
  return transforms.resize(image, side, side), small(truth), small(prediction)
