"""Entry point: flags, errors in words, and which mode. Everything else is elsewhere.

python -m jepa_vl.main --config=configs/tiny.py [--workdir=DIR] [--config.a.b=value] [--mode=train]
"""

import logging
import os
import re
import sys
import traceback

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from jepa_vl import allocator
from jepa_vl.stop import PREEMPTED, Stopped

_CONFIG = config_flags.DEFINE_config_file("config", None, "Run configuration.", lock_config=True)
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Folder or address (gs://bucket/run) for checkpoints, logs and results, runs/CONFIG if not "
  "given (of --mode=eval, runs/CONFIG-eval); of export, the folder to write to.",
)
_MODE = flags.DEFINE_enum(
  "mode", "train", ["train", "eval", "export", "bench", "compile"], "What to do."
)
_CHECKPOINT = flags.DEFINE_string(
  "checkpoint",
  None,
  "WORKDIR/checkpoints/STEP, WORKDIR for its newest, or weight files, for --mode=eval and export; "
  "eval also takes `untrained`.",
)
_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "For --mode=compile: chips that need not be here, v5e:16x16, v5p-64 or h100:8."
)
_SWEEP = flags.DEFINE_bool(
  "sweep", False, "For --mode=compile: tries meshes, remat and unrolling, recommends the cheapest."
)
_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")
_COORDINATOR = flags.DEFINE_string(
  "coordinator",
  None,
  "HOST:PORT of process 0, with --num_processes and --process_id; none of the three where TPU VMs, "
  "SLURM or Open MPI tell.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of this run.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")


def main(argv):
  if len(argv) > 1:
    sys.exit(_wrong_usage(f"unexpected argument {argv[1]!r}; flags are --name=value"))
  export = _MODE.value == "export"
  if not export:  # for an export all lies in the checkpoint
    _check_config()
  if _MODE.value in ("eval", "export") and _CHECKPOINT.value is None:
    sys.exit(_wrong_usage(f"--mode={_MODE.value} needs --checkpoint=WORKDIR/checkpoints/STEP"))
  if export and _WORKDIR.value is None:
    sys.exit(_wrong_usage("--mode=export needs --workdir=FOLDER to write to"))
  if (_MODE.value == "compile") != (_TOPOLOGY.value is not None):
    sys.exit(_wrong_usage("--mode=compile and --topology=NAME, as v5e:16x16, go together"))
  _start_logging()
  watch = None
  try:
    if _MODE.value in ("train", "eval"):
      from jepa_vl import distributed  # late: a usage error should not wait for JAX

      watch = distributed.start(
        _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _CONFIG.value.peer_timeout
      )
    code = _run(watch)
    if watch:
      watch.finish()
  except KeyboardInterrupt:
    code = _failed("interrupted; the same command goes on from the last checkpoint", watch)
  except Stopped as e:
    code = _failed(str(e), watch, PREEMPTED)
  except Exception as e:
    if watch and (_is_the_runtimes(e) or _is_the_runtimes(e.__cause__)):
      watch.explain()
    if _DEBUG.value:
      traceback.print_exc()
    code = _failed(f"error: {_in_words(e)}", watch)
  _exit(code)


def _run(watch):
  """Does what --mode says -> the exit code."""
  if _MODE.value == "compile":  # before anything starts a backend
    return _compile()
  from jepa_vl import compiled, train
  from jepa_vl.build import build
  from jepa_vl.data import bench
  from jepa_vl.export import export

  config, mode = _CONFIG.value, _MODE.value
  compiled.keep()
  if watch:
    _mark_lines(watch.process)
  if mode == "export":
    return export(_CHECKPOINT.value, _WORKDIR.value)
  if mode == "bench":  # of the data, for chips that may not be here: no step is planned
    config.accumulate, config.model.remat = config.accumulate or 1, "none"
    return bench.report(build(config))
  if mode == "eval":
    workdir = _WORKDIR.value or f"{_default_workdir()}-eval"
    return train.evaluate_checkpoint(config, _CHECKPOINT.value, workdir, watch)
  return train.train(config, _WORKDIR.value or _default_workdir(), watch)


def _is_the_runtimes(error):
  # Of whatever type, it begins with a status: most likely a collective that lost its other end.
  return re.match("(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE)[A-Z_]*: ", str(error))


def _failed(words, watch, code=1):
  print(words, file=sys.stderr, flush=True)
  if watch:
    watch.fail(words.removeprefix("error: "), code)
  return code


def _compile():
  from jepa_vl import aot
  from jepa_vl.aot import sweep

  workdir = _WORKDIR.value or os.path.join("runs", "compile")
  name = os.path.basename(_default_workdir())
  mode = sweep.report if _SWEEP.value else aot.report
  return mode(_CONFIG.value, _TOPOLOGY.value, workdir, name)


def _exit(code):
  from jepa_vl.data import feed

  if feed.is_stuck():  # all is saved and closed; a read that never returns must not keep us
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  sys.exit(code)


def _check_config():
  if _CONFIG.value is None:
    sys.exit(_wrong_usage("--config=FILE is needed, for example --config=configs/tiny.py"))
  try:
    _CONFIG.value.keys()
  except OSError as e:  # kept back by the flag until the config is used
    sys.exit(_wrong_usage(f"--config cannot be loaded: {str(e).splitlines()[-1].strip()}"))


def _in_words(error):
  if isinstance(error, (ValueError, OSError, FloatingPointError)):
    return str(error)
  if "RESOURCE_EXHAUSTED" in str(error):
    return (
      f"out of memory: {str(error).splitlines()[0]}\nSet model.remat=full, lower batch_size, raise "
      "accumulate (0: as memory asks for), or split the parameters with mesh.fsdp"
    )
  return f"{type(error).__name__}: {error}\nThis is unforeseen; --debug shows where it happened"


def _default_workdir():
  path, _, presets = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
  name = os.path.splitext(os.path.basename(path))[0]
  return os.path.join("runs", "-".join([name, *filter(None, presets.split(","))]))


def _start_logging():
  # Ours from INFO on, without the libraries' running commentary; what fails there is said by us.
  absl_logging.set_verbosity(absl_logging.WARNING if _DEBUG.value else absl_logging.FATAL)
  if not _DEBUG.value:
    logging.getLogger("concurrent.futures").setLevel(logging.CRITICAL)
  handler = logging.StreamHandler()
  handler.setFormatter(_Format())
  logger = logging.getLogger("jepa_vl")
  logger.setLevel(logging.INFO)
  logger.addHandler(handler)
  logger.propagate = False


def _mark_lines(process):
  # What all would say is said once; what one alone meets, with its number.
  logger = logging.getLogger("jepa_vl")
  logger.setLevel(logging.WARNING if process else logging.INFO)
  logger.handlers[0].formatter.process = f"process {process}: "


class _Format(logging.Formatter):
  process = ""

  def format(self, record):
    if record.levelno < logging.WARNING:
      return super().format(record)
    return f"{self.process}{record.levelname.lower()}: {super().format(record)}"


def _wrong_usage(message):
  print(f"usage error: {message}\n{__doc__.strip().splitlines()[-1]}", file=sys.stderr)
  return 2


def _parse(argv):
  try:
    return flags.FLAGS(argv)
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as e:
    while e.args and isinstance(e.args[0], Exception):
      e = e.args[0]  # a misspelt key: the config's own sentence lies inside
    if "Traceback" in str(e) and "--debug" not in argv:  # of a config with presets, in full
      sys.exit(_wrong_usage(f"--config cannot be loaded: {str(e).strip().splitlines()[-1]}"))
    sys.exit(_wrong_usage(str(e.args[0] if isinstance(e, KeyError) else e)))
  except Exception as e:  # the config is Python: whatever its code raises
    if "--debug" in argv:
      raise
    sys.exit(_wrong_usage(f"--config cannot be loaded: {type(e).__name__}: {e}"))


def run(mode="train"):
  """Runs the program; `mode` where the command line names none."""
  flags.FLAGS.set_default("mode", mode)
  allocator.keep_freed_memory()
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  # The last batches of grain's workers stay in shared memory until Python, at exit, removes them
  # and remarks on it, in a process that only the environment reaches.
  os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
  app.run(main, flags_parser=_parse)


if __name__ == "__main__":
  run()
