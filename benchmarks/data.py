"""Images a second of the whole data path: ours, PyTorch's DataLoader with torchvision, webdataset.

python -m benchmarks.data [--workers 0] [--seconds 8] [--rounds 3]
needs `pip install -r requirements-torch.txt webdataset`

All read the same tars and give the same: a random crop of 80 to 100% of the area at 224 pixels,
flipped, jittered and greyed as configs/base.py says, as uint8, and the caption's 77 tokens by the
same tokenizer, in batches of 64. Rounds take turns, each on as many cores as there are workers (0:
in the process itself, on one). The floors are decoding and resizing alone, on the same core: `ours`
with the pipeline's own functions on the boxes it draws, `plain` as OpenCV's imdecode and INTER_AREA
of the whole image. Pictures are made, of 1/f^1.6 noise: they compress as photographs do.
"""

import argparse
import io
import itertools
import os
import statistics
import tarfile
import tempfile
import time

import cv2
import numpy as np
from absl import flags

from configs import base
from jepa_vl import build
from jepa_vl.data import bench, pipeline, sources, tokenizer, transforms

SIZE, BATCH, SHARDS, LENGTH = 224, 64, 8, 77
PICTURES, SAMPLES = 192, 4096
CAPTION = "a small red house near the lake with two boats and number {} on its door"


def picture(height, width, rng):
  f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
  spectrum = np.exp(2j * np.pi * rng.random((3, height, width)))
  x = np.fft.ifft2(spectrum / np.maximum(f, 1 / max(height, width)) ** 1.6).real
  x = np.einsum("chw,cd->hwd", x, [[0.8, 0.7, 0.6], [0.2, 0.0, -0.2], [0.05, -0.1, 0.05]])
  return np.clip(128 + 50 * x / x.std(), 0, 255).round().astype(np.uint8)


def write_tars(folder, height, width):
  """SAMPLES of PICTURES JPEGs of quality 90, every third upright; their mean size in bytes."""
  rng, jpegs = np.random.default_rng(0), []
  for i in range(PICTURES):
    bgr = picture(*((height, width) if i % 3 else (width, height)), rng)[..., ::-1]
    jpegs.append(cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes())
  for shard in range(SHARDS):
    with tarfile.open(os.path.join(folder, f"{shard}.tar"), "w") as tar:
      for i in range(shard, SAMPLES, SHARDS):
        caption = CAPTION.format(i).encode()
        for kind, data in (("jpg", jpegs[i % PICTURES]), ("txt", caption)):
          info = tarfile.TarInfo(f"{i:06d}.{kind}")
          info.size = len(data)
          tar.addfile(info, io.BytesIO(data))
  return np.mean([len(jpeg) for jpeg in jpegs])


def settings(workers):
  c = base.get_config()
  c.model.image_size, c.text.length, c.data.workers = SIZE, LENGTH, workers
  return build.data_config(c)


class Tokens:
  """A caption as the tokens that our pipeline makes; pickled into workers."""

  def __init__(self):
    self._tokenizer = tokenizer.load("emoji")

  def __call__(self, caption):
    return tokenizer.tokenize(self._tokenizer, [caption], length=LENGTH, readout="eot")[0][0]


def ours(folder, workers):
  source = sources.open_source("webdataset", os.path.join(folder, "*.tar"), "")
  return pipeline.batches(
    source, tokenizer.load("emoji"), settings(workers), batch_size=BATCH, seed=0, start_step=0
  )


def torch_transform():
  """The same augmentation by torchvision, on PIL images, as the reference has it."""
  import tests.torch_modules  # noqa: F401, I001  (before torchvision)
  from torchvision.transforms import v2

  cfg = settings(0)
  return v2.Compose([
    v2.RandomResizedCrop(SIZE, scale=tuple(cfg.crop_scale)),
    v2.RandomHorizontalFlip(cfg.flip),
    v2.RandomApply([v2.ColorJitter(*cfg.jitter)], cfg.jitter_prob),
    v2.RandomGrayscale(cfg.grey_prob),
    v2.PILToTensor(),
  ])  # fmt: skip


class TorchDataset:
  """What a PyTorch user writes: bytes, Pillow, torchvision. Bytes come from our tar index."""

  def __init__(self, folder):
    self._source = sources.open_source("webdataset", os.path.join(folder, "*.tar"), "")
    self._transform, self._tokens = torch_transform(), Tokens()

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    import PIL.Image

    record = self._source[index]
    image = PIL.Image.open(io.BytesIO(record["image"])).convert("RGB")
    return self._transform(image), self._tokens(record["caption"])


def pytorch(folder, workers):
  import torch

  torch.set_num_threads(1)
  loader = torch.utils.data.DataLoader(
    TorchDataset(folder), BATCH, shuffle=True, drop_last=True, num_workers=workers,
    persistent_workers=bool(workers),
  )  # fmt: skip
  return itertools.chain.from_iterable(itertools.repeat(loader))


def webdataset(folder, workers):
  import torch
  import webdataset as wds

  torch.set_num_threads(1)
  transform, tokens = torch_transform(), Tokens()
  tars = os.path.join(folder, f"{{0..{SHARDS - 1}}}.tar")
  data = wds.WebDataset(tars, shardshuffle=SHARDS).repeat().shuffle(128).decode("pil")
  data = data.to_tuple("jpg", "txt").map_tuple(transform, tokens).batched(BATCH)
  return iter(wds.WebLoader(data, batch_size=None, num_workers=workers))


def floor_ours(folder, workers):
  """Decoding at the size that the crop needs, and the crop's resizing; one image a step."""
  source = sources.open_source("webdataset", os.path.join(folder, "*.tar"), "")
  images = [source[i]["image"] for i in range(PICTURES)]
  rng, scale = np.random.default_rng(0), base.get_config().data.crop_scale
  for data in itertools.cycle(images):
    yield transforms.crops(data, [(rng, SIZE, scale)])


def floor_plain(folder, workers):
  source = sources.open_source("webdataset", os.path.join(folder, "*.tar"), "")
  images = [np.frombuffer(source[i]["image"], np.uint8) for i in range(PICTURES)]
  for data in itertools.cycle(images):
    image = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)
    yield [cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA)]


LOADERS = {"ours": ours, "PyTorch DataLoader": pytorch, "webdataset": webdataset}
FLOORS = {"floor, ours": floor_ours, "floor, plain": floor_plain}


def compare(folder, workers, seconds, rounds):
  """{name: images/s and core of each round}."""
  found = {}
  makers = {**LOADERS, **(FLOORS if not workers else {})}
  running = {name: make(folder, workers) for name, make in makers.items()}
  for _ in range(rounds):
    for name, batches in running.items():
      time.sleep(1)  # the one before fills its buffers
      for _ in range(4 + 4 * workers):  # begins, warms up, and what was made ahead goes
        next(batches)
      rows = BATCH if name in LOADERS else 1
      found.setdefault(name, []).append(bench.rate(batches, rows, seconds) / max(workers, 1))
  return found


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workers", type=int, default=0)
  parser.add_argument("--seconds", type=float, default=8)
  parser.add_argument("--rounds", type=int, default=3)
  args = parser.parse_args()
  flags.FLAGS.mark_as_parsed()  # grain's workers insist on it
  cores = sorted(os.sched_getaffinity(0))[: max(args.workers, 1)]
  os.sched_setaffinity(0, cores)
  for height, width in ((384, 512), (288, 384), (960, 1280)):
    with tempfile.TemporaryDirectory() as folder:
      size = write_tars(folder, height, width)
      found = compare(folder, args.workers, args.seconds, args.rounds)
    print(f"\n{width} x {height}, {size / 1e3:.0f} kB; {args.workers} workers, {len(cores)} cores")
    print("| | images/s and core | lowest - highest | ours / this |")
    print("|---|---|---|---|")
    medians = {name: statistics.median(rates) for name, rates in found.items()}
    for name, rates in found.items():
      print(
        f"| {name} | {medians[name]:.0f} | {min(rates):.0f} - {max(rates):.0f} "
        f"| {medians['ours'] / medians[name]:.2f} |",
        flush=True,
      )


if __name__ == "__main__":
  main()
