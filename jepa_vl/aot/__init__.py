"""--mode=compile: the step that training runs, compiled for chips that are not here.

Says whether it fits, what it sends over the links, and how fast it can be at the very best: a
roofline, with published peaks. Nothing here has been measured on a chip.
"""

import collections
import json
import logging
import os
import re
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jepa_vl import build as build_lib
from jepa_vl import memory, sharding
from jepa_vl.aot import hlo, topologies
from jepa_vl.data import packing

log = logging.getLogger(__name__)

GIB = 2**30

# Passes over the towers, forward and backward: full rematerialisation adds a forward one.
_PASSES = {"none": 3, "dots": 3, "names": 3, "full": 4}


def report(config, topology, workdir, name):
  """Compiles, prints and writes WORKDIR/NAME-TOPOLOGY.json. Returns the exit code: 1 = no fit."""
  prepare()
  found = measure(config, topology)
  path = save(found, workdir, f"{name}-{topology}")
  print(words(found))
  print(f"all figures: {path}")
  return 0 if found["fits"] else 1


def prepare():
  """Keeps JAX on this machine's CPU and the compilers' own remarks off the screen."""
  jax.config.update("jax_platforms", "cpu")
  # Without a GPU nothing can be tuned by timing, and Triton's products need that.
  flags = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
  # libtpu else asks a metadata server which chips this machine has.
  os.environ["TPU_SKIP_MDS_QUERY"] = "1"
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  # Compiling occupies no chip, so several processes may do it at once, beside a training, too.
  os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"


def save(found, workdir, name):
  """Writes `found` as JSON; returns the path."""
  os.makedirs(workdir, exist_ok=True)
  path = os.path.join(workdir, re.sub(r"[^\w.\-]+", "_", name) + ".json")
  with open(path, "w") as f:
    json.dump(found, f, indent=1)
  return path


def measure(config, name):
  """Everything that compiling `config` for the topology `name` tells, as JSON takes it.

  Raises:
    ValueError: an unknown topology, or a config that does not go with it.
  """
  topology = topologies.get(name)
  slices = len(set(topology.domains))
  if config.mesh.slices == -1 and topology.is_tpu:
    config.mesh.slices = slices
  run = build_lib.build(config, devices=topology.devices)
  found = {
    "topology": name, "devices": run.mesh.size, "device_kind": topology.chip.kind,
    "chips": run.mesh.size // topology.chip.per_chip, "slices_or_nodes": slices,
    "mesh": dict(run.mesh.shape), "batch_size": config.batch_size, "accumulate": config.accumulate,
    "remat": run.model.remat, "scan": run.model.scan,
    "attention": run.model.attention, "pointwise": run.model.pointwise,
    "optimizer_sharded": config.optim.sharded, "dtype": np.dtype(run.model.dtype).name,
    "objective": config.objective.name, "vocabulary": run.model.vocab_size,
    "vocabulary_assumed": run.tokenizer is None, "jax": jax.__version__,
    "flops_per_example": run.flops, "estimate": run.memory(),
    "undivided": sharding.undivided(run.abstract_state.params, run.mesh),
  }  # fmt: skip
  start, cpu = time.perf_counter(), time.process_time()
  try:
    compiled = lower(run).compile()
  except Exception as e:  # jaxlib's error class differs between versions
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    found |= {"fits": False, "hbm": _refused(str(e), topology)}
  else:
    found["hbm"] = _hbm(compiled.memory_analysis(), run, topology)
    found["fits"] = found["hbm"]["used"] <= found["hbm"]["limit"]
    # The step's one conditional is that of the diagnostics.
    program = hlo.Program(compiled.as_text(), branch_share=1 / config.log_every)
    found |= roofline(program, run, topology, config)
  found["compile_s"] = time.perf_counter() - start
  found["compile_cpu_s"] = time.process_time() - cpu
  found["host_memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  return found


def lower(run):
  """The jitted train step of a Run, lowered for its mesh: nothing is allocated."""
  with jax.set_mesh(run.mesh):
    return run.train_step.lower(run.abstract_state, abstract_batch(run))


def abstract_batch(run):
  """What the pipeline gives the model, as shapes with their shardings."""
  c, cfg = run.config, run.data_config
  B, S, L = c.batch_size, c.model.image_size, c.text.length
  if run.view_sides:
    shapes = {"global": ((B, cfg.global_views, S, S, 3), jnp.uint8)}
    if cfg.local_views:
      side = cfg.local_size
      shapes["local"] = ((B, cfg.local_views, side, side, 3), jnp.uint8)
  else:
    shapes = {"image": ((B, S, S, 3), jnp.uint8)}
  if cfg.text_packing:
    g, R = cfg.packing_group, packing.rows_per_group(cfg)
    shapes |= {k: ((B // g, R, L), jnp.int32) for k in ("packed_text", "packed_position")}
    shapes["packed_readout"] = ((B // g, g), jnp.int32)
  else:
    shapes |= {"text": ((B, L), jnp.int32), "mask": ((B, L), jnp.bool_)}
  if run.probe:
    shapes["label"] = ((B,), jnp.int32)
  rows = NamedSharding(run.mesh, P(sharding.BATCH))
  return {k: jax.ShapeDtypeStruct(*v, sharding=rows) for k, v in shapes.items()}


def _hbm(analysis, run, topology):
  """Bytes on each device by kind, as the compiler planned them."""
  state = memory.state_bytes(run.abstract_state)
  code = analysis.generated_code_size_in_bytes
  extra = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
  used = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + code + max(extra, 0)
  return {
    **state,
    "batch": analysis.argument_size_in_bytes - sum(state.values()),
    "activations and temporaries": analysis.temp_size_in_bytes,
    "outputs": max(extra, 0),
    "code": code,
    "used": used,
    "limit": int(topology.chip.usable),
  }


# How XLA says that a program is too big: all of it, or its temporaries alone.
_TOO_BIG = (
  r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm",
  r"temporaries \(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)",
)


def _refused(message, topology):
  """What the compiler says of a program that is too big."""
  units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
  first = message.splitlines()[0]
  for pattern in _TOO_BIG:
    if found := re.search(pattern, message):
      used, unit, limit, limit_unit = found.groups()
      sizes = float(used) * units[unit], float(limit) * units[limit_unit]
      return {"used": int(sizes[0]), "limit": int(sizes[1]), "message": first}
  return {"used": None, "limit": int(topology.chip.usable), "message": first}


def roofline(program, run, topology, config):
  """Seconds of a step that compute, memory, links and network would take, each at its peak."""
  chip, n = topology.chip, run.mesh.size
  flops = run.flops * config.batch_size / n * _PASSES[run.model.remat] / 3
  hbm = program.hbm_bytes(on_chip=topology.is_tpu)
  rows, link, network = collectives(program, run.mesh, topology)
  work = {
    "compute": (flops, chip.flops, "FLOP/s"), "memory": (hbm, chip.hbm_bandwidth, "B/s"),
    "links": (link, chip.link, "B/s"), "network": (network, chip.network, "B/s"),
  }  # fmt: skip
  terms = {
    k: {"work": w, "peak": peak, "unit": unit, "seconds": w / peak if peak else None}
    for k, (w, peak, unit) in work.items()
  }
  seconds = [t["seconds"] for t in terms.values() if t["seconds"] is not None]
  step, limit = max(seconds), max(terms, key=lambda k: terms[k]["seconds"] or 0)
  low = config.data.low_res[1] if config.data.low_res else 0
  days = (config.steps - low + low * run.flops_at(0) / run.flops) * step / 86400
  return {
    "collectives": rows, "roofline": terms, "peaks_from": chip.source, "limited_by": limit,
    "unknown_peaks": [k for k, t in terms.items() if t["work"] and not t["peak"]],
    "unknown_loops": program.unknown_loops,
    "step_s": step, "step_s_without_overlap": sum(seconds),
    "examples_per_s": config.batch_size / step,
    "mfu_at_best": run.flops * config.batch_size / n / chip.flops / step,
    "days": days, "chip_hours": days * 24 * n / chip.per_chip, "steps": config.steps,
  }  # fmt: skip


def collectives(program, mesh, topology):
  """Rows by kind and group size; bytes that a device sends over links and over the network."""
  place = {d: domain for d, domain in zip(topology.devices, topology.domains, strict=True)}
  domains = np.array([place[d] for d in mesh.devices.flat])
  rows = collections.defaultdict(lambda: {"count": 0.0, "bytes": 0.0})
  link = network = 0.0
  for c in program.collectives():
    groups = np.arange(len(domains))[None] if c.groups is None else c.groups
    on_link, on_network = sent(c.kind, c.bytes, domains[groups])
    link, network = link + c.runs * on_link, network + c.runs * on_network
    row = rows[c.kind, groups.shape[1], bool(on_network)]
    row["count"] += c.runs
    row["bytes"] += c.runs * c.bytes
  return [
    {"kind": kind, "devices": size, "between": "slices or nodes" if far else "chips", **row}
    for (kind, size, far), row in sorted(rows.items())
  ], link, network


def sent(kind, given, domains):
  """Bytes that a device of the group sends (over links, over the network) at the least.

  `given` bytes are each device's operand; `domains` (groups, members): the slice or node of each
  member. Within a domain a ring; between domains each device exchanges its own share.
  """
  n = domains.shape[1]
  if n == 1:
    return 0.0, 0.0
  apart = len(set(domains[0]))
  near = n // apart
  if kind == "send":  # a sum over the slices, by their hosts
    return 0.0, 2 * given * (apart - 1) / apart
  if kind == "collective-permute":  # of its pairs only the number is known, not who is far
    return (given, 0.0) if apart == 1 else (given, given)
  whole = given * n if kind == "all-gather" else given
  times = 2 if kind == "all-reduce" else 1
  if kind in ("all-to-all", "ragged-all-to-all"):
    return given * (near - 1) / n, given * (n - near) / n
  return times * whole * (near - 1) / near, times * whole / near * (apart - 1) / apart


def words(found):
  """The report as a page of text."""
  f, gib = found, lambda b: f"{b / GIB:.2f} GiB"
  mesh = " ".join(f"{k}={v}" for k, v in f["mesh"].items())
  lines = [
    f"{f['topology']}: {f['devices']} x {f['device_kind']}, mesh {mesh}; batch {f['batch_size']}, "
    f"accumulate {f['accumulate']}, remat {f['remat']}, {'scanned' if f['scan'] else 'unrolled'} "
    f"layers, {f['dtype']}, {f['objective']}",
    f"compiled in {f['compile_s']:.0f} s ({f['compile_cpu_s']:.0f} s of CPU time) with "
    f"{gib(f['host_memory'])} of host memory, jax {f['jax']}; no chip was used",
  ]
  if f["vocabulary_assumed"]:
    lines.append(
      f"text.tokenizer is empty: {f['vocabulary']} tokens were taken, as of GPT-2's tokenizer"
    )
  lines += [f"replicated, because it does not divide: {name}" for name in f["undivided"]]
  lines += ["", *_fit_words(f, gib)]
  if "roofline" in f:
    lines += ["", *_roofline_words(f)]
  return "\n".join(lines)


def _fit_words(f, gib):
  hbm = f["hbm"]
  if hbm["used"] is None:
    return [f"does not fit: {hbm['message']}", _ADVICE]
  over = hbm["used"] - hbm["limit"]
  share = f"{gib(hbm['used'])} of {gib(hbm['limit'])} per device"
  if f["fits"]:
    lines = [f"fits: {share}, {gib(-over)} to spare"]
  else:
    lines = [f"does not fit: {share}, {gib(over)} too much", _ADVICE]
    lines += [f"the compiler's words: {hbm['message']}"] if "message" in hbm else []
  kinds = {k: v for k, v in hbm.items() if k not in ("used", "limit", "message") and v}
  lines += [f"  {kind:<29}{gib(size):>11}" for kind, size in kinds.items()]
  if not f["device_kind"].startswith("TPU"):
    lines.append(
      "  The limit is the share of the GPU that JAX takes by default. The compiler could not tune "
      "itself without a GPU, and may then need more or less."
    )
  return lines


_ADVICE = (
  "Set model.remat=full, lower batch_size, raise accumulate (0: as memory asks for), or split the "
  "parameters with mesh.fsdp; --sweep tries them"
)


def _roofline_words(f):
  step, slow = f["step_s"], f["step_s_without_overlap"]
  lines = [f"at published peaks ({f['peaks_from']}), a step needs"]
  for kind, term in f["roofline"].items():
    unit = "TFLOP" if kind == "compute" else "GB"
    amount = term["work"] / (1e12 if kind == "compute" else 1e9)
    if term["seconds"] is None:
      note = "no published peak" if term["work"] else ""
      lines.append(f"  {kind:<9}{amount:10.4g} {unit:<6}{note}")
    else:
      peak = term["peak"] / (1e12 if kind == "compute" else 1e9)
      at = f"at {peak:7.6g} {unit}/s {1e3 * term['seconds']:9.3f} ms"
      lines.append(f"  {kind:<9}{amount:10.4g} {unit:<6}{at}")
  lines += [
    f"so at least {1e3 * step:.1f} ms, limited by {f['limited_by']} ({1e3 * slow:.1f} ms if "
    f"nothing overlaps): at most {f['examples_per_s']:,.0f} examples/s, MFU {f['mfu_at_best']:.0%}",
    f"{f['steps']:,} steps: at least {f['days']:.2f} days, {f['chip_hours']:,.0f} chip-hours",
    "", "collectives of a device in a step (bytes that it gives)",
  ]  # fmt: skip
  lines += [
    f"  {c['kind']:<20}over {c['devices']:>4} devices, between {c['between']:<16}"
    f"{c['count']:8.4g} times {c['bytes'] / 1e6:12,.3f} MB"
    for c in f["collectives"]
  ]
  if f["unknown_loops"]:
    lines.append(f"  {f['unknown_loops']} loops of unknown length were counted once")
  return lines
