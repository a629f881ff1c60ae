"""The loop, in order: build, restore, then [save, evaluate, take the batch, step, log]*."""

import concurrent.futures
import contextlib
import functools
import logging
import math
import os
import time

import jax
import numpy as np

from jepa_vl import checkpoint, checks, distributed, evals, interop, metrics, optim, sharding
from jepa_vl import state as state_lib
from jepa_vl.build import build, describe, make_encode
from jepa_vl.checks import flat
from jepa_vl.data import feed, pipeline
from jepa_vl.data.counters import DataCounters
from jepa_vl.evals import report
from jepa_vl.stop import PREEMPTED, Stopped, StopSignal
from jepa_vl.workdir import FEATURES, Workdir

log = logging.getLogger(__name__)


def train(config, workdir, watch=None):
  """Trains, or goes on with what the workdir holds. Returns the process's exit code.

  watch: the distributed.Watch of several processes.

  Raises:
    Stopped: SIGTERM came before the loop, or in the final evaluation.
  """
  with StopSignal(at_once=True):
    return _train(config, workdir, watch)


def _train(config, workdir, watch):
  run = build_alike(config, watch)
  workdir = Workdir(workdir)
  checkpoints = checkpoint.Checkpoints(
    workdir.checkpoints, keep=config.keep_checkpoints, every=config.keep_every,
    best=config.keep_best,
  )  # fmt: skip
  restored = checkpoints.restore(run.abstract_state, check=lambda meta: checks.resume(meta, run))
  if restored:
    start, state = restored
    log.info("resuming from %s", checkpoints.path(start))
    if start > config.steps:
      raise ValueError(
        f"{checkpoints.path(start)} is past steps={config.steps}; raise the key, or use another "
        "--workdir"
      )
  else:
    start, state = 0, state_lib.init_state(
      run.model, run.tx, run.mesh, config.seed, run.probe, config.optim.sharded
    )
    if config.init_from:
      state = initialise_from(run, state)
  if jax.process_index() == 0:
    with open(os.path.join(workdir.local, "config.json"), "w") as f:
      f.write(config.to_json_best_effort(indent=2) + "\n")
  describe(run, start)

  writer = metrics.Writer(workdir.local, resumed_step=start, wandb=config.wandb)
  closing = contextlib.closing
  with closing(workdir), closing(checkpoints), closing(writer):
    return _loop(run, workdir, start, state, checkpoints, writer)


def build_alike(config, watch, **kwargs):
  """`build`; raises ValueError if another process was started otherwise, or has other data."""
  if watch:  # first, for what is built may ask all processes
    watch.check_same("config", flat(config.to_dict()) | distributed.versions())
  run = build(config, **kwargs)
  if watch:
    identities = ("data_identity", "tokenizer_identity")
    watch.check_same("data", {k: run.meta[k] for k in identities})
  return run


def initialise_from(run, state):
  """The state with the weights of `init_from` in place of its own; says what is whose.

  Raises:
    ValueError, FileNotFoundError: as `interop.read` and `interop.fit`, or a text tower of another
      tokenizer.
  """
  return state.replace(**weights_of(run, run.config.init_from, state.variables))


def weights_of(run, spec, own):
  """The variables `own` with those of the files `spec` in their place, as initialise_from."""
  variables, left_out, left_alone = interop.fit(interop.read(spec), own)
  read = [x for x in jax.tree.leaves(variables) if isinstance(x, np.ndarray)]
  if len(set(distributed.exchange(checkpoint.fingerprint(read)))) > 1:
    raise ValueError(f"{spec} is not the same in every process; give all one copy")
  put = lambda x, like: like if x is like else jax.make_array_from_callback(
    like.shape, like.sharding, lambda index: x[index]
  )  # fmt: skip
  variables = jax.tree.map(put, variables, own)
  loaded = sorted(set(variables["params"]) - set(left_alone))
  for path in interop.paths(spec):
    _check_origin(path, interop.describe(path), run, "text" in loaded)
  log.info("weights: %s of %s", ", ".join(loaded), spec)
  if left_alone:
    log.info("weights: not in the files, newly initialised: %s", ", ".join(left_alone))
  if left_out:
    log.info("weights: in the files, not in this model: %s", ", ".join(left_out))
  return variables


def _check_origin(path, described, run, with_text):
  """Whether weights of ours meant the same by tokens and pixels; other files do not say."""
  if not described:
    return
  if with_text and described.tokenizer_identity not in (None, run.tokenizer.identity):
    raise ValueError(
      f"the text tower of {path} was trained with the tokenizer "
      f"{described.tokenizer_identity}, and text.tokenizer is {run.tokenizer.identity}: its token "
      "embeddings would stand for other words. Give that tokenizer, or the image tower alone"
    )
  there, here = flat(described.config), flat(run.config.to_dict())
  for key in ("model.statistics", "text.readout"):
    if there.get(key, here[key]) != here[key]:
      log.warning("%s was trained with %s=%s, not %s", path, key, there[key], here[key])


def _loop(run, workdir, start, state, checkpoints, writer):
  config = run.config
  encode = make_encode(run)
  evals.prepare(encode, config.evals)
  board = feed.Board()
  parts, count = sharding.row_parts(run.mesh)
  batches = pipeline.batches(
    run.source, run.tokenizer, run.data_config, batch_size=config.batch_size, seed=config.seed,
    start_step=start, parts=parts, count=count, board=board,
  )  # fmt: skip
  counters = DataCounters(run.source, config.data.max_bad_fraction)
  meter = metrics.Meter(config.batch_size, run.flops_at, list(run.mesh.devices.flat))
  steps = StepLog(config, writer, meter, checkpoints, start, board)
  agreed, several = distributed.Consensus(run.mesh), jax.process_count() > 1
  due = lambda every, step: every and step % every == 0 and step > start
  with (
    metrics.Progress(config.steps, start) as progress,
    StopSignal() as stop,
    feed.Feed(
      batches, functools.partial(put_rows, mesh=run.mesh), board=board, where=run.source.where,
      # Several processes have not agreed to stop: a batch that fails is an error there.
      stopping=lambda: stop.requested and not several, timeout=config.data.timeout,
    ) as data,
  ):  # fmt: skip
    if start < config.steps:
      data.start(config.data.workers)
    # This order is a contract: a checkpoint holds the state before step `step` is taken, and
    # the data position is that number, so a resumed run takes exactly the batch that is next.
    for step in range(start, config.steps + 1):
      last = step == config.steps
      stopping = agreed(stop.requested)
      evaluating = due(config.eval_every, step) and not last and not stopping
      ranked = evaluating and bool(config.keep_best)
      saving = stopping or last or due(config.checkpoint_every, step)
      if evaluating or saving:
        steps.flush(progress)  # a state that is not finite stops here, before it is saved
      pause = time.perf_counter()
      # An evaluation may fail, or be cut short; what it is kept by is known only after it.
      if saving and not ranked:
        checkpoints.save(step, state, run.meta)
      results = evaluate(run, encode, state.variables, step, writer) if evaluating else {}
      if ranked:
        checkpoints.save(step, state, run.meta, evals.figures(results))
      if evaluating or saving:
        workdir.push(must=False)
      meter.pause(time.perf_counter() - pause)
      if last or stopping:
        break

      asked = time.perf_counter()
      try:
        rows, failure = take(data, counters), None
      except Exception as e:
        rows, failure = None, e
      if rows is None:  # the pipeline failed, or a stop was asked for while no batch came
        # Of several processes the others may be a step further.
        if not failure or (step > start and not several):
          steps.flush(progress)
          checkpoints.save(step, state, run.meta)
        if failure and several and stop.requested:  # what stopped us stopped our workers, too
          raise Stopped(f"stopped by {stop.name}, without a further save ({failure})") from failure
        if failure:
          raise failure
        break
      # Time in data.next() costs nothing while the device is still busy with the step before.
      waited = time.perf_counter() - max(asked, steps.idle_since())
      with jax.set_mesh(run.mesh):
        state, values = run.train_step(state, rows)
      steps.flush(progress)  # the step before, while this one runs
      steps.push(step + 1, values, counters, waited)

  checkpoints.wait()
  # Also one asked for during the last step or its save: the final evaluation may be long.
  if step < config.steps or any(distributed.exchange(stop.requested)):
    path = checkpoints.path(step)
    who = stop.name or "another process"
    log.info("stopped by %s; saved %s. The same command goes on from it", who, path)
    return PREEMPTED
  finish(run, encode, state.variables, step, writer, workdir)
  return 0


def take(data, counters):
  """The next batch's rows on the devices, counted, or None if a stop was asked for meanwhile."""
  found = data.next()
  if found is None:
    return None
  batch, rows = found
  counters.add(batch)
  return rows


def put_rows(batch, mesh):
  """What the model needs of a batch, on the devices."""
  return sharding.put_batch({k: batch[k] for k in pipeline.MODEL_KEYS if k in batch}, mesh)


class StepLog:
  """Fetches a step's metrics while the next one runs, checks them, writes every `log_every`th."""

  def __init__(self, config, writer, meter, checkpoints, start, board):
    self._board = board
    self._config, self._writer, self._meter = config, writer, meter
    self._checkpoints, self._pending, self._warned = checkpoints, None, set()
    self._schedule = optim.make_schedule(config.optim, config.steps)
    self._compiled = {start, *config.data.low_res[1:]}  # steps whose program is not there yet
    self._finished = None  # when the pending step was
    self._watcher = concurrent.futures.ThreadPoolExecutor(1)

  def push(self, step, values, counters, waited):
    """Takes the metrics of a step that may still run; it `waited` (s) for its batch."""
    self._pending = step, values, counters.read(), max(waited, 0.0)
    self._finished = self._watcher.submit(_when_ready, values["loss"])

  def idle_since(self):
    """Clock time at which the device finished the last step; infinity if it has not."""
    if not self._pending:
      return 0.0
    return self._finished.result() if self._finished.done() else math.inf

  def flush(self, progress):
    """Raises FloatingPointError if the pending step was not finite."""
    if not self._pending:
      return
    (step, values, counts, waited), self._pending = self._pending, None
    logged = step % self._config.log_every == 0
    take = lambda names: jax.tree.map(float, jax.device_get({k: values[k] for k in names}))
    # Between logged steps three scalars tell of every term and of the state.
    found = take(values if logged else ("loss", "grad_norm", "param_norm"))
    if not all(map(math.isfinite, found.values())):
      self._stop(step, [k for k, v in take(values).items() if not math.isfinite(v)])
    progress.step(step)
    self._meter.step(step - 1, waited)
    if not logged:
      if step - 1 in self._compiled:
        self._meter.read()  # its time is compilation
      return
    rates = self._meter.read()
    found |= {"lr": float(self._schedule(step - 1)), **rates, **counts}
    self._writer.metrics(step, found)
    progress.log(step, found)
    # The contrastive baselines spread matched from mismatched pairs in a narrow cone: no collapse.
    if "sigreg/img" in found and step > optim.warmup_steps(self._config.optim, self._config.steps):
      rows = self._config.batch_size // self._config.accumulate
      self._warn("collapse", metrics.collapse_warning(found, self._config.model.embed_dim, rows))
    if rates["data_wait"] > 0.1:
      self._warn("data", self._starved(rates["data_wait"]))

  def _starved(self, wait):
    shares = self._board.shares()
    what = ", ".join(f"{stage} {share:.0%}" for stage, share in shares.items())
    if shares.get("reading", 0) > 0.5:
      advice = "the disk or network is slow: copy the data nearer, or raise data.workers"
    else:
      advice = "raise data.workers, or store smaller images (python -m jepa_vl.data.prepare)"
    return (
      f"{wait:.0%} of the time is spent waiting for data ({what} of what the pipeline works); "
      f"{advice} (data.workers is {self._config.data.workers})"
    )

  def _warn(self, kind, text):
    if text and kind not in self._warned:
      self._warned.add(kind)
      log.warning("%s", text)

  def _stop(self, step, bad):
    self._checkpoints.wait()
    last = self._checkpoints.latest
    good, again = "none was saved yet", "start again"
    if last is not None:
      good, again = self._checkpoints.path(last), "start again to go on from it"
    raise FloatingPointError(
      f"step {step}: {', '.join(bad)} not finite. Last good checkpoint: {good}. Lower optim.lr "
      f"(now {self._config.optim.lr:g}) or lengthen optim.warmup, and {again}"
    )


def _when_ready(value):
  value.block_until_ready()
  return time.perf_counter()


def evaluate(run, encode, variables, step, writer, at_end=False):
  """Runs the configured evaluations and writes their figures -> {name: result}."""
  results = evals.run_all(encode, variables, run.mesh, run.config.evals, at_end)
  for name, values in evals.figures(results).items():
    writer.evaluation(step, name, values)
  return results


def finish(run, encode, variables, step, writer, workdir):
  """Final evaluation beside its floors: the printed table, results.json and report.html."""
  results = evaluate(run, encode, variables, step, writer, at_end=True)
  table = table_with_floors(run, encode, results)
  pictures = evals.pictures(encode, variables, run.config.evals)
  if jax.process_index():
    return
  evals.write(
    workdir.local, results, table, step=step, seed=run.config.seed, config=run.meta["config"]
  )
  if table:
    print(evals.format_table(table), flush=True)
  drawn = [detail for result in results.values() for detail in result["details"]]
  path = report.write(
    workdir.local, config=run.meta["config"], results=table, drawn=drawn, **pictures
  )
  at = lambda name: os.path.join(workdir.path, name)
  log.info("all figures: %s; report: %s", at("results.json"), at(os.path.basename(path)))


def table_with_floors(run, encode, trained):
  """Rows of `evals.table`: each figure beside a randomly initialised network's and its floors."""
  if not trained:
    return []
  untrained = state_lib.init_variables(run.model, run.mesh, run.config.seed)
  return evals.table(trained, evals.run_all(encode, untrained, run.mesh, run.config.evals))


UNTRAINED = "untrained"  # in place of a checkpoint


def evaluate_checkpoint(config, path, workdir, watch=None):
  """--mode=eval: the configured evaluations on one model, as at the end of training.

  path: a checkpoint of ours or its workdir, UNTRAINED, or weight files as `init_from` takes them.
  In the workdir, features are kept for the next evaluation of the same weights.
  """
  if not config.evals:
    raise ValueError("the config's `evals` are empty; configs/tiny.py shows how to name some")
  run = build_alike(config, watch, training=False)
  workdir = Workdir(workdir)
  variables, step = read_variables(run, path)
  encode = make_encode(run, cache=os.path.join(workdir.local, FEATURES))
  evals.prepare(encode, config.evals)
  writer = metrics.Writer(workdir.local, resumed_step=None)
  with contextlib.closing(workdir), contextlib.closing(writer):
    finish(run, encode, variables, step, writer, workdir)
  return 0


def read_variables(run, path):
  """(variables, step) of what --checkpoint names. Raises ValueError or FileNotFoundError."""
  if path == UNTRAINED:
    return state_lib.init_variables(run.model, run.mesh, run.config.seed), 0
  found = checkpoint.find(path)
  if not found:
    own = state_lib.init_variables(run.model, run.mesh, run.config.seed)
    return weights_of(run, path, own), 0
  check = lambda meta: checks.evaluation(meta, run)
  variables = checkpoint.read(found, run.abstract_state.variables, check)
  return variables, int(os.path.basename(found))
