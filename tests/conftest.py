"""Eight virtual CPU devices for every test, and small configurations to build from."""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and compute little, so the compiler may be quick.
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
# What programs keep for their next start (jepa_vl/compiled.py) stays within this folder.
ROOT = pathlib.Path(__file__).resolve().parent.parent
os.environ.setdefault("XDG_CACHE_HOME", str(ROOT / ".pytest_cache" / "home"))

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

from configs import tiny  # noqa: E402
from jepa_vl import sharding  # noqa: E402
from jepa_vl.data import tokenizer  # noqa: E402

if not flags.FLAGS.is_parsed():
  flags.FLAGS.mark_as_parsed()  # what absl's app.run does; grain's workers insist on it


@pytest.fixture
def mesh():
  """A mesh of one device."""
  return sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])


@pytest.fixture
def config():
  """configs/tiny.py cut down to seconds; every key can still be changed."""
  c = tiny.get_config()
  c.mesh.data = 1
  c.batch_size = 16
  c.steps = 4
  c.log_every = 2
  c.model.scan = True  # compiles in half the time
  c.model.image_size = 16
  c.model.patch_size = 8
  c.model.embed_dim = 16
  c.model.hidden_dim = 32
  c.text.length = 12
  c.objective.num_slices = 64
  c.evals = type(c)()
  return c


@pytest.fixture(scope="session")
def tok():
  """The embedded tokenizer."""
  return tokenizer.load("emoji")


@pytest.fixture
def cfg(config):
  """The pipeline's configuration."""
  c = config.copy_and_resolve_references().unlock().data
  c.jitter_prob, c.grey_prob, c.flip = 0.5, 0.2, 0.5
  c.image_size, c.text_length, c.readout = 16, 12, "eot"
  c.label, c.classes = "", 0
  return c
