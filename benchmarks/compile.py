"""What the compiler says of the real sizes on chips that are not here: three tables.

python -m benchmarks.compile {table,weak,curve,objective}

table: the ViT-B recipe on five topologies, model.remat=auto. weak: 16 pairs per chip, from 16 chips
to 256. curve: memory of a step over the batch, LeVLJEPA against CLIP, a small model. objective: the
same of the ViT-B recipe's objective alone. Needs what `--mode=compile` needs: jax[tpu], and for
h100:8 the CUDA compiler.
"""

import argparse

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import tiny, vit_b
from jepa_vl import aot, objectives, sharding
from jepa_vl.aot import sweep, topologies

GIB = 2**30
TOPOLOGIES = ("v5e-16", "v5e-256", "v6e-64", "v5p-64", "h100:8")
CHIPS = "v5p:2x2x1"
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
      pair.append(one(tiny.get_config(preset), CHIPS, changes))
    rows += pair
    used = [f["hbm"]["activations and temporaries"] for f in pair]
    per_row = [u / (batch / 4) / 1024 for u in used]
    print(
      f"| {batch:,} | {used[0] / GIB:.2f} | {used[1] / GIB:.2f} | {per_row[0]:.0f} | "
      f"{per_row[1]:.0f} |", flush=True,
    )  # fmt: skip
  return rows


def objective():
  """Temporaries of the objective's value and gradient, (B, 256) embeddings on four chips."""
  devices = topologies.get(CHIPS).devices
  rows = []
  for batch in (*BATCHES, 65536):
    used = []
    for name in ("levljepa", "clip", "siglip"):
      config = vit_b.get_config("" if name == "levljepa" else name)
      mesh = sharding.make_mesh(**config.mesh, devices=devices)
      function = objectives.from_config(config.objective)
      split = NamedSharding(mesh, P(sharding.BATCH))
      shape = jax.ShapeDtypeStruct((batch, config.model.embed_dim), jnp.float32, sharding=split)
      out = dict.fromkeys(("z_img", "z_txt", "p_img", "p_txt"), shape)
      out |= {k: jax.ShapeDtypeStruct((), jnp.float32) for k in ("log_scale", "bias")}
      loss = lambda out, function=function: function(out, jax.random.key(0))[0]
      with jax.set_mesh(mesh):
        compiled = jax.jit(jax.value_and_grad(loss)).lower(out).compile()
      used.append(compiled.memory_analysis().temp_size_in_bytes)
    rows.append({"batch": batch, "temporaries": used})
    print(f"| {batch:,} | " + " | ".join(f"{u / 2**20:,.0f}" for u in used) + " |", flush=True)
  return rows


TABLES = {"table": table, "weak": weak, "curve": curve, "objective": objective}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("which", choices=list(TABLES))
  parser.add_argument("--out", default="runs/compile", help="folder for the figures, as JSON")
  args = parser.parse_args()
  aot.prepare()
  rows = TABLES[args.which]()
  print(aot.save(rows, args.out, args.which))


if __name__ == "__main__":
  main()
