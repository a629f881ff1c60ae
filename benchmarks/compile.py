"""What the compiler says of the real sizes on chips that are not here: tables.

python -m benchmarks.compile {table,weak,curve,objective,kernels,where} [--topology NAME]

table: the ViT-B recipe on five topologies, model.remat=auto. weak: 16 pairs per chip, from 16 chips
to 256. curve: memory of a step over the batch, LeVLJEPA against CLIP, a small model. objective: the
same of the ViT-B recipe's objective alone. kernels: attention and remat on one topology. where: the
parts of a step on one topology, with --set KEY=VALUE. Needs what `--mode=compile` needs: jax[tpu],
and for h100:8 the CUDA compiler.
"""

import argparse
import ast

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import parts
from configs import tiny, vit_b
from jepa_vl import aot, objectives, sharding
from jepa_vl import build as build_lib
from jepa_vl.aot import hlo, sweep, topologies
from jepa_vl.model import two_tower

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
    f = one(vit_b.get_config(), topology, {"batch_size": batch, "model.remat": "none"})
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


KERNELS = (
  {"model.remat": "none"}, {"model.attention": "pallas", "model.remat": "none"},
  {"model.remat": "names"},
  {"model.attention": "pallas", "model.remat": "names"},
  {"model.attention": "pallas", "model.remat": "dots"},
  {"model.attention": "pallas", "model.remat": "none", "model.scan": True},
)  # fmt: skip


def kernels(topology):
  rows = []
  for changes in KERNELS:
    f = one(vit_b.get_config(), topology, changes)
    rows.append(f)
    terms = " | ".join(
      f"{f['roofline'][k]['work'] / 1e9:,.1f} | {1e3 * f['roofline'][k]['seconds']:.1f}"
      for k in ("compute", "memory", "links")
    )
    said = ", ".join(f"{k.split('.')[-1]}={v}" for k, v in changes.items()) or "as it is"
    print(f"| {said} | {f['hbm']['used'] / GIB:.2f} | {terms} | {f['limited_by']} |", flush=True)
  return rows


def where(topology, changes):
  config = vit_b.get_config()
  config.update_from_flattened_dict(changes)
  topology = topologies.get(topology)
  run = build_lib.build(config, devices=topology.devices)
  devices, chip, share = run.mesh.size, topology.chip, 1 / config.log_every
  with jax.set_mesh(run.mesh):
    traced = run.train_step.trace(run.abstract_state, aot.abstract_batch(run))
  program = hlo.Program(traced.lower().compile().as_text(), branch_share=share)
  depth = two_tower.SIZES[config.model.size][1]
  rows = config.batch_size // config.accumulate // sharding.batch_shards(run.mesh)
  moved = parts.traffic(program, depth=depth, rows=rows)
  counted = parts.flops(traced.jaxpr.jaxpr, branch_share=share)
  for part in sorted(moved | counted, key=lambda part: -moved[part]):
    size, flops = moved[part], counted[part] / devices
    memory, compute = 1e3 * size / chip.hbm_bandwidth, 1e3 * flops / chip.flops
    print(
      f"| {part} | {size / 1e9:.2f} | {size / sum(moved.values()):.0%} | {memory:.1f} | "
      f"{flops / 1e9:,.0f} | {compute:.1f} | {'memory' if memory > compute else 'compute'} |",
      flush=True,
    )
  return [{"changes": changes, "bytes": dict(moved), "flops": dict(counted), "devices": devices}]


TABLES = {"table": table, "weak": weak, "curve": curve, "objective": objective}
ON_ONE = {"kernels": kernels, "where": where}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("which", choices=[*TABLES, *ON_ONE])
  parser.add_argument("--topology", default="v5e-256", help="of kernels and where")
  parser.add_argument("--set", nargs="*", default=[], help="of where: KEY=VALUE of the config")
  parser.add_argument("--out", default="runs/compile", help="folder for the figures, as JSON")
  args = parser.parse_args()
  aot.prepare()
  if args.which in TABLES:
    rows = TABLES[args.which]()
  elif args.which == "where":
    rows = where(args.topology, dict(map(_setting, args.set)))
  else:
    rows = kernels(args.topology)
  print(aot.save(rows, args.out, args.which))


def _setting(text):
  """"model.scan=False" -> ("model.scan", False); what is no Python literal is a string."""
  key, value = text.split("=", 1)
  try:
    return key, ast.literal_eval(value)
  except ValueError:
    return key, value


if __name__ == "__main__":
  main()
