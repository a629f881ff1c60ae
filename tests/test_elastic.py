"""Checkpoints of several processes: saved by any number, restored by any other, never by some."""

import shutil

import pytest
from processes import run

from jepa_vl import metrics

# A state whose arrays are split over all devices; ends by printing what the process saw.
PROGRAM = """
import sys
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from jepa_vl import checkpoint, sharding
from jepa_vl.state import TrainState

mesh = sharding.make_mesh(data=1, fsdp=-1, tensor=1)
split = lambda *axes: NamedSharding(mesh, P(*axes))
shardings = TrainState(
  split(), {"kernel": split("fsdp", None), "bias": split()}, {"mean": split()},
  {"kernel": split(None, "fsdp"), "bias": split()})

def value(step):
  params = {"kernel": jnp.arange(64.0 * 32).reshape(64, 32) + step, "bias": jnp.arange(8.0) - step}
  return TrainState(jnp.int32(step), params, {"mean": jnp.ones(4)}, jax.tree.map(jnp.sin, params))

make = jax.jit(value, static_argnums=0, out_shardings=shardings)
shapes = jax.tree.map(
  lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
  jax.eval_shape(lambda: value(0)), shardings)
checkpoints = checkpoint.Checkpoints(FOLDER, keep=3)
ACTION
restored = checkpoints.restore(shapes, lambda meta: None)
step, state = restored
same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), state, make(step))
print("restored", step, all(jax.tree.leaves(same)), flush=True)
checkpoints.close()
"""

SAVE = """
for step in (1, 2):
  checkpoints.save(step, make(step), {"name": "run"})
checkpoints.wait()
"""


def program(folder, action=""):
  return PROGRAM.replace("FOLDER", repr(str(folder))).replace("ACTION", action)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """Checkpoints 1 and 2, written by two processes with two devices each."""
  folder = tmp_path_factory.mktemp("saved") / "checkpoints"
  assert_restored(run(2, program(folder, SAVE), devices=2), 2)
  return folder


@pytest.fixture
def copy(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / "checkpoints")


def assert_restored(results, step):
  for result in results:
    assert result.code == 0 and f"restored {step} True" in result.output, result.output


@pytest.mark.parametrize("n, devices", [(1, 1), (1, 4), (4, 1)])
def test_saved_by_two_processes_restored_by_any_number(saved, n, devices):
  assert_restored(run(n, program(saved), devices=devices), 2)


def test_all_processes_step_back_over_damage(copy):
  for path in (copy / "2" / "state").rglob("d/*"):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
  assert_restored(run(2, program(copy), devices=2), 1)
  assert (copy / "2.damaged").is_dir() and not (copy / "2").exists()


@pytest.mark.parametrize("part", ["_read_meta", "ocp.StandardCheckpointHandler.restore"])
def test_what_one_process_cannot_read_none_takes(copy, part):
  """The others neither wait for it nor go on with another step."""
  action = f"""
real = checkpoint.{part}
def fail(*args, **kwargs):
  if jax.process_index() == 1 and any("/2" in str(a) for a in args):
    raise OSError("stale file handle")
  return real(*args, **kwargs)
checkpoint.{part} = fail
"""
  results = run(2, program(copy, action), timeout=100)
  assert_restored(results, 1)
  assert "process 1: stale file handle" in results[0].output


def test_a_disk_that_is_full_for_all_ends_all_in_words(copy):
  action = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
noise = jax.random.normal(jax.random.key(0), (512, 1024))  # more than fits
checkpoints.save(3, make(3).replace(opt=jax.device_put(noise, split("fsdp", None))), {})
checkpoints.wait()
"""
  for result in run(2, program(copy, action), timeout=100):
    assert result.code == 1 and "could not be saved" in result.output, result.output
    assert f"The last good one is {copy}/2" in result.output
  assert_restored(run(1, program(copy), devices=2), 2)


def test_processes_that_see_other_checkpoints_are_told(copy, tmp_path):
  """The first would go on from step 2, the second start anew, and each wait for the other."""
  (tmp_path / "1").mkdir()
  copy.rename(tmp_path / "0")
  own = f"FOLDER = {str(tmp_path)!r} + f'/{{jax.process_index()}}'"
  for result in run(2, own + PROGRAM.replace("ACTION", ""), timeout=100):
    assert result.code == 1
    assert "process 0 sees the checkpoints 2 1, process 1 sees none" in result.output


def test_a_workdir_that_is_not_shared_is_told(tmp_path):
  text = f"""
from jepa_vl.workdir import Workdir
Workdir({str(tmp_path)!r} + f"/{{jax.process_index()}}")
"""
  for result in run(2, text, timeout=100):
    assert result.code == 1
    assert "process 1 does not see what process 0 writes there" in result.output


TRAIN = """
from absl import flags
from configs import tiny
from jepa_vl import train

flags.FLAGS.mark_as_parsed()
c = tiny.get_config()
c.batch_size, c.steps, c.log_every, c.checkpoint_every, c.keep_checkpoints = 16, 12, 1, 4, 9
c.model.scan, c.model.image_size, c.model.patch_size = True, 16, 8
c.model.embed_dim, c.model.hidden_dim, c.text.length, c.objective.num_slices = 16, 32, 12, 64
c.optim.warmup = 5
c.evals = type(c)()
assert train.train(c, WORKDIR) == 0
"""


@pytest.mark.slow
def test_four_processes_then_one_then_two_train_as_four_throughout(tmp_path):
  def train(name, n):
    for result in run(n, TRAIN.replace("WORKDIR", repr(str(tmp_path / name)))):
      assert result.code == 0, result.output
    return {r["step"]: r["loss"] for r in metrics.read_jsonl(tmp_path / name / "metrics.jsonl")}

  straight = train("straight", 4)
  shutil.copytree(tmp_path / "straight", tmp_path / "elastic")
  for n, later in ((1, ("8", "12")), (2, ("12",))):
    for step in later:
      shutil.rmtree(tmp_path / "elastic" / "checkpoints" / step)
    losses = train("elastic", n)
  assert list(losses) == list(range(1, 13)) == list(straight)
  assert losses == pytest.approx(straight, rel=1e-5)
