"""The same run on every mesh, in one process and in several: ten steps, and what feeds them.

`pytest -rP` (or -s) shows the tables.
"""

import json
import pathlib

import jax
import numpy as np
import processes
import pytest
from ml_collections import ConfigDict

from jepa_vl import sharding, train
from jepa_vl import state as state_lib
from jepa_vl.build import build
from jepa_vl.data import pipeline

STEPS = 10


def case(data=1, fsdp=1, tensor=1, slices=1, **more):
  sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "slices": slices}
  return {f"mesh.{k}": v for k, v in sizes.items()} | more


PACKED = {"accumulate": 2, "data.text_packing": True}
SHARDED = {"optim.sharded": True}
UNROLLED = {"model.scan": False}  # the default; the fixture's loop compiles sooner
# (processes, devices of each): what runs there, in one start.
# Here both processes feed the same rows; then each its half, as a slice.
IN_THE_SUITE = {
  (2, 2): [case(tensor=4, **PACKED), case(data=2, fsdp=2, slices=2, **PACKED, **UNROLLED)]
}
ALL = {
  (1, 1): [case()],
  (1, 2): [case(data=2), case(fsdp=2, **PACKED), case(tensor=2)],
  (1, 4): [case(data=4, slices=2), case(fsdp=4), case(data=2, tensor=2), case(fsdp=2, tensor=2)],
  (2, 1): [case(data=2, slices=2), case(tensor=2)],
  (2, 2): [case(data=2, fsdp=2, **UNROLLED), case(fsdp=4), case(tensor=4), case(data=4, **SHARDED)],
  (2, 4): [case(data=2, fsdp=2, tensor=2), case(fsdp=4, tensor=2, **UNROLLED),
           case(data=4, tensor=2, slices=4, **PACKED)],
  (4, 1): [case(data=4), case(data=2, tensor=2, **PACKED)],
  (4, 2): [case(data=2, fsdp=2, tensor=2, slices=2), case(fsdp=8)],
  (4, 4): [case(data=4, fsdp=2, tensor=2, slices=4), case(data=16)],
}  # fmt: skip


# --- what the processes run


def follow(config, cases, folder):
  """The first ten steps of each case (config keys and values), as this process sees them.

  folder/PROCESS.json then holds, for each, `loss` and `grad_norm` of every step and `rows`, pairs
  of a part of the rows that this process fed and its sample ids, (steps, rows).
  """
  seen = [_ten_steps(ConfigDict(config), keys) for keys in cases]
  pathlib.Path(folder, f"{jax.process_index()}.json").write_text(json.dumps(seen))


def _ten_steps(config, keys):
  config.update_from_flattened_dict(keys)
  run = build(config)
  state = state_lib.init_state(
    run.model, run.tx, run.mesh, config.seed, shard_optimizer=config.optim.sharded
  )
  parts, count = sharding.row_parts(run.mesh)
  data = pipeline.batches(
    run.source, run.tokenizer, run.data_config, batch_size=config.batch_size, seed=config.seed,
    start_step=0, parts=parts, count=count,
  )  # fmt: skip
  seen, ids = {"loss": [], "grad_norm": []}, []
  for _ in range(STEPS):
    batch = next(data)
    with jax.set_mesh(run.mesh):
      state, values = run.train_step(state, train.put_rows(batch, run.mesh))
    for name, found in seen.items():
      found.append(float(values[name]))
    ids.append(batch["index"].reshape(len(parts), -1))
  by_part = np.stack(ids, axis=1).tolist()
  return seen | {"rows": list(zip(parts, by_part, strict=True))}


# --- the comparison


@pytest.fixture
def config(config):
  """With its own schedule and warm-up, of which ten steps are taken."""
  config.steps = 1300
  # BatchNorm over few and similar rows enlarges rounding: at 16 in two micro-batches, gradient
  # norms differ by 9e-6.
  config.batch_size = 64
  config.data.packing_group, config.data.packing_tokens = 2, 8
  return config


def run_all(config, folder, count, devices, cases):
  """For each case what every process saw."""
  folder = folder / f"{count}x{devices}"
  folder.mkdir()
  arguments = (json.loads(config.to_json_best_effort()), cases, str(folder))
  program = f"import test_meshes\ntest_meshes.follow(*{arguments!r})"
  for result in processes.run(count, program, devices=devices, timeout=3000):
    assert result.code == 0, result.output
    assert "rematerialization" not in result.output
  seen = [json.loads((folder / f"{p}.json").read_text()) for p in range(count)]
  return list(zip(*seen, strict=True))


def sample_ids(seen):
  """The ids of each step's rows, from what every process fed; a part fed twice is the same."""
  parts = {}
  for process in seen:
    for part, ids in process["rows"]:
      assert parts.setdefault(part, ids) == ids
  assert sorted(parts) == list(range(len(parts)))
  return np.concatenate([parts[p] for p in sorted(parts)], axis=1).tolist()


def variant_of(keys):
  return {k: v for k, v in keys.items() if not k.startswith("mesh.")}


def words(variant):
  return {json.dumps({}): "", json.dumps(PACKED): "packed"}.get(json.dumps(variant), "sharded")


def compare(config, folder, places):
  """Runs all, prints the table, and asserts that it shows no difference."""
  variants = {json.dumps(variant_of(c)): variant_of(c) for cases in places.values() for c in cases}
  alone = run_all(config, folder, 1, 1, [case(**v) for v in variants.values()])
  expected = dict(zip(variants, (seen for (seen,) in alone), strict=True))
  wrong = []
  print(f"\n{'processes x devices':<21}{'mesh':<38}{'':<10}{'loss':>8}{'grad norm':>11}  ids")
  for (count, devices), cases in places.items():
    (folder / "runs").mkdir(exist_ok=True)
    found = run_all(config, folder / "runs", count, devices, cases)
    for keys, seen in zip(cases, found, strict=True):
      mesh = " ".join(f"{k[5:]}={v}" for k, v in keys.items() if k.startswith("mesh."))
      variant = variant_of(keys)
      reference = expected[json.dumps(variant)]
      error = {k: max(np.abs(np.divide(s[k], reference[k]) - 1).max() for s in seen)
               for k in ("loss", "grad_norm")}  # fmt: skip
      same = sample_ids(seen) == sample_ids([reference])
      line = (
        f"{f'{count} x {devices}':<21}{mesh:<38}{words(variant):<10}"
        f"{error['loss']:>8.0e}{error['grad_norm']:>11.0e}  {'equal' if same else 'DIFFER'}"
      )
      print(line, flush=True)
      if not same or max(error.values()) > 1e-5:
        wrong.append(line)
  assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_two_processes_take_the_same_ten_steps_as_one_device(config, tmp_path):
  compare(config, tmp_path, IN_THE_SUITE)


@pytest.mark.slow
def test_any_processes_and_devices_take_the_same_ten_steps(config, tmp_path):
  """Losses and gradient norms to 1e-5, the same sample ids: 23 meshes on 9 sets of devices."""
  compare(config, tmp_path, ALL)
