"""The loop, in order: build, restore, then [evaluate, save, take the batch, step, log]*."""

import base64
import dataclasses
import functools
import itertools
import json
import logging
import math
import os
import signal
import time
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jepa_vl import checkpoint, evals, metrics, objectives, optim, sharding
from jepa_vl import state as state_lib
from jepa_vl import step as step_lib
from jepa_vl.data import pipeline, sources
from jepa_vl.data import tokenizer as tokenizer_lib
from jepa_vl.evals import common, report
from jepa_vl.model import two_tower

log = logging.getLogger(__name__)

PREEMPTED = 75  # exit code: saved, start me again

# A checkpoint opens only under the same values of these; other changes are allowed and said.
FIXED_KEYS = (
  *(f"model.{k}" for k in ("size", "image_size", "patch_size", "statistics", "embed_dim")),
  *(f"model.{k}" for k in ("hidden_dim", "predictor_depth")),
  *("text.length", "text.readout", "optim.name", "data.source"),
)


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
      }
    )

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


def build(config, *, with_data=True):
  """Run from the config; raises ValueError or FileNotFoundError in words on bad input.

  `with_data=False` leaves the training data alone, which an evaluation may not have at hand.
  """
  evals.check(config.evals)
  mesh = sharding.make_mesh(**config.mesh)
  check_batch(config, mesh)
  objective = objectives.from_config(config.objective)
  tx = optim.make_optimizer(config.optim, config.steps)
  data = config.data
  source = sources.open_source(data.source, data.path, data.split) if with_data else None
  tokenizer = tokenizer_lib.load(config.text.tokenizer)
  model = two_tower.from_config(
    config.model, config.text, vocab_size=tokenizer.vocab_size, dtype=compute_dtype(config.model)
  )
  abstract_state = state_lib.abstract_state(model, tx, mesh)
  train_step = step_lib.make_train_step(
    model, objective, tx, seed=config.seed, accumulate=config.accumulate, log_every=config.log_every
  )
  jitted = step_lib.jit_train_step(train_step, abstract_state, mesh)
  return Run(config, mesh, source, tokenizer, model, tx, abstract_state, jitted)


def check_batch(config, mesh):
  """Raises ValueError if devices, micro-batches or SIGReg groups do not divide the batch."""
  micro, rest = divmod(config.batch_size, config.accumulate)
  if rest:
    raise ValueError(
      f"accumulate={config.accumulate} does not divide batch_size={config.batch_size}"
    )
  shards = sharding.batch_shards(mesh)
  if micro % shards:
    unit = shards * config.accumulate
    raise ValueError(
      f"batch_size={config.batch_size} / accumulate={config.accumulate} = {micro} rows cannot be "
      f"split over mesh.data x mesh.fsdp = {shards} devices; use a multiple of {unit}, for example "
      f"{max(config.batch_size // unit, 1) * unit}"
    )
  group = config.objective.group_size
  if group and micro % group:
    raise ValueError(
      f"objective.group_size={group} does not divide the {micro} rows that SIGReg sees "
      f"(batch_size={config.batch_size} / accumulate={config.accumulate}); choose a divisor, or 0 "
      "for one group of all rows"
    )


def compute_dtype(cfg):
  """The towers' computation type: bfloat16 on accelerators and float32 on a CPU for "auto"."""
  dtypes = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
  dtypes["auto"] = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  if cfg.dtype not in dtypes:
    raise ValueError(f"model.dtype must be one of {', '.join(dtypes)}, got {cfg.dtype!r}")
  return dtypes[cfg.dtype]


def train(config, workdir):
  """Trains, or goes on with what the workdir holds. Returns the process's exit code."""
  run = build(config)
  workdir = prepare_workdir(workdir)
  checkpoints = checkpoint.Checkpoints(
    os.path.join(workdir, "checkpoints"), keep=config.keep_checkpoints
  )
  restored = checkpoints.restore(run.abstract_state, check=lambda meta: check_resume(meta, run))
  if restored:
    start, state = restored
    log.info("resuming from %s", checkpoints.path(start))
    if start > config.steps:
      raise ValueError(
        f"{checkpoints.path(start)} is past steps={config.steps}; raise the key, or use another "
        "--workdir"
      )
  else:
    start, state = 0, state_lib.init_state(run.model, run.tx, run.mesh, config.seed)
  if jax.process_index() == 0:
    with open(os.path.join(workdir, "config.json"), "w") as f:
      f.write(config.to_json_best_effort(indent=2) + "\n")
  describe(run, start)

  writer = metrics.Writer(workdir, resumed_step=start, wandb=config.wandb)
  try:
    return _loop(run, workdir, start, state, checkpoints, writer)
  finally:
    writer.close()
    checkpoints.close()


def _loop(run, workdir, start, state, checkpoints, writer):
  config = run.config
  encode = make_encode(run)
  data = pipeline.batches(
    run.source, run.tokenizer, run.data_config, batch_size=config.batch_size, seed=config.seed,
    start_step=start, process=jax.process_index(), processes=jax.process_count(),
  )  # fmt: skip
  if config.data.workers and start < config.steps:
    data = _start_workers(data)
  counters = DataCounters(config.data.max_bad_fraction)
  flops = 3 * two_tower.forward_flops(run.model)
  meter = metrics.Meter(config.batch_size, flops, list(run.mesh.devices.flat))
  steps = StepLog(config, writer, meter, checkpoints, start)
  due = lambda every, step: every and step % every == 0 and step > start
  with metrics.Progress(config.steps, start) as progress, StopSignal() as stop:
    # This order is a contract: a checkpoint holds the state before step `step` is taken, and
    # the data position is that number, so a resumed run takes exactly the batch that is next.
    for step in range(start, config.steps + 1):
      last = step == config.steps
      stopping = stop.requested
      evaluating = due(config.eval_every, step) and not last
      saving = stopping or last or due(config.checkpoint_every, step)
      if evaluating or saving:
        steps.flush(progress)  # a state that is not finite stops here, before it is saved
      pause = time.perf_counter()
      if evaluating:
        evaluate(run, encode, state.variables, step, writer)
      if saving:
        checkpoints.save(step, state, run.meta)
      meter.pause(time.perf_counter() - pause)
      if last or stopping:
        break

      wait = time.perf_counter()
      batch = next(data)
      # Time in next(data) costs nothing while the device is still busy with the step before.
      meter.step(time.perf_counter() - wait if steps.device_idle() else 0.0)
      counters.add(batch)
      rows = sharding.put_batch({k: batch[k] for k in pipeline.MODEL_KEYS}, run.mesh)
      with sharding.use_mesh(run.mesh):
        state, values = run.train_step(state, rows)
      steps.flush(progress)  # the step before, while this one runs
      steps.push(step + 1, values, counters)

  checkpoints.wait()  # before the final evaluation, which may be long
  if step < config.steps:
    path = checkpoints.path(step)
    log.info("stopped by %s; saved %s. The same command goes on from it", stop.name, path)
    return PREEMPTED
  finish(run, encode, state, step, writer, workdir)
  return 0


def _start_workers(data):
  # A terminal sends Ctrl-C to every process. The workers, started by the first batch, inherit that
  # it is ignored, so that they still serve the loop, which alone answers it.
  before = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    first = next(data)
  finally:
    signal.signal(signal.SIGINT, before)
  return itertools.chain([first], data)


class StepLog:
  """Fetches a step's metrics while the next one runs, checks them, writes every `log_every`th."""

  def __init__(self, config, writer, meter, checkpoints, start):
    self._config, self._writer, self._meter = config, writer, meter
    self._checkpoints, self._pending, self._warned = checkpoints, None, set()
    self._schedule = optim.make_schedule(config.optim, config.steps)
    self._start = start

  def push(self, step, values, counters):
    self._pending = step, values, counters.read()

  def device_idle(self):
    """Whether the last step has already finished."""
    return not self._pending or self._pending[1]["loss"].is_ready()

  def flush(self, progress):
    """Raises FloatingPointError if the pending step was not finite."""
    if not self._pending:
      return
    (step, values, counts), self._pending = self._pending, None
    values = {k: float(v) for k, v in jax.device_get(values).items()}
    self._check_finite(step, values)
    progress.step(step, values["loss"])
    if step == self._start + 1:
      self._meter.read()  # the first step's time is compilation
    if step % self._config.log_every:
      return
    rates = self._meter.read()
    values |= {"lr": float(self._schedule(step - 1)), **rates, **counts}
    self._writer.metrics(step, values)
    progress.log(step, values)
    if step > optim.warmup_steps(self._config.optim, self._config.steps):
      rows = self._config.batch_size // self._config.accumulate
      self._warn("collapse", metrics.collapse_warning(values, self._config.model.embed_dim, rows))
    if rates["data_wait"] > 0.1:
      self._warn(
        "data",
        f"{rates['data_wait']:.0%} of the time is spent waiting for data; raise data.workers (now "
        f"{self._config.data.workers}), or store smaller images",
      )

  def _warn(self, kind, text):
    if text and kind not in self._warned:
      self._warned.add(kind)
      log.warning("%s", text)

  def _check_finite(self, step, values):
    bad = [k for k, v in values.items() if not math.isfinite(v)]
    if not bad:
      return
    self._checkpoints.wait()
    last = self._checkpoints.latest
    good = self._checkpoints.path(last) if last is not None else "none was saved yet"
    raise FloatingPointError(
      f"step {step}: {', '.join(bad)} not finite. Last good checkpoint: {good}. Lower optim.lr "
      f"(now {self._config.optim.lr:g}) or lengthen optim.warmup, and start again to go on from it"
    )


class DataCounters:
  """Counts what the pipeline replaced or cut, and ends the run when it is too much."""

  def __init__(self, max_bad_fraction):
    self._max, self._rows, self._bad, self._truncated = max_bad_fraction, 0, 0, 0
    self._seen = set()

  def add(self, batch):
    """Raises ValueError when more than data.max_bad_fraction of the rows were unreadable."""
    bad = batch["bad"][batch["bad"] >= 0]
    self._rows += len(batch["bad"])
    self._bad += len(bad)
    self._truncated += int(batch["truncated"].sum())
    for index in sorted(set(bad.tolist()) - self._seen)[:10]:
      log.warning("data: record %d cannot be used; the next readable one stands in", index)
    self._seen.update(bad.tolist())
    if self._bad > max(self._max * self._rows, 10):
      raise ValueError(
        f"{self._bad} of {self._rows} training records could not be used, more than "
        f"data.max_bad_fraction={self._max} allows; indices {sorted(self._seen)[:10]} ... Repair "
        "the data, or raise the key"
      )

  def read(self):
    return {"data/bad_records": self._bad, "data/truncated_captions": self._truncated}


class StopSignal:
  """Turns SIGTERM and the first Ctrl-C into a request; a second Ctrl-C interrupts at once."""

  def __init__(self):
    self.requested, self.name, self._before = False, "", {}

  def __enter__(self):
    for number in (signal.SIGTERM, signal.SIGINT):
      self._before[number] = signal.signal(number, self._request)
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _request(self, number, _):
    if self.requested and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.requested, self.name = True, signal.Signals(number).name


def prepare_workdir(workdir):
  """Makes the folder. Raises ValueError if it cannot be written."""
  workdir = os.path.abspath(os.path.expanduser(workdir))
  try:
    os.makedirs(workdir, exist_ok=True)
    probe = os.path.join(workdir, ".writable")
    with open(probe, "w"):
      pass
    os.remove(probe)
  except OSError as e:
    raise ValueError(
      f"--workdir={workdir} cannot be written ({e.strerror}); give a folder that you may write to"
    ) from e
  return workdir


def flat(tree, prefix=""):
  """{"model": {"size": "tiny"}} -> {"model.size": "tiny"}."""
  items = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      items |= flat(value, f"{prefix}{key}.")
    else:
      items[prefix + key] = value
  return items


def check_resume(meta, run):
  """Refuses a checkpoint of another architecture or data set; says what else has changed.

  Raises:
    ValueError: naming each difference.
  """
  old, new = flat(meta["config"]), flat(run.meta["config"])
  changed = {k: (old.get(k), new.get(k)) for k in old | new if old.get(k) != new.get(k)}
  fixed = [k for k in FIXED_KEYS if k in changed]
  refused = [f"{k}: {changed[k][0]} there, {changed[k][1]} here" for k in fixed]
  for what in ("data_identity", "tokenizer_identity"):
    if meta[what] != run.meta[what] and run.meta[what]:
      refused.append(f"{what.replace('_', ' ')}: {meta[what]} there, {run.meta[what]} here")
  refused += _different_arrays(meta["arrays"], run.meta["arrays"]) if not refused else []
  if refused:
    raise ValueError(
      "the checkpoint is of another run:\n  " + "\n  ".join(refused) + "\n"
      "Use the same values, or another --workdir"
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
  """The start-up lines: devices, model, data."""
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
    two_tower.forward_flops(run.model) / 1e9,
  )  # fmt: skip
  log.info(
    "data: %s %s; batch %d, steps %d to %d (%.1f epochs)",
    config.data.source, run.source.identity, config.batch_size, start, config.steps,
    (config.steps - start) * config.batch_size / len(run.source),
  )  # fmt: skip
  for name in sharding.undivided(run.abstract_state.params, run.mesh):
    log.warning("replicated, because it does not divide: %s", name)


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
  )


def evaluate(run, encode, variables, step, writer):
  """Runs the configured evaluations and writes them -> {name: metrics}."""
  results = evals.run_all(encode, variables, run.mesh, run.config.evals)
  for name, values in results.items():
    writer.evaluation(step, name, values)
  return results


def finish(run, encode, state, step, writer, workdir):
  """Final evaluation beside its floors: the printed table, results.json and report.html."""
  if not run.config.evals:
    log.info("done at step %d; no evaluations are configured", step)
    return
  variables = state.variables
  trained = evaluate(run, encode, variables, step, writer)
  pictures = evals.pictures(encode, variables, run.config.evals)
  untrained = state_lib.init_variables(run.model, run.mesh, run.config.seed)
  table = evals.table(trained, evals.run_all(encode, untrained, run.mesh, run.config.evals))
  if jax.process_index():
    return
  with open(os.path.join(workdir, "results.json"), "w") as f:
    json.dump({"step": step, "seed": run.config.seed, "rows": table}, f, indent=1)
  path = report.write(workdir, config=run.meta["config"], results=table, **pictures)
  print(evals.format_table(table))
  log.info("all figures: %s; report: %s", os.path.join(workdir, "results.json"), path)


def evaluate_checkpoint(config, path):
  """--mode=eval: the configured evaluations on one checkpoint, printed beside their floors."""
  run = build(config, with_data=False)
  state = checkpoint.read(path, run.abstract_state, check=lambda meta: check_resume(meta, run))
  encode = make_encode(run)
  trained = evals.run_all(encode, state.variables, run.mesh, config.evals)
  untrained = state_lib.init_variables(run.model, run.mesh, config.seed)
  floors = evals.run_all(encode, untrained, run.mesh, config.evals)
  print(evals.format_table(evals.table(trained, floors)))
  return 0
