"""--mode=compile --sweep: which mesh, remat and layout of the layers is the cheapest that fits."""

import concurrent.futures
import logging
import multiprocessing
import os

import jax

from jepa_vl import aot
from jepa_vl.aot import topologies
from jepa_vl.memory import REMAT

log = logging.getLogger(__name__)

GIB = 2**30

# One compilation takes up to about this much of the host's memory.
_HOST_MEMORY = 8 * GIB


def report(config, topology, workdir, name):
  """Tries every candidate, prints the table, writes it as JSON. Returns 1 if none fits."""
  aot.prepare()
  devices = len(topologies.get(topology).devices)  # a wrong name should not start processes
  found = run(config, topology, candidates(devices))
  path = aot.save(found, workdir, f"{name}-{topology}-sweep")
  print(table(found))
  best = cheapest(found)
  if best:
    flags = " ".join(f"--config.{k}={v}" for k, v in best["changes"].items())
    print(f"the cheapest that fits, by the roofline: {flags}")
  else:
    print("none fits: lower batch_size, raise accumulate, or take more chips")
  print(f"all figures: {path}")
  return 0 if best else 1


def candidates(devices):
  """Config changes: parameters whole, split over some or all devices, and tensor parallelism."""
  meshes = {(1, 1), (min(8, devices), 1), (devices, 1)}
  if devices > 1:
    meshes.add((1, 2))
  return [
    {
      "mesh.data": -1, "mesh.fsdp": fsdp, "mesh.tensor": tensor,
      "model.remat": remat, "model.scan": scan,
    }
    for fsdp, tensor in sorted(meshes) for remat in REMAT for scan in (True, False)
  ]  # fmt: skip


def run(config, topology, changes):
  """`aot.measure` of each candidate in a process of its own, as many at once as the machine has
  cores and memory for -> list of results, each with its "changes"."""
  ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
  processes = max(1, min(os.cpu_count() or 1, ram // _HOST_MEMORY, len(changes)))
  log.info("%d candidates, %d at a time", len(changes), processes)
  results = []
  with concurrent.futures.ProcessPoolExecutor(
    processes, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
  ) as pool:
    jobs = {pool.submit(_measure, config.to_dict(), topology, c): c for c in changes}
    for job in concurrent.futures.as_completed(jobs):
      try:
        results.append(job.result())
      except Exception as e:  # of the compiler, or of a process that ran out of memory
        why = f"{type(e).__name__}: {str(e).strip().splitlines()[0][:200]}"
        results.append(_refused(jobs[job], why))
      log.info("%s", _row(results[-1]))
  return sorted(results, key=lambda r: (not r["fits"], r.get("step_s") or 0))


def _measure(config, topology, changes):
  from ml_collections import ConfigDict

  aot.prepare()
  config = ConfigDict(config)
  config.update_from_flattened_dict(changes)
  try:
    return {"changes": changes, **aot.measure(config, topology)}
  except ValueError as e:  # does not go with this config: a row of the table, not the end
    return _refused(changes, str(e))


def _refused(changes, why):
  return {"changes": changes, "fits": False, "refused": why, "jax": jax.__version__}


def cheapest(results):
  """What fits and has the shortest step; of equals (to 1%) the one with the most memory left."""
  fitting = [r for r in results if r["fits"]]
  if not fitting:
    return None
  shortest = min(r["step_s"] for r in fitting)
  near = [r for r in fitting if r["step_s"] <= 1.01 * shortest]
  return min(near, key=lambda r: r["hbm"]["used"])


def table(results):
  """One line per candidate: the fitting ones first, from the shortest step on."""
  head = f"{'fsdp':>5}{'tensor':>7} {'remat':<6}{'layers':<9}{'fits':<5}{'GiB':>7}{'ms':>9}"
  return "\n".join([f"{head}  {'limit':<9}{'compiled in':>11}", *map(_row, results)])


def _row(r):
  if "refused" in r:
    return ", ".join(f"{k}={v}" for k, v in r["changes"].items()) + f": {r['refused']}"
  layers = "scan" if r["scan"] else "unrolled"
  head = f"{r['mesh']['fsdp']:>5}{r['mesh']['tensor']:>7} {r['remat']:<6}{layers:<9}"
  used = f"{r['hbm']['used'] / GIB:7.2f}" if r["hbm"]["used"] else f"{'?':>7}"
  step = f"{1e3 * r['step_s']:9.1f}  {r['limited_by']:<9}" if "step_s" in r else f"{'':20}"
  return f"{head}{'yes' if r['fits'] else 'no':<5}{used}{step}{r['compile_s']:>9.0f} s"
