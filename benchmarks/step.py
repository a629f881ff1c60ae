"""A train step of ours beside PyTorch's, same shapes, batch and precision, in one run.

python -m benchmarks.step [--sizes tiny small] [--batches 16] [--rounds 3] [--steps 4]
                          [--image-size 224] [--no-torch] [--config.model.remat=dots ...]

Each measurement is a process of its own, ours and PyTorch's in turn, `--rounds` times: on a CPU in
float32, PyTorch eager; on a GPU in bfloat16, PyTorch compiled. The batch lies on the device, as
both programs' loaders see to; on a GPU `--queued` steps are given to it at a time. Prints a
Markdown table: median and range over all steps of all rounds but the first step of a process,
pairs/s, TFLOP/s of the analytic count (forward and backward, without recomputation), MFU where the
chip's peak is published, and of the rate at which it multiplies 8192 x 8192 bfloat16 matrices in
the same run, peak memory, and seconds from the process's start to the end of its first step. What
does not fit says "out of memory"; a loss that is no number is an error. Arguments that begin with
--config set keys of ours.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time

import numpy as np

from jepa_vl import allocator

VOCABULARY = 50257  # GPT-2's


def make_config(size, rows, image_size, keys=()):
  """configs/base.py (the ViT-B recipe) at that size, with --config.KEY=VALUE in `keys` set."""
  from ml_collections import config_flags

  from configs import base

  c = base.get_config()
  c.model.size, c.model.image_size, c.batch_size = size, image_size, rows
  c.objective.group_size = math.gcd(rows, c.objective.group_size)
  c.model.remat = "none"
  if keys:
    from absl import flags

    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_dict("config", c, flag_values=values)
    values(["step", *keys])
    c = holder.value
  return c


def make_batch(c):
  """Random images and captions of random length, one to a row: NumPy."""
  rng = np.random.default_rng(0)
  B, S, L = c.batch_size, c.model.image_size, c.text.length
  lengths = rng.integers(8, L + 1, B)
  return {
    "image": rng.integers(0, 256, (B, S, S, 3), dtype=np.uint8),
    "text": rng.integers(1, VOCABULARY, (B, L)).astype(np.int32),
    "mask": np.arange(L) < lengths[:, None],
  }


class Ours:
  """The JAX program on one device, as `train` builds it, with random weights."""

  def __init__(self, c):
    import jax

    from jepa_vl import build, metrics, objectives, optim, sharding
    from jepa_vl import state as state_lib
    from jepa_vl import step as step_lib
    from jepa_vl.model import two_tower

    self._device = device = jax.devices()[0]
    model = two_tower.from_config(
      c.model, c.text, vocab_size=VOCABULARY, scalars={},
      dtype=build.compute_dtype(c.model, device.platform), device=device,
    )  # fmt: skip
    tx = optim.make_optimizer(c.optim, c.steps)
    self._mesh = mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=[device])
    step = step_lib.make_train_step(
      model, objectives.from_config(c.objective), tx, seed=0, accumulate=c.accumulate,
      log_every=c.log_every,
    )  # fmt: skip
    self._step = step_lib.jit_train_step(step, state_lib.abstract_state(model, tx, mesh), mesh)
    self._state = state_lib.init_state(model, tx, mesh, 0)
    self.about = {
      "flops": 3 * two_tower.forward_flops(model), "peak": metrics.peak_flops(device),
      "device": device.device_kind, "version": f"jax {jax.__version__}",
    }  # fmt: skip

  def place(self, batch):
    """The batch on the device."""
    from jepa_vl import sharding

    return sharding.put_batch(batch, self._mesh)

  def take(self, rows, steps=1):
    """So many steps; returns the last one's loss once all is done."""
    import jax

    with jax.set_mesh(self._mesh):
      for _ in range(steps):
        self._state, found = self._step(self._state, rows)
    return jax.block_until_ready((self._state, found))[1]["loss"]

  def compiled(self, rows):
    """The text of the compiled program."""
    import jax

    with jax.set_mesh(self._mesh):
      return self._step.lower(self._state, rows).compile().as_text()

  def ceiling(self):
    """FLOP/s of a large product of random bfloat16 matrices, None on a CPU."""
    import jax
    import jax.numpy as jnp

    if self._device.platform == "cpu":
      return None
    a, b = (jax.random.normal(jax.random.key(i), (8192, 8192), jnp.bfloat16) for i in range(2))
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, b))
    begun = time.perf_counter()
    for _ in range(20):
      found = product(a, b)
    jax.block_until_ready(found)
    return 20 * 2 * 8192**3 / (time.perf_counter() - begun)

  def memory(self):
    """Peak bytes, of the accelerator or of the process."""
    found = self._device.memory_stats() or {}
    return found.get("peak_bytes_in_use") or _resident()


class PyTorch:
  """The same in PyTorch."""

  def __init__(self, c):
    import torch

    from benchmarks import torch_peer

    self._on_gpu = torch.cuda.is_available()
    self.place, self._step = torch_peer.make_step(c, compiled=self._on_gpu)
    self.about = {"version": f"torch {torch.__version__}"}

  def take(self, rows, steps=1):
    for _ in range(steps):
      loss = self._step(rows)
    return loss.item()

  def ceiling(self):
    return None

  def memory(self):
    import torch

    return torch.cuda.max_memory_allocated() if self._on_gpu else _resident()


def _resident():
  import resource

  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


PROGRAMS = {"ours": Ours, "PyTorch": PyTorch}


def child(args, keys):
  """One measurement, printed as JSON."""
  if args.child == "ours" or args.keep_memory:
    allocator.keep_freed_memory()  # as main does
  c = make_config(args.sizes[0], args.batches[0], args.image_size, keys)
  try:
    program = PROGRAMS[args.child](c)
    rows = program.place(make_batch(c))
    program.take(rows)
    first, seconds = time.time() - args.born, []
    for _ in range(args.steps):
      begun = time.perf_counter()
      loss = program.take(rows, args.queued)
      seconds.append((time.perf_counter() - begun) / args.queued)
  except Exception as e:
    if not any(words in str(e) for words in ("RESOURCE_EXHAUSTED", "out of memory")):
      raise
    print(json.dumps({"out_of_memory": str(e).splitlines()[0][:200]}))
    return
  if not np.isfinite(loss):
    raise SystemExit(f"{args.child}: after {args.steps * args.queued} steps the loss is {loss}")
  found = {"first": first, "seconds": seconds, "memory": program.memory()}
  found["ceiling"] = program.ceiling()
  print(json.dumps({**found, **program.about}))


def measure(program, size, rows, args, keys):
  """The JSON of a process that runs `program`."""
  command = [
    sys.executable, "-m", "benchmarks.step", "--child", program, "--sizes", size, "--batches",
    str(rows), "--steps", str(args.steps), "--image-size", str(args.image_size), "--queued",
    str(args.queued), "--born", repr(time.time()), *["--keep-memory"] * args.keep_memory, *keys,
  ]  # fmt: skip
  # Else JAX takes three quarters of a GPU at once, and its peak says nothing.
  env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env)
  if done.returncode:
    raise SystemExit(f"{' '.join(command)} failed")
  return json.loads(done.stdout.splitlines()[-1])


def row(name, size, rows, found, baseline):
  """The table's line of one program's measurements; `baseline`: PyTorch's median or None."""
  if any("out_of_memory" in f for f in found):
    return f"| {size} | {rows} | {name} | out of memory |{' - |' * 7}", None
  seconds = sorted(s for f in found for s in f["seconds"])
  median = statistics.median(seconds)
  spread = f"{median:.4g} ({seconds[0]:.4g} - {seconds[-1]:.4g})"
  peak, flops, ceiling = (found[0].get(k) for k in ("peak", "flops", "ceiling"))
  rate = rows * flops / median if flops else None
  cells = [
    spread, f"{rows / median:.4g}", f"{rate / 1e12:.3g}" if rate else "-",
    f"{rate / peak:.1%}" if rate and peak else "-",
    f"{rate / ceiling:.1%}" if rate and ceiling else "-",
    f"{max(f['memory'] for f in found) / 2**20:,.0f}",
    f"{statistics.median(f['first'] for f in found):.1f}",
    f"{median / baseline:.2f}" if baseline else "-",
  ]  # fmt: skip
  return f"| {size} | {rows} | {name} | {' | '.join(cells)} |", median


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--sizes", nargs="+", default=["tiny", "small"])
  parser.add_argument("--batches", nargs="+", type=int, default=[16])
  parser.add_argument("--image-size", type=int, default=224)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--steps", type=int, default=4, help="timed steps of each process")
  parser.add_argument("--queued", type=int, default=0, help="of these, given at a time (GPU: 4)")
  parser.add_argument("--no-torch", action="store_true")
  parser.add_argument(
    "--keep-memory", action="store_true", help="PyTorch, too, has jepa_vl/allocator.py's settings"
  )
  parser.add_argument("--child", choices=list(PROGRAMS), help=argparse.SUPPRESS)
  parser.add_argument("--born", type=float, help=argparse.SUPPRESS)
  args, keys = parser.parse_known_args()
  if wrong := [k for k in keys if not k.startswith("--config.")]:
    parser.error(f"unknown argument {wrong[0]}")
  if args.child:
    child(args, keys)
    return
  args.queued = args.queued or (4 if shutil.which("nvidia-smi") else 1)
  programs = ["ours"] if args.no_torch else ["PyTorch", "ours"]
  print("| size | batch | program | s/step | pairs/s | TFLOP/s | MFU | of products | peak MiB "
        "| first step s | ours / PyTorch |\n|" + "---|" * 11)  # fmt: skip
  for size in args.sizes:
    for rows in args.batches:
      found = {p: [] for p in programs}
      for _ in range(args.rounds):
        for p in programs:
          found[p].append(measure(p, size, rows, args, keys))
      baseline = None
      for p in programs:
        if "flops" in found["ours"][0] and "flops" not in found[p][0]:
          found[p][0] |= {k: found["ours"][0][k] for k in ("flops", "peak", "ceiling")}
        line, median = row(p, size, rows, found[p], baseline if p == "ours" else None)
        baseline = median if p == "PyTorch" else baseline
        print(line, flush=True)
  about = [f.get("device") or f.get("version") for p in programs for f in found[p][:1]]
  print("\n" + ", ".join(filter(None, [*about, found["ours"][0].get("version")])))


if __name__ == "__main__":
  main()
