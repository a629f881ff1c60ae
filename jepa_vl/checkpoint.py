"""Checkpoints by orbax: asynchronous, atomic, with what is needed to open them kept inside."""

import contextlib
import glob
import logging
import os

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

log = logging.getLogger(__name__)


class Damaged(Exception):
  """A checkpoint that cannot be read; the message says why."""


class Checkpoints:
  """The checkpoints of one workdir, `workdir/checkpoints/STEP`.

  Each holds `state` (sharded arrays) and `meta` (JSON: config, tokenizer, dataset identity). A
  save is written to a temporary name and renamed when whole, in the background.
  """

  def __init__(self, directory, *, keep):
    self._directory = os.path.abspath(directory)
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep, create=True, cleanup_tmp_directories=True
    )
    self._manager = ocp.CheckpointManager(self._directory, options=options)

  @property
  def latest(self):
    """Step of the newest checkpoint, or None."""
    return self._manager.latest_step()

  def path(self, step):
    """Folder of one checkpoint."""
    return os.path.join(self._directory, str(step))

  def save(self, step, state, meta):
    """Starts saving `state` as of `step`; waits only for the save before. A step is saved once.

    Raises:
      OSError: this save or the one before failed, for example for want of space.
    """
    if step == self.latest:
      return
    meta = {**meta, "fingerprint": fingerprint(state)}
    meta["variables_fingerprint"] = fingerprint(state.variables)
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
    with self._failure_in_words():
      self._manager.save(step, args=items)

  def restore(self, abstract_state, check):
    """The newest whole checkpoint as (step, state), or None if there is none.

    `check(meta)` may refuse (raise) before any array is read. A checkpoint that cannot be read is
    said, and the one before is taken; once that is open, the damaged one is set aside as
    `STEP.damaged`.

    Raises:
      ValueError: from `check`, or no checkpoint can be read; then nothing has been moved.
    """
    damaged = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        state = _read_step(self._manager, step, abstract_state, check)
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

  def _set_aside(self, damaged):
    for step, why in damaged.items():
      aside = self.path(step) + ".damaged"
      while os.path.exists(aside):
        aside += "_"
      log.warning(
        "checkpoint %s cannot be read (%s); set aside as %s, taking the one before",
        self.path(step), why, aside,
      )  # fmt: skip
      if jax.process_index() == 0:
        os.rename(self.path(step), aside)
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
      whole = sorted(int(name) for name in os.listdir(self._directory) if name.isdigit())
      good = f"The last good one is {self.path(whole[-1])}" if whole else "There is none yet"
      raise OSError(
        f"a checkpoint could not be saved in {self._directory} ({_first_line(e)}). {good}. Make "
        "room or lower keep_checkpoints, and start again to go on from it"
      ) from e

  def close(self):
    self.wait()
    self._manager.close()


VARIABLES = ("params", "batch_stats")  # the part of a state that a model takes


def find(path):
  """WORKDIR/checkpoints/STEP from itself or, the newest, from WORKDIR; None if it is neither."""
  path = os.path.abspath(os.path.expanduser(path))
  name = os.path.basename
  is_checkpoint = lambda p: name(p).isdigit() and os.path.isdir(os.path.join(p, "state"))
  if is_checkpoint(path):
    return path
  steps = glob.glob(os.path.join(glob.escape(path), "checkpoints", "*"))
  return max(filter(is_checkpoint, steps), key=lambda p: int(name(p)), default=None)


def read(path, abstract_variables, check):
  """The variables of one checkpoint, WORKDIR/checkpoints/STEP, after `check(meta)`.

  `abstract_variables`: ShapeDtypeStructs with shardings, or None for NumPy arrays as they were
  saved. The optimizer's state is not read.

  Raises:
    ValueError: from `check`, or the folder holds no readable checkpoint.
  """
  found = find(path)
  if not found:
    raise ValueError(f"{path} is no checkpoint folder; give WORKDIR/checkpoints/STEP")
  folder, step = os.path.split(found)
  with _reader(folder) as manager:
    try:
      meta = _read_meta(manager, int(step))
      check(meta)
      return _read_variables(manager, int(step), abstract_variables, meta)
    except Damaged as e:
      raise ValueError(f"{found} cannot be read: {e}") from e


def read_meta(path):
  """What the checkpoint at `path` holds beside its arrays. Raises ValueError as `read` does."""
  folder, step = os.path.split(find(path))
  with _reader(folder) as manager:
    try:
      return _read_meta(manager, int(step))
    except Damaged as e:
      raise ValueError(f"{path} cannot be read: {e}") from e


def _reader(folder):
  handlers = {"state": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
  options = ocp.CheckpointManagerOptions(read_only=True)
  return ocp.CheckpointManager(folder, options=options, item_handlers=handlers)


def _read_variables(manager, step, abstract_variables, meta):
  try:
    if abstract_variables is None:
      item = {k: manager.item_metadata(step)["state"][k] for k in VARIABLES}
      restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    else:
      item = abstract_variables
      restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
    variables = manager.restore(step, args=ocp.args.Composite(state=args))["state"]
  except Exception as e:  # tensorstore's and orbax's own
    raise Damaged(_first_line(e)) from e
  if "variables_fingerprint" not in meta:
    log.warning("this checkpoint is of an older version, without a checksum of its variables alone")
  elif fingerprint(variables) != meta["variables_fingerprint"]:
    raise Damaged("its arrays are not those that were saved (checksum differs)")
  return variables


def _read_meta(manager, step):
  try:
    return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
  except Exception as e:  # tensorstore, orbax and json each raise their own
    raise Damaged(_first_line(e)) from e


def _read_step(manager, step, abstract_state, check):
  """The state of one step; raises Damaged, or whatever `check(meta)` raises."""
  meta = _read_meta(manager, step)
  check(meta)
  try:
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
    state = manager.restore(step, args=args)["state"]
  except Exception as e:
    raise Damaged(_first_line(e)) from e
  if fingerprint(state) != meta.get("fingerprint"):
    raise Damaged("its arrays are not those that were saved (checksum differs)")
  return state


@jax.jit
def _sum_of_words(tree):
  unsigned = lambda x: jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
  words = [unsigned(x).astype(jnp.uint32) for x in jax.tree.leaves(tree)]
  return sum(jnp.sum(w, dtype=jnp.uint32) * jnp.uint32(2 * i + 1) for i, w in enumerate(words))


def fingerprint(state):
  """A number that changes with any bit of a tree of arrays; equal under every sharding.

  The storage format notices a truncated file but not a changed byte in an array.
  """
  return int(_sum_of_words(state))


def _first_line(error):
  return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
