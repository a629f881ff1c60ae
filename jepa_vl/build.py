"""From the config to a Run: everything that it determines before any array exists."""

import base64
import dataclasses
import functools
import json
import logging
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from jepa_vl import (
  checks,
  chips,
  distributed,
  evals,
  memory,
  objectives,
  online_probe,
  optim,
  sharding,
)
from jepa_vl import state as state_lib
from jepa_vl import step as step_lib
from jepa_vl.data import packing, sources, transforms
from jepa_vl.data import tokenizer as tokenizer_lib
from jepa_vl.evals import common
from jepa_vl.evals.encode import Encode
from jepa_vl.model import two_tower

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Run:
  """Everything that the config determines, before any array exists."""

  config: ConfigDict
  mesh: Any
  source: Any
  tokenizer: Any
  model: Any
  tx: Any
  abstract_state: Any
  train_step: Any
  probe: Any = None  # the OnlineProbe, if there is one
  chosen: tuple = ()  # keys that were left to this machine's memory

  @property
  def data_config(self):
    """`data_config` of this config."""
    return data_config(self.config)

  @property
  def flops(self):
    """FLOPs that one pair's training takes, forward and backward, in rows that may be shared."""
    return self.flops_at(self.config.steps)

  def flops_at(self, step):
    """The same in that step: the first ones may have smaller images."""
    side = transforms.image_side(self.config.data, self.config.model.image_size, step)
    return 3 * two_tower.forward_flops(self.model, self.view_sides or (side,), self.text_rows)

  @property
  def text_rows(self):
    """Rows of the text tower that one caption takes; below 1 where captions share them."""
    cfg = self.data_config
    return packing.rows_per_group(cfg) / cfg.packing_group if cfg.text_packing else 1

  def memory(self, *, accumulate=None, remat=None):
    """`memory.estimate` of the step, also for other micro-batches and another remat."""
    config = self.config.copy_and_resolve_references()
    config.accumulate = accumulate or config.accumulate
    model = self.model.clone(remat=remat or self.model.remat)
    return memory.estimate(
      config, model, self.abstract_state, self.mesh, sides=self.view_sides or
      (model.image_size,), text_rows=self.text_rows,
    )  # fmt: skip

  @property
  def view_sides(self):
    """The side of every view of a training image; () for a single one."""
    return transforms.view_sides(self.config.data, self.config.model.image_size)

  @functools.cached_property
  def meta(self):
    """What a checkpoint holds beside the arrays."""
    return {
      "config": json.loads(self.config.to_json_best_effort()),
      "tokenizer": base64.b64encode(self.tokenizer.model).decode(),
      "tokenizer_identity": self.tokenizer.identity,
      "data_identity": self.source.identity if self.source else None,
      "arrays": sharding.describe_arrays(self.abstract_state),
    }


def data_config(config):
  """The `data` sub-tree with what the pipeline needs of the model's and the text's."""
  return ConfigDict(
    {
      **config.data,
      "image_size": config.model.image_size,
      "text_length": config.text.length,
      "readout": config.text.readout,
      "accumulate": config.accumulate,
      "label": config.probe.label,
      "classes": config.probe.classes,
    }
  )


# What is compiled for without a tokenizer: GPT-2's.
VOCABULARY = 50257


def build(config, *, training=True, devices=None):
  """Run from the config; raises ValueError or FileNotFoundError in words on bad input.

  `training=False` leaves the training data and batch alone: an evaluation may be on another
  machine. `devices` take the place of this machine's, to compile for: then no data is opened, and
  where `text.tokenizer` is empty the model has VOCABULARY tokens. What the config leaves to the
  device's memory (`accumulate` = 0, `model.remat` = "auto") is filled in.
  """
  checks.numbers(config)
  if training:
    checks.keep_best(config)
  evals.check(config.evals)
  mesh = sharding.make_mesh(**config.mesh, **({"devices": devices} if devices else {}))
  if training:
    checks.batch(config, mesh)
    checks.objective(config)
    checks.images(config)
    if config.data.text_packing:
      checks.packing(config, mesh)
  objective = objectives.from_config(config.objective)
  tx = optim.make_optimizer(config.optim, config.steps)
  source = sources.from_config(config.data) if training and devices is None else None
  if training:
    checks.online_probe(config, source)
  tokenizer = None
  if devices is None or config.text.tokenizer:
    tokenizer = tokenizer_lib.load(config.text.tokenizer)
  model = two_tower.from_config(
    config.model, config.text, vocab_size=tokenizer.vocab_size if tokenizer else VOCABULARY,
    dtype=compute_dtype(config.model, mesh.devices.flat[0].platform),
    scalars=objectives.learned_scalars(config.objective), device=mesh.devices.flat[0],
  )  # fmt: skip
  probe = online_probe.from_config(config.probe, two_tower.width(config.model.size))
  run = Run(config, mesh, source, tokenizer, model, tx, None, None, probe)
  run.abstract_state = state_lib.abstract_state(model, tx, mesh, probe, config.optim.sharded)
  if not training:
    return run
  if memory.is_open(config):
    _fill_in(run, None if devices is None else chips.find(devices[0].device_kind))
  if config.model.remat != "none" and mesh.devices.flat[0].platform == "cpu":
    # XLA for CPUs finds that it has computed that before, and keeps it, unless in another loop.
    run.model = run.model.clone(scan=True)
  train_step = step_lib.make_train_step(
    run.model, objective, tx, seed=config.seed, accumulate=config.accumulate,
    log_every=config.log_every, probe=run.probe, shard_optimizer=config.optim.sharded,
  )  # fmt: skip
  run.train_step = step_lib.jit_train_step(train_step, run.abstract_state, mesh)
  return run


def _fill_in(run, chip):
  config = run.config
  run.chosen = ("accumulate",) * (config.accumulate == 0)
  bytes_limit = chip.usable if chip else memory.limit(run.mesh.local_devices[0])
  if not chip:  # all processes must compile one program
    bytes_limit = min(distributed.exchange(bytes_limit or 0))
  memory.fill_in(
    config, bytes_limit, lambda a, r: run.memory(accumulate=a, remat=r)["total"], run.mesh,
    refuse=chip is None,
  )  # fmt: skip
  run.model = run.model.clone(remat=config.model.remat)


EVALUATED_AT_ONCE = 256  # rows per device: enough to fill one, and little of a CPU's memory


def compute_dtype(cfg, platform):
  """The towers' computation type: bfloat16 on accelerators and float32 on a CPU for "auto"."""
  dtypes = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
  dtypes["auto"] = jnp.float32 if platform == "cpu" else jnp.bfloat16
  if cfg.dtype not in dtypes:
    raise ValueError(f"model.dtype must be one of {', '.join(dtypes)}, got {cfg.dtype!r}")
  return dtypes[cfg.dtype]


def make_encode(run, cache=""):
  """The `encode` that evaluations get; `cache` is a folder for features, "" for none."""
  config = run.config

  def tokenize(captions):
    return tokenizer_lib.tokenize(
      run.tokenizer, captions, length=config.text.length, readout=config.text.readout
    )

  shards = sharding.batch_shards(run.mesh)
  rows = min(-(-config.batch_size // shards), EVALUATED_AT_ONCE) * shards
  return Encode(
    apply=lambda variables, batch: run.model.apply(variables, batch, train=False),
    look_inside=lambda variables, batch: two_tower.look_inside(
      run.model, variables, batch["image"]
    ),
    tokenize=tokenize,
    mesh=run.mesh,
    image_size=config.model.image_size,
    resize_ratio=config.data.eval_resize,
    batch_size=rows,
    readings=tuple(common.READINGS) if config.model.predictor_depth else ("embed",),
    keys=sources.keys_of(config.data),
    model=repr(run.model),
    cache=cache,
  )


def describe(run, start):
  """The start-up lines: devices, model, memory per device, data."""
  config, device = run.config, run.mesh.devices.flat[0]
  params = run.abstract_state.params
  total, image, text = (
    state_lib.count(p) / 1e6 for p in (params, params["image"], params["text"])
  )
  log.info("devices: %d x %s, mesh %s", run.mesh.size, device.device_kind, dict(run.mesh.shape))
  log.info(
    "model: %s, %.1fM parameters (image tower %.1fM, text tower %.1fM, heads and predictors "
    "%.1fM), %.3g GFLOP forward per pair",
    config.model.size, total, image, text, total - image - text,
    run.flops / 3e9,
  )  # fmt: skip
  log.info("%s", describe_memory(run))
  log.info(
    "data: %s %s; batch %d, steps %d to %d (%.1f epochs)",
    "mix" if config.data.mix else config.data.source, run.source.identity, config.batch_size,
    start, config.steps, (config.steps - start) * config.batch_size / len(run.source),
  )  # fmt: skip
  if config.data.low_res:
    log.info(
      "images: %d pixels in the first %d steps (%.3g GFLOP forward per pair), then %d",
      *config.data.low_res, run.flops_at(0) / 3e9, config.model.image_size,
    )  # fmt: skip
  for name in sharding.undivided(run.abstract_state.params, run.mesh):
    log.warning("replicated, because it does not divide: %s", name)


def describe_memory(run):
  """What a device holds, by kind, for this batch and remat: one line."""
  config, found = run.config, run.memory()
  rows = config.batch_size // config.accumulate // sharding.batch_shards(run.mesh)
  limit = memory.limit(run.mesh.local_devices[0])
  parts = ", ".join(f"{kind} {size / memory.GIB:.2f}" for kind, size in found.items())
  return (
    f"memory of a device, estimated, GiB: {parts}"
    + (f" of {limit / memory.GIB:.1f}" if limit else "")
    + f" ({rows} rows at once, model.remat={run.model.remat})"
  )
