"""Checkpoints: damage is noticed and stepped over, and nothing that was whole is lost."""

import gc
import math
import os
import resource
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jepa_vl import checkpoint, sharding, train
from jepa_vl.state import TrainState

# Orbax leaves an event loop open when a read fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module", autouse=True)
def collected():
  yield
  gc.collect()  # here, where its warnings are left out, and not in the tests that come next


def make_state(seed):
  key = jax.random.key(seed)
  params = {"kernel": jax.random.normal(key, (64, 32)), "bias": jnp.arange(8.0) + seed}
  stats = {"mean": jnp.arange(4.0) - seed}
  return TrainState(jnp.int32(seed), params, stats, jax.tree.map(jnp.square, params))


def shapes(state):
  as_struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  return jax.tree.map(as_struct, state)


NUMBERED = {"a": jnp.arange(7, dtype=jnp.float32), "b": {"c": jnp.arange(5), "d": jnp.float32(3)}}


@pytest.fixture
def saved(tmp_path):
  """A folder with checkpoints 1 and 2."""
  checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints", keep=3)
  for step in (1, 2):
    checkpoints.save(step, make_state(step), {"name": "run", "step": step})
  checkpoints.close()
  return tmp_path / "checkpoints"


def restore(folder, check=lambda meta: None):
  checkpoints = checkpoint.Checkpoints(folder, keep=3)
  try:
    return checkpoints.restore(shapes(make_state(0)), check)
  finally:
    checkpoints.close()


def assert_is(restored, step):
  assert restored[0] == step
  jax.tree.map(np.testing.assert_array_equal, restored[1], make_state(step))


def test_the_newest_comes_back_with_its_meta(saved):
  seen = []
  assert_is(restore(saved, check=seen.append), 2)
  assert seen[0]["name"] == "run" and seen[0]["step"] == 2


def test_an_empty_folder_restores_nothing(tmp_path):
  assert restore(tmp_path / "none") is None


def files_of(folder):
  return sorted(
    os.path.join(root, name) for root, _, names in os.walk(folder) for name in names
  )


@pytest.mark.parametrize("how", ["truncate", "delete", "flip"])
def test_no_damage_to_any_file_goes_unnoticed(saved, tmp_path, how):
  """Each file in turn: either the state is whole all the same, or the one before is taken."""
  fallen_back = 0
  for path in files_of(saved / "2"):
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(saved, copy)
    target = copy / os.path.relpath(path, saved)
    size = os.path.getsize(target)
    if how == "truncate":
      os.truncate(target, size // 2)
    elif how == "delete":
      os.remove(target)
    else:
      with open(target, "r+b") as f:
        f.seek(size // 2)
        byte = f.read(1)
        f.seek(size // 2)
        f.write(bytes([byte[0] ^ 0xFF]))
    restored = restore(copy)
    assert_is(restored, restored[0])
    if restored[0] == 1:
      fallen_back += 1
      assert (copy / "2.damaged").is_dir() and not (copy / "2").exists()
  assert fallen_back >= 2


def test_all_damaged_is_an_error_that_keeps_them(saved):
  for step in ("1", "2"):
    for path in files_of(saved / step):
      os.truncate(path, 0)
  with pytest.raises(ValueError, match="none of the 2 checkpoints"):
    restore(saved)
  assert (saved / "1").is_dir() and (saved / "2").is_dir()


def test_a_refusal_is_not_taken_for_damage(saved):
  def refuse(meta):
    raise ValueError("of another run")

  with pytest.raises(ValueError, match="of another run"):
    restore(saved, check=refuse)
  assert (saved / "2").is_dir()


@pytest.mark.parametrize("times", [1, 2])
def test_a_stop_while_a_checkpoint_is_opened_is_not_taken_for_damage(saved, monkeypatch, times):
  real, calls = ocp.StandardCheckpointHandler.restore, []

  def read(*args, **kwargs):
    calls.append(args)
    if len(calls) <= times:
      os.kill(os.getpid(), signal.SIGTERM)
    return real(*args, **kwargs)

  monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", read)
  with train.StopSignal(at_once=True), pytest.raises(train.Stopped, match="SIGTERM; the same"):
    restore(saved)
  assert sorted(os.listdir(saved)) == ["1", "2"] and len(calls) == 1


def test_a_damaged_step_can_be_saved_again(saved):
  for path in files_of(saved / "2"):
    os.truncate(path, 0)
  checkpoints = checkpoint.Checkpoints(saved, keep=3)
  assert checkpoints.restore(shapes(make_state(0)), lambda meta: None)[0] == 1
  checkpoints.save(2, make_state(2), {"name": "run"})
  checkpoints.close()
  assert_is(restore(saved), 2)


def test_only_the_newest_are_kept(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
  for step in range(1, 5):
    checkpoints.save(step, make_state(step), {})
  checkpoints.close()
  assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["3", "4"]


def steps_in(folder):
  return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def test_multiples_of_keep_every_stay(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=1, every=3)
  for step in range(1, 8):
    checkpoints.save(step, make_state(step), {})
  checkpoints.close()
  assert steps_in(tmp_path) == [3, 6, 7]


@pytest.mark.parametrize("sign, best", [("", 2), ("-", 3)], ids=["highest", "lowest"])
def test_the_best_so_far_stays_also_after_a_restart(tmp_path, sign, best):
  """A checkpoint without the figure, or with one that is no number, is never the best."""
  figures = {1: 0.3, 2: 0.9, 3: 0.1, 4: math.nan, 6: 0.5}
  for steps in ((1, 2, 3, 4), (5, 6, 7)):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1, best=f"{sign}retrieval/val/R@1")
    for step in steps:
      found = {"retrieval": {"val/R@1": figures[step]}} if step in figures else None
      checkpoints.save(step, make_state(step), {}, found)
    checkpoints.close()
    assert steps_in(tmp_path) == [best, steps[-1]]


def test_a_figure_that_no_evaluation_gives_is_said_with_near_ones_once_all_is_saved(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=1, best="retrieval/val/R@2")
  with pytest.raises(ValueError, match="'retrieval/val/R@2' is no .* near are retrieval/val/R@1"):
    checkpoints.save(1, make_state(1), {}, {"retrieval": {"val/R@1": 0.5}, "rank": {"val/img": 3}})
  checkpoints.close()
  assert steps_in(tmp_path) == [1]


def test_a_leftover_of_a_killed_save_is_ignored_and_removed(saved):
  leftover = saved / "3.orbax-checkpoint-tmp-0"
  shutil.copytree(saved / "2", leftover)
  checkpoints = checkpoint.Checkpoints(saved, keep=3)
  assert_is(checkpoints.restore(shapes(make_state(0)), lambda meta: None), 2)
  checkpoints.save(3, make_state(3), {})  # waits for the removal
  checkpoints.close()
  assert not leftover.exists()
  assert_is(restore(saved), 3)


def test_a_save_that_fails_leaves_the_one_before(saved):
  """The operating system refuses to write (here by a limit, as a full disk would)."""
  checkpoints = checkpoint.Checkpoints(saved, keep=3)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
  try:
    with pytest.raises(OSError, match="could not be saved.*last good one is .*/2.*Make room"):
      checkpoints.save(3, make_state(3), {"name": "run"})
      checkpoints.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert_is(restore(saved), 2)


def test_fingerprint_is_of_the_bits_not_of_the_layout():
  state = make_state(1)
  number = checkpoint.fingerprint(state)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  rows = lambda x: NamedSharding(mesh, P(sharding.BATCH) if x.ndim else P())
  split = jax.device_put(state, jax.tree.map(rows, state))
  assert checkpoint.fingerprint(split) == number
  assert checkpoint.fingerprint(NUMBERED) == 3269459998  # checkpoints hold such numbers
  kernel = state.params["kernel"].at[3, 5].add(1e-6)
  assert checkpoint.fingerprint(state.replace(params={**state.params, "kernel": kernel})) != number


@pytest.mark.parametrize("abstract", [None, shapes(make_state(0).variables)], ids=["numpy", "mesh"])
def test_reading_the_variables_of_one_checkpoint(saved, abstract):
  seen = []
  variables = checkpoint.read(str(saved / "1"), abstract, check=seen.append)
  jax.tree.map(np.testing.assert_array_equal, variables, make_state(1).variables)
  assert seen == [checkpoint.read_meta(str(saved / "1"))] and seen[0]["step"] == 1
  kind = np.ndarray if abstract is None else jax.Array
  assert all(isinstance(x, kind) for x in jax.tree.leaves(variables))
  with pytest.raises(ValueError, match="no checkpoint folder"):
    checkpoint.read(str(saved / "7"), abstract, check=lambda meta: None)


def test_another_checkpoint_in_another_process_is_refused(saved, monkeypatch):
  others = lambda mine: [("3", 7)] if isinstance(mine, tuple) else []
  monkeypatch.setattr(checkpoint, "exchange", lambda mine: [mine, *others(mine)])
  with pytest.raises(ValueError, match="not the same checkpoint in every process"):
    checkpoint.read(str(saved.parent), None, check=lambda meta: None)


def test_a_store_that_fails_once_does_not_make_a_checkpoint_damaged(saved, monkeypatch):
  real, calls = checkpoint._read_state, []

  def once(*args):
    calls.append(args)
    if len(calls) == 1:
      raise checkpoint.Damaged("the network failed")
    return real(*args)

  monkeypatch.setattr(checkpoint, "_read_state", once)
  assert_is(restore(saved), 2)
  assert sorted(p.name for p in saved.iterdir() if p.is_dir()) == ["1", "2"]


def test_the_newest_checkpoint_of_a_workdir_is_found(saved):
  checkpoints = checkpoint.Checkpoints(saved, keep=3)
  checkpoints.save(10, make_state(10), {})
  checkpoints.close()
  (saved / "20.damaged").mkdir()
  assert checkpoint.find(str(saved.parent)) == str(saved / "10")  # a number, not a word
  assert checkpoint.find(str(saved / "2")) == str(saved / "2")
  os.rename(saved.parent, saved.parent.with_name("7"))  # a workdir's name may be a number
  named = saved.parent.with_name("7")
  assert checkpoint.find(str(named)) == str(named / "checkpoints" / "10")
  os.rename(named, saved.parent)
  assert checkpoint.find(str(saved)) is None and checkpoint.find(str(saved / "20")) is None


def test_reading_variables_notices_damage_to_their_arrays(saved):
  """Every file in which a flipped byte changes what is read."""
  noticed = 0
  for path in files_of(saved / "1"):
    with open(path, "r+b") as f:
      whole = f.read()
      f.seek(len(whole) // 2)
      f.write(bytes([whole[len(whole) // 2] ^ 0xFF]))
    try:
      found = checkpoint.read(str(saved / "1"), None, check=lambda meta: None)
      jax.tree.map(np.testing.assert_array_equal, found, make_state(1).variables)
    except ValueError as e:
      assert "cannot be read" in str(e)
      noticed += 1
    with open(path, "wb") as f:
      f.write(whole)
  assert noticed >= 2
