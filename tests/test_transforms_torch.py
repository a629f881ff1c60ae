"""Augmentations and evaluation crop are torchvision's, draw for draw.

Where only the resizing filter or the rounding differs, the difference is measured and held.
"""

import torch_modules  # noqa: F401, I001  (before torchvision)

import numpy as np
import PIL.Image
import pytest
import scipy.stats
import torch
from records import png
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from configs import base, presets
from jepa_vl.data import transforms

pytestmark = pytest.mark.torch

BILINEAR, BICUBIC = InterpolationMode.BILINEAR, InterpolationMode.BICUBIC


class TorchRng:
  """numpy's Generator as far as transforms use it, on torch's own stream in torchvision's order."""

  def __init__(self, seed):
    self._torch = torch.Generator().manual_seed(seed)
    self._drawn = []  # shares of a colour jitter that are already drawn, the next to be used last

  def random(self):
    return torch.rand(1, generator=self._torch).item()

  def uniform(self, low, high):
    if self._drawn:
      return low + (high - low) * self._drawn.pop()
    return torch.empty(1).uniform_(low, high, generator=self._torch).item()

  def integers(self, high):
    return torch.randint(0, high, size=(1,), generator=self._torch).item()

  def permutation(self, n):
    """torchvision's ColorJitter draws its factors in their own order, ours in that of their use."""
    order = torch.randperm(n, generator=self._torch).tolist()
    shares = [self.random() for _ in order]
    self._drawn = [shares[i] for i in reversed(order)]
    return order


class Given:
  """A Generator whose next permutation and uniform draws are given."""

  def __init__(self, order, factors):
    self._order, self._factors = order, [factors[i] for i in reversed(order)]

  def permutation(self, n):
    return self._order

  def uniform(self, low, high):
    return self._factors.pop()


def tensor(image):
  return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)


def array(x):
  return x.permute(1, 2, 0).numpy()


def natural(height, width, seed=0):
  """An image of random phases whose amplitudes fall as 1/f, as those of photographs do."""
  rng = np.random.default_rng(seed)
  f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
  spectrum = np.exp(2j * np.pi * rng.random((3, height, width)))
  x = np.fft.ifft2(spectrum / np.maximum(f, 1 / max(height, width))).real.transpose(1, 2, 0)
  return np.clip(128 + 45 * x / x.std(), 0, 255).round().astype(np.uint8)


def distance(a, b):
  return np.abs(a.astype(float) - b)


@pytest.fixture
def torch_resize(monkeypatch):
  """Our pipeline with torchvision's filter, so that everything else can be compared exactly."""

  def resize(image, height, width):
    return array(F.resize(tensor(image), [height, width], BICUBIC, antialias=True))

  monkeypatch.setattr(transforms, "resize", resize)


@pytest.fixture
def plus():
  """data.* of LeVLJEPA+ in small sides."""
  c = base.get_config()
  presets.plus(c)
  c.data.local_size = 32
  return c.data


# --- crop boxes

SCALES = [(0.8, 1.0), (0.4, 1.0), (0.05, 0.4)]
SHAPES = [(150, 150), (90, 200), (200, 90), (30, 240), (240, 30), (17, 31), (3, 4), (1, 9), (1, 1)]


def our_boxes(shape, scale, rngs):
  """(top, left, height, width), one for each generator."""
  return np.array([transforms.random_box(*shape, rng, scale) for rng in rngs])


def torch_boxes(shape, scale, seeds):
  crop, image = v2.RandomResizedCrop(16, scale=scale), torch.empty(3, *shape)
  found = []
  for seed in seeds:
    if seed is not None:
      torch.manual_seed(seed)
    box = crop.make_params([image])
    found.append([box[k] for k in ("top", "left", "height", "width")])
  return np.array(found)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_draws_give_equal_boxes(shape, scale):
  """Also of images so wide that few boxes fit or none does; float32 v. float64 moves 1 in 1000."""
  seeds = range(300)
  ours = our_boxes(shape, scale, map(TorchRng, seeds))
  theirs = torch_boxes(shape, scale, seeds)
  assert np.mean((ours != theirs).any(axis=1)) <= 1 / 300
  assert np.abs(ours - theirs).max() <= 1


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", [(160, 160), (100, 160), (200, 110)])
def test_boxes_of_numpys_draws_are_distributed_alike(shape, scale):
  """Area share, aspect ratio, and place within the room that the box leaves."""
  draws, (h, w) = 1500, shape
  rng = np.random.default_rng(0)
  torch.manual_seed(0)
  ours = our_boxes(shape, scale, [rng] * draws)
  theirs = torch_boxes(shape, scale, [None] * draws)
  for statistic in (
    lambda b: b[:, 2] * b[:, 3] / (h * w),
    lambda b: np.log(b[:, 3] / b[:, 2]),
    lambda b: b[:, 0] / np.maximum(h - b[:, 2], 1),
    lambda b: b[:, 1] / np.maximum(w - b[:, 3], 1),
  ):
    assert scipy.stats.ks_2samp(statistic(ours), statistic(theirs)).pvalue > 1e-3


# --- filter


@pytest.mark.parametrize("sides", [(512, 224), (300, 224), (448, 224), (300, 96), (120, 224)])
def test_our_filter_lies_between_bilinear_and_bicubic(sides):
  """Area is sharper than antialiased bilinear and softer than bicubic; all keep the mean.

  Levels of 255 on 1/f noise, which is rougher than photographs: 0.5 to 6 from bilinear, 1.4 to 3.5
  from bicubic, and these two are 3 to 3.5 apart.
  """
  side, size = sides
  image = natural(side, side)
  ours = transforms.resize(image, size, size)
  linear, cubic = (
    array(F.resize(tensor(image), [size, size], mode, antialias=True))
    for mode in (BILINEAR, BICUBIC)
  )
  between = distance(linear, cubic).mean()
  assert min(distance(ours, x).mean() for x in (linear, cubic)) < 1.05 * between
  assert distance(ours, linear).mean() < 6 and distance(ours, cubic).mean() < 4
  for x in (linear, cubic):
    assert ours.mean() == pytest.approx(x.mean(), abs=0.2)


@pytest.mark.parametrize("sides", [(512, 224), (300, 224), (230, 224), (120, 224), (64, 32)])
def test_our_filter_does_not_shift(sides):
  """Away from the edges a ramp comes out as torchvision's."""
  side, size = sides
  x, y = np.meshgrid(np.linspace(0, 255, side), np.linspace(255, 0, side))
  image = np.stack([x, y, (x + y) / 2], axis=-1).round().astype(np.uint8)
  ours = transforms.resize(image, size, size)
  for mode in (BILINEAR, BICUBIC):
    theirs = array(F.resize(tensor(image), [size, size], mode, antialias=True))
    assert distance(ours, theirs)[4:-4, 4:-4].max() <= 2


# --- colours

ADJUST = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
NEUTRAL = (1.0, 1.0, 1.0, 0.0)


def jittered(image, order, factors):
  return transforms.colour_jitter(image, Given(order, factors), 9, 9, 9, 0.5)


@pytest.mark.parametrize("op", range(3), ids=lambda i: ADJUST[i].__name__)
def test_each_colour_operation_is_torchvisions(op):
  """To a level: torchvision truncates to uint8 and weighs red with 0.2989."""
  image = natural(48, 64)
  for factor in (0.0, 0.6, 1.0, 1.4):
    factors = [*NEUTRAL[:op], factor, *NEUTRAL[op + 1 :]]
    expected = array(ADJUST[op](tensor(image), factor))
    assert distance(jittered(image, [0, 1, 2, 3], factors), expected).max() <= 1


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.0, 0.02, 0.05, 0.3, 0.5])
def test_hue_is_torchvisions_closer_than_its_own_on_pil_images(turn):
  """Both count the hue in 256 steps: at most 8 levels from its result on floats, 0.5 on average."""
  image = natural(48, 64)
  exact = 255 * array(F.adjust_hue(tensor(image).float() / 255, turn))
  pil = F.adjust_hue(PIL.Image.fromarray(image), turn)
  found = distance(transforms.adjust_hue(image, turn), exact)
  assert found.max() < 8 and found.mean() < 0.5
  assert found.mean() <= distance(np.asarray(pil), exact).mean()


def draw_factors(rng):
  return [*rng.uniform([0.6, 0.6, 0.8], [1.4, 1.4, 1.2]), rng.uniform(-0.1, 0.1)]


def test_jitter_in_any_order_is_torchvisions_closer_than_its_own_on_pil_images():
  """Four roundings to uint8 are 0.7 levels of 255 from floats, torchvision's truncations 1.6."""
  rng, image = np.random.default_rng(0), natural(48, 64)
  ours, theirs = [], []
  for _ in range(60):
    order, factors = rng.permutation(4).tolist(), draw_factors(rng)
    x, pil = tensor(image).float() / 255, PIL.Image.fromarray(image)
    for i in order:
      x, pil = ADJUST[i](x, factors[i]), ADJUST[i](pil, factors[i])
    exact = 255 * array(x)
    ours.append(jittered(image, order, factors) - exact)
    theirs.append(np.asarray(pil) - exact)
  assert np.abs(ours).mean() < 0.8 and np.percentile(np.abs(ours), 99) < 5
  assert abs(np.mean(ours)) < 0.15  # not darker on the whole, as torchvision's are
  assert np.abs(ours).mean() < 0.5 * np.abs(theirs).mean()


def test_greyscale_is_torchvisions_to_a_level():
  image = natural(48, 64)
  expected = array(F.rgb_to_grayscale(tensor(image), num_output_channels=3))
  difference = transforms.greyscale(image).astype(int) - expected
  assert set(np.unique(difference)) <= {0, 1}  # torchvision truncates


@pytest.mark.parametrize("side", [12, 32, 96])
@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.7, 1.3, 2.0])
def test_blur_is_torchvisions(side, sigma):
  """GaussianBlur(23) to a level, edges included (reflected)."""
  image = natural(side, side)
  expected = array(F.gaussian_blur(tensor(image), [23, 23], [sigma, sigma]))
  found = transforms.blur(image, Given([0], [sigma]), (0.1, 2.0))
  assert distance(found, expected).max() <= 1


def test_solarise_is_torchvisions_at_every_value():
  image = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
  expected = array(v2.RandomSolarize(threshold=128, p=1.0)(tensor(image)))
  np.testing.assert_array_equal(transforms.solarise(image), expected)


# --- whole augmentations


def pipeline(size, scale, cfg, *more):
  """torchvision's transform of one view; `cfg` has the strengths."""
  return v2.Compose([
    v2.RandomResizedCrop(size, scale=tuple(scale), interpolation=BICUBIC, antialias=True),
    v2.RandomHorizontalFlip(cfg.flip),
    v2.RandomApply([v2.ColorJitter(*cfg.jitter)], cfg.jitter_prob),
    v2.RandomGrayscale(cfg.grey_prob),
    *more,
  ])  # fmt: skip


def test_standard_is_torchvisions_pipeline_on_the_same_draws(torch_resize):
  """One wrong or missing draw would give quite another image."""
  cfg, image = base.get_config().data, natural(60, 80)
  theirs = pipeline(48, cfg.crop_scale, cfg)
  for seed in range(40):
    torch.manual_seed(seed)
    expected = array(theirs(tensor(image)))
    rng = TorchRng(seed)
    found = transforms.standard(png(image), lambda *view, rng=rng: rng, 48, cfg)["image"]
    assert distance(found, expected).mean() < 3


def test_dino_is_torchvisions_pipeline_on_the_same_draws(torch_resize, plus):
  """Each of the six views on its own stream: 2 global ones, asymmetric, and 4 local ones."""
  image, views = natural(60, 80), []
  for i in range(6):
    kind = min(i, 2)
    size, scale = (48, plus.crop_scale) if i < 2 else (32, plus.local_scale)
    blur = v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], plus.blur_prob[kind])
    views.append(
      pipeline(size, scale, plus, blur, v2.RandomSolarize(128, plus.solarise_prob[kind]))
    )
  for seed in range(30):
    expected = []
    for i, view in enumerate(views):
      torch.manual_seed(10 * seed + i)
      expected.append(array(view(tensor(image))))
    streams = lambda kind, v, seed=seed: TorchRng(10 * seed + v + 2 * (kind == transforms.LOCAL))
    found = transforms.dino(png(image), streams, 48, plus)
    for ours, theirs in zip([*found["global"], *found["local"]], expected, strict=True):
      assert distance(ours, theirs).mean() < 3


def test_each_dino_view_has_its_probabilities(monkeypatch, plus):
  """Frequencies of numpy's draws by view: those that LeVLJEPA+ states."""
  steps = ("colour_jitter", "greyscale", "blur", "solarise")
  done = []  # by view, the steps that it went through

  def mark(step):
    return lambda image, *rest: (done[-1].add(step), image)[1]

  def new_view(_):
    done.append(set())
    return ramp

  for step in steps:
    monkeypatch.setattr(transforms, step, mark(step))
  ramp = np.arange(4, dtype=np.uint8)[None, :, None].repeat(4, 0).repeat(3, 2)
  monkeypatch.setattr(transforms, "crops", lambda data, wanted: map(new_view, wanted))
  draws, rng, flips = 3000, np.random.default_rng(0), []
  for _ in range(draws):
    out = transforms.dino(b"", lambda *view: rng, 4, plus)
    flips += [view[0, 0, 0] != 0 for view in (*out["global"], *out["local"])]
  found = [[flip, *(s in names for s in steps)] for flip, names in zip(flips, done, strict=True)]
  expected = [
    [0.5, 0.8, 0.2, 1.0, 0.0], [0.5, 0.8, 0.2, 0.1, 0.2], *[[0.5, 0.8, 0.2, 0.5, 0.0]] * 4,
  ]  # fmt: skip
  found = np.reshape(found, (draws, 6, 5)).mean(axis=0)
  np.testing.assert_allclose(found, expected, atol=4 * 0.5 / draws**0.5)


# --- evaluation


@pytest.mark.parametrize("ratio", [1.0, 256 / 224])
@pytest.mark.parametrize(
  "shape",
  [(64, 64), (65, 64), (64, 67), (50, 99), (99, 50), (31, 47), (300, 451), (77, 41), (7, 13)],
)
def test_evaluation_crop_is_torchvisions(torch_resize, shape, ratio):
  """Resize of the shorter side, then CenterCrop, with their roundings: equal to the last bit."""
  size, image = 32, natural(*shape)
  resize = v2.Resize(round(size * ratio), BICUBIC, antialias=True)
  expected = array(v2.CenterCrop(size)(resize(tensor(image))))
  np.testing.assert_array_equal(transforms.centre_crop(image, size, ratio), expected)


@pytest.mark.parametrize("shape", [(20, 61), (61, 20), (10, 301), (2, 201), (100, 333), (1, 300)])
def test_evaluation_crop_of_a_long_image_has_torchvisions_centre(torch_resize, shape):
  """It resizes only the middle, by which the crop moves half a pixel at most."""
  size, short = 32, 37
  slope = 255 / (2 * min(shape) + 6)  # levels per pixel; the ramp covers what the crop can show
  ramp = np.clip(127.5 + slope * (np.arange(max(shape)) - (max(shape) - 1) / 2), 0, 255).round()
  ramp = ramp[None] if shape[1] == max(shape) else ramp[:, None]
  image = np.broadcast_to(ramp[..., None], (*shape, 3)).astype(np.uint8)
  theirs = v2.Compose([v2.Resize(short, BICUBIC, antialias=True), v2.CenterCrop(size)])
  found = transforms.centre_crop(image, size, short / size)
  shift = found.mean() - array(theirs(tensor(image))).mean()
  assert abs(shift) <= 0.55 * slope * min(shape) / short
