"""Checkpoints by orbax: asynchronous, atomic, with what is needed to open them kept inside."""

import logging
import os
import shutil

import jax
import orbax.checkpoint as ocp


log = logging.getLogger(__name__)


class Checkpoints:
  """The checkpoints of one workdir, `workdir/checkpoints/STEP`.

  Each holds `state` (sharded arrays) and `meta` (JSON: config, tokenizer, dataset identity). A
  save is written to a temporary name and renamed when whole, in the background.
  """

  def __init__(self, directory, *, keep):
    self._directory = os.path.abspath(directory)
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    self._manager = ocp.CheckpointManager(self._directory, options=options)

  @property
  def latest(self):
    """Step of the newest checkpoint, or None."""
    return self._manager.latest_step()

  def path(self, step):
    """Folder of one checkpoint."""
    return os.path.join(self._directory, str(step))

  def save(self, step, state, meta):
    """Starts saving `state` as of `step`; waits only for the save before. A step is saved once."""
    if step == self.latest:
      return
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
    self._manager.save(step, args=items)

  def restore(self, abstract_state, check):
    """The newest whole checkpoint as (step, state), or None if there is none.

    `check(meta)` may refuse (raise) before any array is read. A checkpoint that cannot be read is
    set aside as `STEP.damaged`, said, and the one before is taken.

    Raises:
      ValueError: from `check`, or every checkpoint is damaged.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    for step in steps:
      try:
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        meta = meta["meta"]
      except Exception as e:  # tensorstore, orbax and json each raise their own
        self._set_aside(step, e)
        continue
      check(meta)
      try:
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        return step, self._manager.restore(step, args=args)["state"]
      except Exception as e:
        self._set_aside(step, e)
    if steps:
      raise ValueError(
        f"none of the {len(steps)} checkpoints in {self._directory} can be read; they are kept as "
        "STEP.damaged there. Restore a copy of one, or start again in an empty --workdir"
      )
    return None

  def _set_aside(self, step, error):
    aside = self.path(step) + ".damaged"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    log.warning(
      "checkpoint %s cannot be read (%s); set aside as %s, taking the one before",
      self.path(step), reason[:200], aside,
    )  # fmt: skip
    if jax.process_index() == 0:
      shutil.rmtree(aside, ignore_errors=True)
      os.rename(self.path(step), aside)
    self._manager.reload()

  def wait(self):
    """Returns when the save in flight, if any, is on disk."""
    self._manager.wait_until_finished()

  def close(self):
    self.wait()
    self._manager.close()


def read_meta(path):
  """The `meta` of one checkpoint folder, as saved.

  Raises:
    ValueError: the folder holds no readable checkpoint.
  """
  try:
    with ocp.CheckpointManager(os.path.dirname(os.path.abspath(path))) as manager:
      step = int(os.path.basename(os.path.normpath(path)))
      args = ocp.args.Composite(meta=ocp.args.JsonRestore())
      return manager.restore(step, args=args)["meta"]
  except Exception as e:
    raise ValueError(
      f"{path} is no readable checkpoint; give --checkpoint=WORKDIR/checkpoints/STEP"
    ) from e


def read_state(path, abstract_state):
  """The state of one checkpoint folder, placed as `abstract_state` says.

  Raises:
    ValueError: the folder holds no readable checkpoint of that shape.
  """
  try:
    with ocp.CheckpointManager(os.path.dirname(os.path.abspath(path))) as manager:
      step = int(os.path.basename(os.path.normpath(path)))
      args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
      return manager.restore(step, args=args)["state"]
  except Exception as e:
    raise ValueError(f"the arrays of {path} cannot be read: {str(e).splitlines()[0]}") from e
