"""What text packing saves: tokens computed, captions cut, time per caption and of a train step.

python -m benchmarks.packing [--sizes tiny small] [--rows 32] [--repeats 5]

Captions are drawn, not read: words per caption log-normal with the mean and spread that
Changpinyo et al. (2021) give for CC12M and CC3M, times 1.3 BPE tokens per word (an assumption),
an EOT, cut at 77.
"""

import argparse
import itertools
import statistics
import time

import jax
import numpy as np

from configs import base
from jepa_vl import build, objectives, optim, sharding
from jepa_vl import state as state_lib
from jepa_vl import step as step_lib
from jepa_vl.data import packing
from jepa_vl.model import two_tower

WORDS = {"CC12M": (20.2, 16.3), "CC3M": (10.3, 4.5)}  # mean, standard deviation
TOKENS_PER_WORD = 1.3
VOCABULARY = 50257  # GPT-2's
BATCH = 4096


def captions(corpus, count, length):
  """Captions of random tokens with the corpus's lengths, and the share that is cut at `length`."""
  rng = np.random.default_rng(0)
  mean, deviation = WORDS[corpus]
  variance = np.log1p((deviation / mean) ** 2)
  words = rng.lognormal(np.log(mean) - variance / 2, variance**0.5, count)
  tokens = np.round(words * TOKENS_PER_WORD) + 1
  batch = {
    "text": rng.integers(1, VOCABULARY, (count, length)).astype(np.int32),
    "mask": np.arange(length) < tokens[:, None],
    "truncated": np.zeros(count, bool),
  }
  return batch, np.mean(tokens > length)


def settings(group, tokens):
  c = base.get_config()
  c.data.packing_group, c.data.packing_tokens = group, tokens
  return build.data_config(c)


def fill_table(batches):
  print("| captions like | group | tokens | computed per caption | fill | cut for room | us |")
  print("|---|---|---|---|---|---|---|")
  count = BATCH * batches
  for corpus, rooms in (("CC12M", (28, 32, 36)), ("CC3M", (16, 18))):
    batch, long = captions(corpus, count, base.get_config().text.length)
    for group, tokens in itertools.product((16, 32, 64), rooms):
      cfg = settings(group, tokens)
      seconds, places, used, cut = [], 0, 0, 0
      for start in range(0, count, BATCH):
        part = {k: v[start : start + BATCH] for k, v in batch.items()}
        begun = time.perf_counter()
        packed = packing.pack(part, cfg)
        seconds.append(time.perf_counter() - begun)
        places += packed["packed_text"].size
        used += np.count_nonzero(packed["packed_text"])  # no token of a caption is 0
        cut += packed["truncated"].sum()
      print(
        f"| {corpus} | {group} | {tokens} | {places / count:.1f} | {used / places:.0%} "
        f"| {cut / count:.2%} | {statistics.median(seconds) / BATCH * 1e6:.1f} |"
      )
    print(f"| {corpus} | unpacked | | {batch['text'].shape[1]} | {batch['mask'].mean():.0%} "
          f"| {long:.2%} at 77 | |")  # fmt: skip


def tower_pair(c):
  return two_tower.from_config(
    c.model, c.text, vocab_size=VOCABULARY,
    dtype=build.compute_dtype(c.model, jax.default_backend()),
    device=jax.devices()[0],
    scalars=objectives.learned_scalars(c.objective),
  )  # fmt: skip


def programs(c, cfg):
  """{"unpacked", "packed": (compiled train step, its batch)} and the state, on one device."""
  model, tx = tower_pair(c), optim.make_optimizer(c.optim, c.steps)
  mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
  objective = objectives.from_config(c.objective)
  step = step_lib.make_train_step(model, objective, tx, seed=0, accumulate=1, log_every=10**6)
  step = step_lib.jit_train_step(step, state_lib.abstract_state(model, tx, mesh), mesh)
  state = state_lib.init_state(model, tx, mesh, 0)
  side, rows = c.model.image_size, c.batch_size
  image = np.random.default_rng(1).integers(0, 256, (rows, side, side, 3), dtype=np.uint8)
  text, _ = captions("CC12M", rows, c.text.length)
  compiled = {}
  with jax.set_mesh(mesh):
    for name, batch in {"unpacked": text, "packed": packing.pack(text, cfg)}.items():
      arrays = {k: v for k, v in batch.items() if k != "truncated"}
      arrays = sharding.put_batch({"image": image, **arrays}, mesh)
      compiled[name] = step.lower(state, arrays).compile(), arrays
  return compiled, state


def medians(compiled, state, repeats):
  """Seconds of each program's step."""
  seconds = {name: [] for name in compiled}
  for repeat in range(repeats + 1):  # in turn, so that both meet the same machine
    for name, (step, batch) in compiled.items():
      begun = time.perf_counter()
      state, _ = jax.block_until_ready(step(state, batch))
      if repeat:
        seconds[name].append(time.perf_counter() - begun)
  return [statistics.median(seconds[name]) for name in compiled]


def time_table(sizes, rows, repeats):
  print("| size | unpacked s | packed s | ratio | GFLOP per pair | packed | ratio |")
  print("|---|---|---|---|---|---|---|")
  for size in dict.fromkeys((*sizes, "base")):
    c = base.get_config()
    c.model.size, c.batch_size, c.objective.group_size = size, rows, 0
    c.model.remat = "none"
    cfg = settings(c.data.packing_group, c.data.packing_tokens)
    share = packing.rows_per_group(cfg) / cfg.packing_group
    a, b = (two_tower.forward_flops(tower_pair(c), (), n) / 1e9 for n in (1, share))
    times = "- | - | -"
    if size in sizes:
      before, after = medians(*programs(c, cfg), repeats)
      times = f"{before:.3f} | {after:.3f} | {before / after:.2f}"
    print(f"| {size} | {times} | {a:.2f} | {b:.2f} | {a / b:.2f} |", flush=True)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--sizes", nargs="*", default=["tiny", "small"])
  parser.add_argument("--rows", type=int, default=32, help="of a train step; a multiple of 32")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--batches", type=int, default=20, help="of 4096 captions")
  args = parser.parse_args()
  print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; batches of {BATCH} captions\n")
  fill_table(args.batches)
  print(f"\ntrain steps of {args.rows} pairs like CC12M's, packed as configs/base.py has it\n")
  time_table(args.sizes, args.rows, args.repeats)


if __name__ == "__main__":
  main()
