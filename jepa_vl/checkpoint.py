"""Checkpoints by orbax: asynchronous, atomic, with what is needed to open them kept inside."""

import contextlib
import difflib
import logging
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as managers

from jepa_vl.distributed import exchange
from jepa_vl.workdir import resolve

log = logging.getLogger(__name__)


class Damaged(Exception):
  """A checkpoint that cannot be read; the message says why."""


class Checkpoints:
  """The checkpoints of one workdir, `workdir/checkpoints/STEP`, in a folder or at an address.

  Each holds `state` (sharded arrays), `meta` (JSON: config, tokenizer, dataset identity) and, where
  it was evaluated, `metrics`. A save is written to a temporary name and renamed when whole, in the
  background. Of several processes, all have to call every method.

  What stays: the newest `keep`; those whose step is a multiple of `every` (0: none); with `best`,
  the name of a figure as EVALUATION/KEY, the one whose figure is the highest, or the lowest for
  "-EVALUATION/KEY".
  """

  def __init__(self, directory, *, keep, every=0, best=""):
    self._directory, self._best = resolve(directory), best.removeprefix("-")
    figure = _figure(self._best, sign=-1 if best.startswith("-") else 1)
    policies = [managers.LatestN(keep)]
    if every:
      policies.append(managers.EveryNSteps(every))
    if best:
      policies.append(
        managers.BestN(get_metric_fn=figure, n=1, keep_checkpoints_without_metrics=False)
      )
    options = ocp.CheckpointManagerOptions(
      preservation_policy=managers.AnyPreservationPolicy(policies),
      best_fn=figure if best else None,  # without one, figures are not saved
      create=True, cleanup_tmp_directories=True,
    )  # fmt: skip
    self._manager = ocp.CheckpointManager(self._directory, options=options)

  @property
  def latest(self):
    """Step of the newest checkpoint, or None."""
    return self._manager.latest_step()

  def path(self, step):
    """Folder of one checkpoint."""
    return os.path.join(self._directory, str(step))

  def save(self, step, state, meta, evaluations=None):
    """Starts saving `state` as of `step`; waits only for the save before. A step is saved once.

    `evaluations`: {name: {key: figure}} of this very state, if it was evaluated.

    Raises:
      OSError: this save or the one before failed, for example for want of space.
      ValueError: the evaluations do not hold the figure by which the best is kept.
    """
    if step == self.latest:
      return
    sums = jax.device_get(_sums_of_words(state))
    meta = {**meta, "fingerprint": _weigh(sums), "variables_fingerprint": _weigh(sums.variables)}
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
    figures = {
      f"{name}/{key}": figure
      for name, values in (evaluations or {}).items()
      for key, figure in values.items()
    }
    with self._failure_in_words():
      self._manager.save(step, args=items, metrics=figures or None)
    if figures and self._best and self._best not in figures:  # what was trained is saved first
      near = difflib.get_close_matches(self._best, figures, n=3, cutoff=0.3)
      raise ValueError(
        f"keep_best={self._best!r} is no figure of the evaluations; near are {', '.join(near)} "
        "(evals.jsonl has all, as name and key). The same command with another goes on from here"
      )

  def restore(self, abstract_state, check):
    """The newest whole checkpoint as (step, state), or None if there is none.

    `check(meta)` may refuse (raise) before any array is read. A checkpoint that some process cannot
    read is said, and the one before is taken by all; once that is open, the damaged one is set
    aside as `STEP.damaged`.

    Raises:
      ValueError: from `check`, the processes see different checkpoints, or none can be read; then
        nothing has been moved.
    """
    damaged = {}
    for step in self._agreed_steps():
      try:
        try:
          state = _read_state(self.path(step), abstract_state, check)
        except Damaged:  # or a store that failed once
          state = _read_state(self.path(step), abstract_state, check)
      except Damaged as e:
        damaged[step] = e
        continue
      self._set_aside(damaged)
      return step, state
    if damaged:
      reasons = "\n".join(f"  {self.path(step)}: {why}" for step, why in damaged.items())
      raise ValueError(
        f"none of the {len(damaged)} checkpoints can be read:\n{reasons}\nIf the reason is not in "
        "the files (memory, permissions), mend it and start again; else bring back a copy of one, "
        "or use an empty --workdir"
      )
    return None

  def _agreed_steps(self):
    """The steps from the newest on. A process that saw others would wait for ever."""
    steps = sorted(self._manager.all_steps(), reverse=True)
    lists = exchange(" ".join(map(str, steps)))
    for i, there in enumerate(lists):
      if there != lists[0]:
        raise ValueError(
          f"{self._directory}: process 0 sees the checkpoints {lists[0] or 'none'}, process {i} "
          f"sees {there or 'none'}; is it one folder that all processes share?"
        )
    return steps

  def _set_aside(self, damaged):
    for step, why in damaged.items():
      path = self.path(step)
      log.warning("checkpoint %s cannot be read (%s); taking the one before", path, why)
      error = exchange("" if jax.process_index() else _move_aside(path))[0]
      if error:
        raise OSError(f"{path} is damaged and cannot be set aside ({error}); move it away")
    if damaged:
      self._manager.reload()

  def wait(self):
    """Returns when the save in flight, if any, is on disk. Raises OSError if it failed."""
    with self._failure_in_words():
      self._manager.wait_until_finished()

  @contextlib.contextmanager
  def _failure_in_words(self):
    try:
      yield
    except Exception as e:  # tensorstore's and orbax's own
      whole = find(os.path.dirname(self._directory))
      good = f"The last good one is {whole}" if whole else "There is none yet"
      raise OSError(
        f"a checkpoint could not be saved in {self._directory} ({_first_line(e)}). {good}. Make "
        "room or lower keep_checkpoints, and start again to go on from it"
      ) from e

  def close(self):
    """Waits for the save in flight; says which checkpoint is the best, if that was asked for."""
    self.wait()
    best = self._manager.best_step() if self._best else None
    if best is not None:
      log.info("the best checkpoint by keep_best=%s is %s", self._best, self.path(best))
    self._manager.close()


def _move_aside(path):
  """Renames the folder to PATH.damaged, or the like; returns what failed, "" if nothing did."""
  aside = epath.Path(path + ".damaged")
  try:
    while aside.exists():
      aside = epath.Path(f"{aside}_")
    epath.Path(path).rename(aside)
  except Exception as e:  # each store's package raises its own
    return _first_line(e)
  log.warning("%s is set aside as %s", path, aside)
  return ""


def _figure(name, sign):
  """The figure that orbax ranks by, from a checkpoint's `metrics`; the highest stays."""

  def rank(metrics):
    value = metrics.get(name)
    return -math.inf if value is None or math.isnan(value) else sign * value

  return rank


VARIABLES = ("params", "batch_stats")  # the part of a state that a model takes


def find(path):
  """WORKDIR/checkpoints/STEP from itself or, the newest, from WORKDIR; None if it is neither.

  Either may be an address, such as gs://bucket/run.
  """
  path = epath.Path(resolve(path))
  if _is_checkpoint(path):
    return str(path)
  folder = path / "checkpoints"
  steps = filter(_is_checkpoint, folder.iterdir() if folder.is_dir() else ())
  newest = max(steps, key=lambda p: int(p.name), default=None)
  return newest and str(newest)


def _is_checkpoint(path):
  # In a bucket a save that was cut short has its final name, and lacks a mark.
  is_step = path.name.isdigit() and (path / "state").is_dir()
  return is_step and ocp.utils.is_checkpoint_finalized(path)


def read(path, abstract_variables, check):
  """The variables of one checkpoint, WORKDIR/checkpoints/STEP, after `check(meta)`.

  `abstract_variables`: ShapeDtypeStructs with shardings, or None for NumPy arrays as they were
  saved. The optimizer's state is not read. Of several processes, all have to call it.

  Raises:
    ValueError: from `check`, or the folder holds no readable checkpoint.
  """
  found = find(path)
  if not found:
    raise ValueError(f"{path} is no checkpoint folder; give WORKDIR/checkpoints/STEP")
  try:
    meta = _together(lambda: _read_meta(found))
    if len(set(exchange((os.path.basename(found), meta.get("fingerprint"))))) > 1:
      raise ValueError(f"{path} is not the same checkpoint in every process; give STEP, or wait")
    check(meta)
    variables = _together(lambda: _read_variables(found, abstract_variables))
    if "variables_fingerprint" not in meta:
      log.warning(
        "this checkpoint is of an older version, without a checksum of its variables alone"
      )
    else:
      _together(lambda: _verify(variables, meta["variables_fingerprint"]))
  except Damaged as e:
    raise ValueError(f"{found} cannot be read: {e}") from e
  return variables


def read_meta(path):
  """What the checkpoint at `path` holds beside its arrays. Raises ValueError as `read` does."""
  try:
    return _read_meta(find(path))
  except Exception as e:
    raise ValueError(f"{path} cannot be read: {_first_line(e)}") from e


def _together(read):
  """`read()`, if no process's failed; else Damaged on all, that none waits for the others.

  Orbax's own managers wait for all processes after a read, also where one has failed.
  """
  try:
    value, error = read(), ""
  except Exception as e:  # tensorstore, orbax and json each raise their own
    value, error = None, _first_line(e)
  errors = exchange(error)
  if len(errors) > 1:
    errors = [error and f"process {i}: {error}" for i, error in enumerate(errors)]
  if any(errors):
    raise Damaged("; ".join(filter(None, errors)))
  return value


def _read_meta(path):
  return ocp.JsonCheckpointHandler().restore(epath.Path(path) / "meta")


def _read_state(path, abstract_state, check):
  """The state of one step; raises Damaged, or whatever `check(meta)` raises."""
  meta = _together(lambda: _read_meta(path))
  check(meta)
  args = ocp.args.StandardRestore(abstract_state)
  handler = ocp.StandardCheckpointHandler()
  state = _together(lambda: handler.restore(epath.Path(path) / "state", args=args))
  _together(lambda: _verify(state, meta.get("fingerprint")))
  return state


def _read_variables(path, abstract_variables):
  handler, folder = ocp.PyTreeCheckpointHandler(), epath.Path(path) / "state"
  if abstract_variables is None:
    item = {k: handler.metadata(folder)[k] for k in VARIABLES}
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
  else:
    item = abstract_variables
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
  args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
  return handler.restore(folder, args=args)


def _verify(tree, number):
  if fingerprint(tree) != number:
    raise Damaged("its arrays are not those that were saved (checksum differs)")


@jax.jit
def _sums_of_words(tree):
  unsigned = lambda x: jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
  return jax.tree.map(lambda x: jnp.sum(unsigned(x).astype(jnp.uint32), dtype=jnp.uint32), tree)


def _weigh(sums):
  """The fingerprint from the sums of its leaves: those of a part serve for the part's own."""
  return sum(int(s) * (2 * i + 1) for i, s in enumerate(jax.tree.leaves(sums))) % 2**32


def fingerprint(state):
  """A number that changes with any bit of a tree of arrays; equal under every sharding.

  The storage format notices a truncated file but not a changed byte in an array.
  """
  return _weigh(jax.device_get(_sums_of_words(state)))


def _first_line(error):
  return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
