"""Whether a config's keys go together, and whether a checkpoint goes with them."""

import logging
import math

from jepa_vl import checkpoint, sharding
from jepa_vl.data import common, transforms
from jepa_vl.model.vit import kept_patches

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
  "objective.t_max": 1e-6,
  "objective.group_size": 0,
  "objective.scale_rows": 1,
  "optim.lr": 0.0,
  "optim.warmup": 0,
  "optim.weight_decay": 0.0,
  "optim.eps": 0.0,
  "optim.clip": 0.0,
  "probe.classes": 0,
  "probe.lr": 0.0,
  "data.workers": 0,
  "data.timeout": 0.0,
  "data.global_views": 1,
  "data.local_views": 0,
  "data.local_size": 1,
  "data.packing_group": 1,
  "data.packing_tokens": 1,
  "data.jitter": 0.0,
  "data.eval_resize": 1.0,
}

# Shares and probabilities, alone or several: from 0 to 1.
SHARES = (
  "model.predictor_dropout",
  "optim.warmup_from",
  "optim.final",
  "optim.decay",
  "optim.b1",
  "optim.b2",
  "data.max_bad_fraction",
  "data.crop_scale",
  "data.local_scale",
  "data.flip",
  "data.jitter_prob",
  "data.grey_prob",
  "data.blur_prob",
  "data.solarise_prob",
  "data.tag_prob",
)


def numbers(config):
  """Raises ValueError naming a number out of its bounds; the rest is checked where it is used."""
  values = flat(config.to_dict())
  each = lambda key: values[key] if isinstance(values[key], (tuple, list)) else (values[key],)
  for key, least in MINIMUM.items():  # `not`, for NaN is below nothing
    if not all(x >= least for x in each(key)):
      raise ValueError(f"{key} must be at least {least}, got {values[key]}")
  for key in SHARES:
    if not all(0 <= x <= 1 for x in each(key)):
      raise ValueError(f"{key} must be from 0 to 1, got {values[key]}")


def keep_best(config):
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
  if config.evals[name].get("when", "always") == "end":
    raise ValueError(
      f"keep_best={config.keep_best!r} needs evaluations along the way, and evals.{name}.when is "
      "'end': set it to 'always', or name another evaluation"
    )
  if not 0 < config.eval_every < config.steps:  # the last step's comes after its save
    raise ValueError(
      f"keep_best needs evaluations along the way, and eval_every={config.eval_every} gives none "
      f"before steps={config.steps}: set eval_every above 0 and below steps, or keep_best=''"
    )


def batch(config, mesh):
  """Raises ValueError if devices, micro-batches or SIGReg groups do not go with the batch."""
  accumulate = config.accumulate or 1  # what is left to the memory must do as one, too
  micro, rest = divmod(config.batch_size, accumulate)
  if rest:
    raise ValueError(
      f"accumulate={accumulate} does not divide batch_size={config.batch_size}; choose a "
      "divisor"
    )
  if micro < 2:
    raise ValueError(
      f"batch_size={config.batch_size} / accumulate={accumulate} leaves one row, from which "
      "BatchNorm takes all that it has: nothing would be learnt. Use at least 2 rows, and far more "
      "for SIGReg: raise batch_size or lower accumulate"
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
  if config.objective.name.startswith("levljepa") and group and micro % group:
    raise ValueError(
      f"objective.group_size={group} does not divide the {micro} rows that SIGReg sees "
      f"(batch_size={config.batch_size} / accumulate={accumulate}); choose a divisor, or 0 "
      "for one group of all rows"
    )


def objective(config):
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
  counts = {"blur_prob": 3, "solarise_prob": 3, "jitter": 4, "crop_scale": 2, "local_scale": 2}
  for key, count in counts.items():
    if len(data[key]) != count:
      raise ValueError(f"data.{key} must have {count} values, got {tuple(data[key])}")
  for key in ("crop_scale", "local_scale"):
    if data[key][0] > data[key][1]:
      raise ValueError(f"data.{key} must be the least and the most, got {tuple(data[key])}")
  if plus and data.local_views and data.local_size % patch:
    raise ValueError(
      f"model.patch_size={patch} does not divide data.local_size={data.local_size}; use a multiple "
      f"of {patch}, for example {max(data.local_size // patch, 1) * patch}"
    )


def images(config):
  """Raises ValueError if `low_res` or `patch_dropout` do not go with the images of training."""
  data, model = config.data, config.model
  sides = transforms.view_sides(data, model.image_size) or (model.image_size,)
  if data.low_res:
    sides += (_low_res(config),)
  for side in set(sides):
    kept_patches((side // model.patch_size) ** 2, model.patch_dropout)


def _low_res(config):
  value, model = tuple(config.data.low_res), config.model
  said = f"data.low_res={value}"
  if len(value) != 2 or not all(isinstance(n, int) for n in value):
    raise ValueError(f"{said} must be (pixels, steps), or () for images of one size")
  side, steps = value
  if config.data.augment == "dino":
    raise ValueError(
      f"{said} makes a single image smaller, and data.augment='dino' has views of two sizes: leave "
      "it at (), or lower model.image_size"
    )
  if side % model.patch_size or not 0 < side < model.image_size:
    raise ValueError(
      f"{said}: the side must be a multiple of model.patch_size={model.patch_size} below "
      f"model.image_size={model.image_size}"
    )
  if not 0 < steps < config.steps:
    raise ValueError(
      f"{said} leaves none of steps={config.steps} to one of the two sizes; use more than 0 and "
      f"fewer than {config.steps}"
    )
  return side


def online_probe(config, source):
  """Raises ValueError if an online probe has too few classes or no record that has one."""
  label, classes = config.probe.label, config.probe.classes
  if not label:
    return
  if classes < 2:
    raise ValueError(f"probe.classes={classes}: a probe of {label!r} needs at least 2 classes")
  if source is None:  # compiled for devices that are not there
    return
  found = list(common.sample(source))
  if not any(type(record.get(label)) is int for record in found):
    fields = sorted({k for record in found for k, v in record.items() if type(v) is int})
    raise ValueError(
      f"probe.label={label!r}: none of {len(found)} records looked at has such a whole number; "
      f"those that they have are {', '.join(fields) or 'none'}"
    )


def packing(config, mesh):
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


def flat(tree, prefix=""):
  """{"model": {"size": "tiny"}} -> {"model.size": "tiny"}."""
  items = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      items |= flat(value, f"{prefix}{key}.")
    else:
      items[prefix + key] = value
  return items


def evaluation(meta, run):
  """As `resume`, where the variables alone are read and nothing is trained."""
  free = ("model.statistics", "text.readout", "objective.name", "optim.name", "data.source")
  resume(meta, run, [k for k in FIXED_KEYS if k not in free], parts=checkpoint.VARIABLES)


def resume(meta, run, fixed_keys=FIXED_KEYS, parts=("",)):
  """Refuses a checkpoint of another architecture or data set; says what else has changed.

  parts: what the names of the arrays that are read begin with.

  Raises:
    ValueError: naming each difference.
  """
  old, new = flat(meta["config"]), flat(run.meta["config"])
  changed = {k: (old.get(k), new.get(k)) for k in old | new if old.get(k) != new.get(k)}
  if new["model.remat"] == "auto":  # not asked for yet: nothing is trained
    changed.pop("model.remat", None)
  fixed = [k for k in fixed_keys if k in changed]
  refused = [f"{k}: {changed[k][0]} there, {changed[k][1]} here" for k in fixed]
  for what in ("data_identity", "tokenizer_identity"):
    if meta[what] != run.meta[what] and run.meta[what]:
      refused.append(f"{what.replace('_', ' ')}: {meta[what]} there, {run.meta[what]} here")
  if not refused:
    refused = _different_arrays(meta["arrays"], run.meta["arrays"], parts)
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


def _different_arrays(there, here, parts):
  # What the keys above do not explain, such as another version of an optimizer.
  names = [k for k in there | here if k.startswith(parts) and there.get(k) != here.get(k)]
  return [f"array {k}: {there.get(k)} there, {here.get(k)} here" for k in names[:10]]
