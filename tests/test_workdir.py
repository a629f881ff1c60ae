"""Workdirs at addresses: checkpoints go straight there, small files by way of a local folder."""

import pathlib
import sys

import pytest
from etils import epath

from jepa_vl import checkpoint, encoder, metrics, train
from jepa_vl.workdir import Workdir, exchange, resolve


@pytest.fixture(scope="module")
def store(tmp_path_factory):
  """store://NAME, an address of which epath alone knows what lies behind it."""
  folder = tmp_path_factory.mktemp("store")

  def behind(part):
    part = str(part)
    return str(folder / part.removeprefix("store://")) if part.startswith("store://") else part

  @epath.register_path_cls("store://")
  class Store(type(epath.Path("/"))):
    if sys.version_info < (3, 12):  # pathlib's paths are made by the one, then by the other

      def __new__(cls, *parts):
        return super().__new__(cls, *map(behind, parts))
    else:

      def __init__(self, *parts):
        super().__init__(*map(behind, parts))

  return folder


def test_an_address_is_left_as_it_is_and_a_folder_made_absolute(store, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  assert resolve("store://run/a/") == "store://run/a"
  assert resolve("run") == str(tmp_path / "run")


@pytest.mark.parametrize("address, words", [
  ("gs://bucket/run", "pip install gcsfs"),
  ("s3://bucket/run", "pip install s3fs"),
  ("http://host/run", "known are gs://, s3://"),
])  # fmt: skip
def test_an_address_that_cannot_be_opened_says_what_it_needs(address, words):
  with pytest.raises(ValueError, match=words) as e:
    Workdir(address)
  assert address in str(e.value)


def test_small_files_are_copied_when_they_change_and_fetched_at_a_resume(store):
  first = Workdir("store://small")
  local = pathlib.Path(first.local)
  (local / "metrics.jsonl").write_text("1\n")
  (local / "tensorboard").mkdir()
  (local / "tensorboard" / "events").write_text("e")
  first.push()
  there = store / "small"
  assert (there / "metrics.jsonl").read_text() == "1\n"
  assert (there / "tensorboard" / "events").read_text() == "e"
  (there / "tensorboard" / "events").write_text("not copied again")
  (local / "metrics.jsonl").write_text("1\n2\n")
  first.close()
  assert (there / "metrics.jsonl").read_text() == "1\n2\n" and not local.exists()
  assert (there / "tensorboard" / "events").read_text() == "not copied again"
  second = Workdir("store://small")
  assert pathlib.Path(second.local, "metrics.jsonl").read_text() == "1\n2\n"
  assert sorted(p.name for p in there.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_a_copy_that_fails_names_the_file_and_keeps_it(store):
  workdir = Workdir("store://broken")
  (store / "broken" / "results.json").mkdir()
  path = pathlib.Path(workdir.local, "results.json")
  path.write_text("{}")
  with pytest.raises(OSError, match="results.json could not be copied to store://broken"):
    workdir.close()
  assert path.exists()


@pytest.mark.slow
def test_a_run_at_an_address_goes_on_from_there(store, config):
  """Trained, stopped, gone on with on a machine without the first one's files, and opened."""
  config.mesh.data, config.log_every, config.checkpoint_every = -1, 1, 2
  assert train.train(config, "store://run") == 0
  there = store / "run"
  (there / "checkpoints" / "4" / "state").rename(there / "lost")
  steps = lambda: [r["step"] for r in metrics.read_jsonl(there / "metrics.jsonl")]
  assert steps() == [1, 2, 3, 4]
  config.steps = 5
  assert train.train(config, "store://run") == 0
  assert steps() == [1, 2, 3, 4, 5]
  names = {"checkpoints", "config.json", "metrics.jsonl", "report.html", "results.json"}
  assert names <= {p.name for p in there.iterdir()}
  assert checkpoint.find("store://run") == str(there / "checkpoints" / "5")
  assert encoder.load("store://run").description.step == 5


def test_exchange_of_one_process():
  assert exchange("text") == ["text"]
