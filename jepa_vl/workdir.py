"""Where a run's files lie: a folder, or an address such as gs://bucket/run."""

import logging
import os
import pathlib
import shutil
import tempfile

import jax
from etils import epath

from jepa_vl.distributed import exchange

log = logging.getLogger(__name__)

# Stores that both epath and tensorstore write, and the package through which epath does.
STORES = {"gs": "gcsfs", "s3": "s3fs"}
# What a resumed run goes on writing; of the rest it makes new files.
FEATURES = "features"  # the folder of what evaluations keep; it stays on this machine
RESUMED = ("metrics.jsonl", "evals.jsonl", "wandb_id")


def resolve(path):
  """The absolute path of a folder; an address as it is, without a last slash.

  Raises:
    ValueError: an address that cannot be reached; what that needs.
  """
  path = os.fspath(path)
  if not is_address(path):
    return os.path.abspath(os.path.expanduser(path))
  try:
    epath.Path(path).exists()
  except Exception as e:  # ImportError, KeyError of an unknown scheme, each store's own
    scheme = path.split("://")[0]
    needs = f"it needs pip install {STORES.get(scheme)}, and credentials"
    if scheme not in STORES:
      needs = f"known are {_schemes()}"
    raise ValueError(f"{path} cannot be reached ({type(e).__name__}: {e}); {needs}") from e
  return path.rstrip("/")


def is_address(path):
  """Whether `path` names a store instead of a folder."""
  return "://" in path


def _schemes():
  return ", ".join(f"{scheme}://" for scheme in STORES)


class Workdir:
  """The folder of one run. Every process makes one; process 0 alone writes the small files.

  `path` is where all lies in the end, `local` the folder in which the small files (logs, results,
  report) are written: the same one, or for an address a temporary folder that `push` copies from.
  Checkpoints are written straight to `checkpoints`.

  Raises:
    ValueError: it cannot be written, or other processes do not see what process 0 writes there.
  """

  def __init__(self, path):
    self.path = resolve(path)
    self.checkpoints = os.path.join(self.path, "checkpoints")
    self._root, self._pushed = epath.Path(self.path), {}
    self._try_to_write()
    self.local = self.path
    if is_address(self.path):
      self.local = tempfile.mkdtemp(prefix="jepa_vl-")
      self._fetch()

  def push(self, must=True):
    """Copies the small files that have changed to the address. A no-op for a folder.

    Raises:
      OSError: the address cannot be written; the files stay in `local`. If it need not be (`must`),
        that is only said, and the next call tries again.
    """
    if self.local == self.path or jax.process_index():
      return
    for path in sorted(pathlib.Path(self.local).rglob("*")):
      name = path.relative_to(self.local)
      if not path.is_file() or name.parts[0] in ("wandb", FEATURES):  # wandb sends its own
        continue
      stat = path.stat()
      version = stat.st_mtime_ns, stat.st_size
      if self._pushed.get(name) == version:
        continue
      try:
        target = self._root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
      except Exception as e:  # each store's package raises its own
        text = f"{name} could not be copied to {self.path} ({type(e).__name__}: {e})"
        if must:
          raise OSError(f"{text}; it is in {self.local}") from e
        log.warning("%s; it is tried again at the next save", text)
        return
      self._pushed[name] = version

  def close(self):
    """Copies what is left; the temporary folder goes."""
    self.push()
    if self.local != self.path:
      shutil.rmtree(self.local)

  def _fetch(self):
    if jax.process_index():
      return
    for name in RESUMED:
      if (self._root / name).exists():
        pathlib.Path(self.local, name).write_bytes((self._root / name).read_bytes())
    log.info("logs are written in %s and copied to %s at every save", self.local, self.path)

  def _try_to_write(self):
    probe, error = self._root / ".writable", ""
    if jax.process_index() == 0:
      try:
        self._root.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
      except Exception as e:  # each store's package raises its own
        error = getattr(e, "strerror", None) or f"{type(e).__name__}: {e}"
    error = exchange(error)[0]
    if error:
      raise ValueError(
        f"--workdir={self.path} cannot be written ({error}); give a folder that you may write to, "
        f"or an address ({_schemes()})"
      )
    blind = [i for i, sees in enumerate(exchange("yes" if probe.exists() else "")) if not sees]
    if blind:
      raise ValueError(
        f"--workdir={self.path}: process {blind[0]} does not see what process 0 writes there; all "
        f"processes need one shared folder, or an address ({_schemes()})"
      )
    if jax.process_index() == 0:
      probe.unlink()
