"""How fast the pipeline of a configuration is on this machine, and how many cores a chip wants.

python -m jepa_vl.data.bench --config=configs/mine.py [--config.data.workers=N]
"""

import re
import time

from jepa_vl import chips
from jepa_vl.data import common, feed, pipeline

_SECONDS = 8.0  # of each measurement


def report(run):
  """--mode=bench: prints it all for a `build.Run`. Returns the exit code."""
  config = run.config
  print(f"data: {run.source.identity}")
  found = measure(
    run.source, run.tokenizer, run.data_config, batch_size=config.batch_size, seed=config.seed
  )
  # "lite" and "-" are other spellings of chips that are there already
  known = [chip for chip in chips.CHIPS if not {"lite", "-"} & set(re.split("( |-)", chip.kind))]
  peaks = [(chip.kind, chip.flops) for chip in known]
  print(table(found, config.data.workers, run.flops_at(0), peaks))
  return 0


def measure(source, tokenizer, cfg, *, batch_size, seed):
  """One process's examples/s, seconds an example by stage, and examples/s of `cfg.workers`.

  Returns:
    {"core": examples/s, "stages": {name: seconds}, "workers": examples/s or None}.
  """
  # A batch is kept small, for a first figure within seconds whatever the config asks for.
  unit = cfg.packing_group * cfg.accumulate if cfg.text_packing else 1
  arguments = dict(batch_size=min(batch_size, -(-64 // unit) * unit), seed=seed, start_step=0)
  alone = type(cfg)({**cfg, "workers": 0})
  board = feed.Board()
  try:
    batches = pipeline.batches(source, tokenizer, alone, board=board, **arguments)
    next(batches)
    before, core = board.read()[0][4], rate(batches, arguments["batch_size"], _SECONDS)
    spent = [b - a for a, b in zip(before, board.read()[0][4], strict=True)]
  finally:
    board.close()
  share = [t / sum(spent) for t in spent]
  names = ("order, batch", "read", "decode, augment", "tokenise")
  stages = {name: s / core for name, s in zip(names, share, strict=True)}
  workers = None
  if cfg.workers:
    batches = pipeline.batches(source, tokenizer, cfg, **arguments)
    for _ in range(2 * cfg.workers):  # they start, and what they made ahead goes
      next(batches)
    workers = rate(batches, arguments["batch_size"], _SECONDS)
  return {"core": core, "stages": stages, "workers": workers}


def rate(batches, batch_size, seconds):
  """Examples a second that an iterator gives, measured for so long."""
  count, start = 0, time.perf_counter()
  while time.perf_counter() - start < seconds:
    next(batches)
    count += batch_size
  return count / (time.perf_counter() - start)


def table(found, workers, flops, peaks):
  """The measurements in words, and what each chip needs of such cores.

  flops: of one trained example. peaks: (chip, FLOP/s) pairs.
  """
  lines = [f"{'stage':<18}{'ms an example':>14}{'examples/s':>13}"]
  for name, seconds in found["stages"].items():
    lines.append(f"{name:<18}{1e3 * seconds:>14.3f}{1 / max(seconds, 1e-9):>13,.0f}")
  lines.append(f"{'all, on one core':<18}{1e3 / found['core']:>14.3f}{found['core']:>13,.0f}")
  core = found["core"]
  if found["workers"]:
    core = found["workers"] / min(workers, common.cores())
    lines.append(
      f"{f'{workers} workers':<18}{1e3 / found['workers']:>14.3f}{found['workers']:>13,.0f}"
      f"   {core:,.0f} a core of {common.cores()}"
    )
  lines += [
    "",
    f"{flops / 1e9:.3g} GFLOP are trained an example. A chip that runs at 40% (60%) of its "
    "published bf16 peak needs",
    f"{'chip':<14}{'examples/s':>20}{'cores like these':>20}",
  ]
  for chip, peak in peaks:
    rates = [share * peak / flops for share in (0.4, 0.6)]
    low, high = (f"{r:,.0f}" for r in rates)
    cores = " - ".join(f"{max(r / core, 0.1):,.1f}" for r in rates)
    lines.append(f"{chip:<14}{f'{low} - {high}':>20}{cores:>20}")
  return "\n".join(lines)


if __name__ == "__main__":
  from jepa_vl import main  # a program, and as such above everything

  main.run(mode="bench")
