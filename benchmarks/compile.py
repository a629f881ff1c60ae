"""What the compiler says of the real sizes on chips that are not here: three tables.

python -m benchmarks.compile {table,weak,curve}

table: the ViT-B recipe on five topologies, model.remat=auto. weak: 16 pairs per chip, from 16 chips
to 256. curve: memory over the batch, LeVLJEPA against CLIP, a model so small that the objective
shows. Needs what `--mode=compile` needs: jax[tpu], and for h100:8 the CUDA compiler.
"""

import argparse

from configs import tiny, vit_b
from jepa_vl import aot, sweep

GIB = 2**30
TOPOLOGIES = ("v5e-16", "v5e-256", "v6e-64", "v5p-64", "h100:8")
BATCHES = (4096, 16384, 32768)


def one(config, topology, changes):
  """`aot.measure` in a process of its own, whose memory is then that of this compilation."""
  (found,) = sweep.run(config, topology, [changes])
  return found


def table():
  rows = []
  for topology in TOPOLOGIES:
    f = one(vit_b.get_config(), topology, {"model.remat": "auto"})
    rows.append(f)
    hbm, error = f["hbm"], f["estimate"]["total"] / f["hbm"]["used"] - 1
    print(
      f"| {topology} | {f['remat']} | {hbm['used'] / GIB:.2f} of {hbm['limit'] / GIB:.0f} | "
      f"{error:+.0%} | {1e3 * f['step_s']:.0f}, {f['limited_by']} | {f['examples_per_s']:,.0f} | "
      f"{f['days']:.2f} | {f['chip_hours']:,.0f} | {f['compile_s']:.0f} | "
      f"{f['host_memory'] / GIB:.1f} |", flush=True,
    )  # fmt: skip
  return rows


def weak():
  rows = []
  for topology, batch in (("v5e-16", 256), ("v5e-256", 4096)):
    f = one(vit_b.get_config(), topology, {"batch_size": batch})
    rows.append(f)
    ms = {k: 1e3 * t["seconds"] for k, t in f["roofline"].items()}
    given = sum(c["bytes"] for c in f["collectives"]) / 1e6
    sent = f["roofline"]["links"]["work"] / 1e6
    print(
      f"| {topology} | {batch} | {given:.0f} | {sent:.0f} | {ms['compute']:.1f} | "
      f"{ms['memory']:.1f} | {ms['links']:.1f} | {1e3 * f['step_s']:.1f} | "
      f"{1e3 * f['step_s_without_overlap']:.1f} | {f['hbm']['used'] / GIB:.2f} |", flush=True,
    )  # fmt: skip
  return rows


def curve():
  rows = []
  for batch in BATCHES:
    pair = []
    for preset in ("", "clip"):
      changes = {"batch_size": batch, "model.remat": "full", "model.scan": True}
      pair.append(one(tiny.get_config(preset), "v5p:2x2x1", changes))
    rows += pair
    used = [f["hbm"]["activations and temporaries"] for f in pair]
    per_row = [u / (batch / 4) / 1024 for u in used]
    print(
      f"| {batch:,} | {used[0] / GIB:.2f} | {used[1] / GIB:.2f} | {per_row[0]:.0f} | "
      f"{per_row[1]:.0f} |", flush=True,
    )  # fmt: skip
  return rows


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("which", choices=["table", "weak", "curve"])
  parser.add_argument("--out", default="runs/compile", help="folder for the figures, as JSON")
  args = parser.parse_args()
  aot.prepare()
  rows = {"table": table, "weak": weak, "curve": curve}[args.which]()
  print(aot.save(rows, args.out, args.which))


if __name__ == "__main__":
  main()
