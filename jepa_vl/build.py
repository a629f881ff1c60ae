"""From the config to a Run: everything that it determines before any array exists."""

import base64
import dataclasses
import functools
import json
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from jepa_vl import chips, evals, memory, objectives, optim, sharding
from jepa_vl import state as state_lib
from jepa_vl import step as step_lib
from jepa_vl.data import packing, sources, transforms
from jepa_vl.data import tokenizer as tokenizer_lib
from jepa_vl.evals import common
from jepa_vl.model import two_tower

log = logging.getLogger(__name__)

# A checkpoint opens only under the same values of these; other changes are allowed and said.
FIXED_KEYS = (
  "model.size",
  "model.image_size",
  "model.patch_size",
  "model.statistics",
  "model.embed_dim",
  "model.hidden_dim",
  "model.predictor_depth",
  "text.length",
  "text.readout",
  "objective.name",
  "optim.name",
  "data.source",
)


# The least value that makes sense, where less would fail later and less clearly.
MINIMUM = {
  "seed": 0,
  "steps": 1,
  "batch_size": 1,
  "accumulate": 0,
  "log_every": 1,
  "eval_every": 0,
  "checkpoint_every": 0,
  "keep_checkpoints": 1,
  "keep_every": 0,
  "peer_timeout": 1.0,
  "model.image_size": 1,
  "model.patch_size": 1,
  "model.embed_dim": 1,
  "model.hidden_dim": 1,
  "model.predictor_depth": 0,
  "text.length": 1,
  "objective.lambda_img": 0.0,
  "objective.lambda_txt": 0.0,
  "objective.lambda_multi": 0.0,
  "objective.scale": 1e-6,
  "objective.scale_max": 1e-6,
  "objective.chunk_size": 0,
  "objective.num_slices": 1,
  "objective.knots": 2,
  "objective.group_size": 0,
  "optim.warmup": 0,
  "data.workers": 0,
  "data.timeout": 0.0,
  "data.global_views": 1,
  "data.local_views": 0,
  "data.local_size": 1,
  "data.packing_group": 1,
  "data.packing_tokens": 1,
}


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
  chosen: tuple = ()  # keys that were left to this machine's memory

  @property
  def data_config(self):
    """The `data` sub-tree with what the pipeline needs of the model's and the text's."""
    c = self.config
    return ConfigDict(
      {
        **c.data,
        "image_size": c.model.image_size,
        "text_length": c.text.length,
        "readout": c.text.readout,
        "accumulate": c.accumulate,
      }
    )

  @property
  def flops(self):
    """FLOPs that one pair's training takes, forward and backward, in rows that may be shared."""
    return 3 * two_tower.forward_flops(self.model, self.view_sides, self.text_rows)

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


# What is compiled for without a tokenizer: GPT-2's.
VOCABULARY = 50257


def build(config, *, training=True, devices=None):
  """Run from the config; raises ValueError or FileNotFoundError in words on bad input.

  `training=False` leaves the training data and batch alone: an evaluation may be on another
  machine. `devices` take the place of this machine's, to compile for: then no data is opened, and
  where `text.tokenizer` is empty the model has VOCABULARY tokens. What the config leaves to the
  device's memory (`accumulate` = 0, `model.remat` = "auto") is filled in.
  """
  check_numbers(config)
  if training:
    check_keep_best(config)
  evals.check(config.evals)
  mesh = sharding.make_mesh(**config.mesh, **({"devices": devices} if devices else {}))
  if training:
    check_batch(config, mesh)
    check_objective(config)
    if config.data.text_packing:
      check_packing(config, mesh)
  objective = objectives.from_config(config.objective)
  tx = optim.make_optimizer(config.optim, config.steps)
  source = sources.from_config(config.data) if training and devices is None else None
  tokenizer = None
  if devices is None or config.text.tokenizer:
    tokenizer = tokenizer_lib.load(config.text.tokenizer)
  model = two_tower.from_config(
    config.model, config.text, vocab_size=tokenizer.vocab_size if tokenizer else VOCABULARY,
    dtype=compute_dtype(config.model, mesh.devices.flat[0].platform),
    scalars=objectives.learned_scalars(config.objective),
  )  # fmt: skip
  if model.remat == "auto":
    model = model.clone(remat="none")  # shapes and evaluations do not depend on it
  run = Run(config, mesh, source, tokenizer, model, tx, None, None)
  run.abstract_state = state_lib.abstract_state(model, tx, mesh)
  if not training:
    return run
  if memory.is_open(config):
    _fill_in(run, None if devices is None else chips.find(devices[0].device_kind))
  train_step = step_lib.make_train_step(
    run.model, objective, tx, seed=config.seed, accumulate=config.accumulate,
    log_every=config.log_every,
  )  # fmt: skip
  run.train_step = step_lib.jit_train_step(train_step, run.abstract_state, mesh)
  return run


def _fill_in(run, chip):
  config = run.config
  run.chosen = ("accumulate",) * (config.accumulate == 0)
  bytes_limit = chip.usable if chip else memory.limit(run.mesh.local_devices[0])
  if jax.process_count() > 1 and not chip:  # all must compile one program
    bytes_limit = int(multihost_utils.process_allgather(np.float32(bytes_limit or 0)).min())
  memory.fill_in(
    config, bytes_limit, lambda a, r: run.memory(accumulate=a, remat=r)["total"], run.mesh
  )
  run.model = run.model.clone(remat=config.model.remat)


def check_numbers(config):
  """Raises ValueError naming a number below its minimum; the rest is checked where it is used."""
  values = flat(config.to_dict())
  for key, least in MINIMUM.items():
    if values[key] < least:
      raise ValueError(f"{key} must be at least {least}, got {values[key]}")


def check_keep_best(config):
  """Raises ValueError if no evaluation along the way can give the figure that `keep_best` names."""
  if not config.keep_best:
    return
  name, *rest = config.keep_best.removeprefix("-").split("/")
  if name not in config.evals or not rest:
    raise ValueError(
      f"keep_best={config.keep_best!r} must be EVALUATION/KEY, as in evals.jsonl, of the run's "
      f"evaluations: {', '.join(config.evals) or 'there are none'}"
    )
  splits = config.evals[name].get("splits", ())
  if rest[0] not in splits:
    raise ValueError(
      f"keep_best={config.keep_best!r}: evals.{name}.splits has no {rest[0]!r}, only "
      f"{', '.join(splits)}"
    )
  if not config.eval_every:
    raise ValueError("keep_best needs evaluations along the way: set eval_every above 0")


def check_batch(config, mesh):
  """Raises ValueError if devices, micro-batches or SIGReg groups do not divide the batch."""
  accumulate = config.accumulate or 1  # what is left to the memory must do as one, too
  micro, rest = divmod(config.batch_size, accumulate)
  if rest:
    raise ValueError(
      f"accumulate={accumulate} does not divide batch_size={config.batch_size}; choose a "
      "divisor"
    )
  shards = sharding.batch_shards(mesh)
  if micro % shards:
    unit = shards * accumulate
    raise ValueError(
      f"batch_size={config.batch_size} / accumulate={accumulate} = {micro} rows cannot be "
      f"split over mesh.data x mesh.fsdp = {shards} devices; use a multiple of {unit}, for example "
      f"{max(config.batch_size // unit, 1) * unit}"
    )
  group = config.objective.group_size
  if group and micro % group:
    raise ValueError(
      f"objective.group_size={group} does not divide the {micro} rows that SIGReg sees "
      f"(batch_size={config.batch_size} / accumulate={accumulate}); choose a divisor, or 0 "
      "for one group of all rows"
    )


def check_objective(config):
  """Raises ValueError if predictors or views are asked for in one place and not in the other."""
  data, patch = config.data, config.model.patch_size
  name = config.objective.name
  if name in ("clip", "siglip") and config.model.predictor_depth:
    raise ValueError(
      f"objective.name={name!r} compares embeddings and would leave the predictors untrained: set "
      f"model.predictor_depth=0, or use the preset, --config=configs/vit_b.py:{name}"
    )
  plus = name == "levljepa_plus"
  if plus != (data.augment == "dino"):
    raise ValueError(
      f"objective.name={name!r} and data.augment={data.augment!r} do not go "
      "together: 'levljepa_plus' and 'dino' need each other (configs/vit_b_plus.py has both)"
    )
  for key, count in (("blur_prob", 3), ("solarise_prob", 3), ("jitter", 4)):
    if len(data[key]) != count:
      raise ValueError(f"data.{key} must have {count} values, got {tuple(data[key])}")
  if plus and data.local_views and data.local_size % patch:
    raise ValueError(
      f"model.patch_size={patch} does not divide data.local_size={data.local_size}; use a multiple "
      f"of {patch}, for example {max(data.local_size // patch, 1) * patch}"
    )


def check_packing(config, mesh):
  """Raises ValueError if captions cannot share rows as `data.packing_*` ask."""
  data, text = config.data, config.text
  if text.readout != "eot":
    raise ValueError(
      f"data.text_packing reads each caption at its EOT, and text.readout={text.readout!r} at the "
      "end of its row: set text.readout='eot', or data.text_packing=False"
    )
  if data.packing_tokens > text.length:
    raise ValueError(
      f"data.packing_tokens={data.packing_tokens} is more than a caption may have, "
      f"text.length={text.length}; use somewhat more than the captions' mean, EOT included"
    )
  shards = sharding.batch_shards(mesh)
  accumulate = config.accumulate or 1
  rows = config.batch_size // accumulate // shards
  if rows % data.packing_group:
    raise ValueError(
      f"data.packing_group={data.packing_group} does not divide the {rows} rows of a device "
      f"(batch_size={config.batch_size} / accumulate={accumulate} / {shards} devices); "
      f"use {math.gcd(data.packing_group, rows)}"
    )


def compute_dtype(cfg, platform):
  """The towers' computation type: bfloat16 on accelerators and float32 on a CPU for "auto"."""
  dtypes = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
  dtypes["auto"] = jnp.float32 if platform == "cpu" else jnp.bfloat16
  if cfg.dtype not in dtypes:
    raise ValueError(f"model.dtype must be one of {', '.join(dtypes)}, got {cfg.dtype!r}")
  return dtypes[cfg.dtype]


def make_encode(run):
  """The `encode` that evaluations get."""
  config = run.config

  def tokenize(captions):
    return tokenizer_lib.tokenize(
      run.tokenizer, captions, length=config.text.length, readout=config.text.readout
    )

  shards = sharding.batch_shards(run.mesh)
  rows = -(-min(config.batch_size, 1024) // shards) * shards
  return common.Encode(
    apply=jax.jit(lambda variables, batch: run.model.apply(variables, batch, train=False)),
    tokenize=tokenize,
    mesh=run.mesh,
    image_size=config.model.image_size,
    resize_ratio=config.data.eval_resize,
    batch_size=rows,
    readings=tuple(common.READINGS) if config.model.predictor_depth else ("embed",),
    keys=sources.keys_of(config.data),
  )


def flat(tree, prefix=""):
  """{"model": {"size": "tiny"}} -> {"model.size": "tiny"}."""
  items = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      items |= flat(value, f"{prefix}{key}.")
    else:
      items[prefix + key] = value
  return items


def check_resume(meta, run, fixed_keys=FIXED_KEYS):
  """Refuses a checkpoint of another architecture or data set; says what else has changed.

  Raises:
    ValueError: naming each difference.
  """
  old, new = flat(meta["config"]), flat(run.meta["config"])
  changed = {k: (old.get(k), new.get(k)) for k in old | new if old.get(k) != new.get(k)}
  fixed = [k for k in fixed_keys if k in changed]
  refused = [f"{k}: {changed[k][0]} there, {changed[k][1]} here" for k in fixed]
  for what in ("data_identity", "tokenizer_identity"):
    if meta[what] != run.meta[what] and run.meta[what]:
      refused.append(f"{what.replace('_', ' ')}: {meta[what]} there, {run.meta[what]} here")
  refused += _different_arrays(meta["arrays"], run.meta["arrays"]) if not refused else []
  if refused:
    raise ValueError(
      "the checkpoint is of another run:\n  " + "\n  ".join(refused) + "\n"
      "Use the same values (config.json in its workdir has them), or another folder"
    )
  for key in set(run.chosen) & set(changed):
    raise ValueError(
      f"the checkpoint's run was begun with {key}={changed[key][0]}, and {key}=0 chooses "
      f"{changed[key][1]} on this machine. BatchNorm and SIGReg see one micro-batch at a time, so "
      f"it would go on as another run: give --config.{key}={changed[key][0]} to go on as before, "
      f"or --config.{key}={changed[key][1]} to change it"
    )
  for key, (before, now) in changed.items():
    log.info("config changed since the checkpoint: %s: %s -> %s", key, before, now)
  for key in {"batch_size", "seed"} & set(changed):
    log.warning("%s has changed: from here on the sample order is another", key)


def _different_arrays(there, here):
  # What the keys above do not explain, such as another version of an optimizer.
  names = [k for k in there | here if there.get(k) != here.get(k)]
  return [f"array {k}: {there.get(k)} there, {here.get(k)} here" for k in names[:10]]


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
