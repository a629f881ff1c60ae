"""What a step asks of a device's memory, and the batch that is made to fit into it."""

import jax
import numpy as np
import pytest

from jepa_vl import aot, checks, memory, sharding, state
from jepa_vl import build as build_lib
from jepa_vl.model import two_tower


@pytest.fixture
def vit_s(config):
  """ViT-S on one device: large enough for memory to be in the activations."""
  config.model.update(
    {"size": "small", "image_size": 64, "patch_size": 16, "embed_dim": 64, "hidden_dim": 256}
  )
  config.batch_size, config.text.length = 512, 32
  return config


def run_of(config, mesh=None):
  config.mesh.update(mesh or {"data": 1, "fsdp": 1, "tensor": 1})
  count = config.mesh.data * config.mesh.fsdp * config.mesh.tensor
  return build_lib.build(config, devices=jax.devices()[:count])


def test_state_is_counted_exactly_from_its_shardings(config):
  run = run_of(config, {"data": 2, "fsdp": 2, "tensor": 2})
  found = memory.state_bytes(run.abstract_state)
  real = state.init_state(run.model, run.tx, run.mesh, 0)
  on_first = lambda tree: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
  assert found == {
    "parameters": on_first((real.params, real.batch_stats)), "optimizer": on_first(real.opt)
  }  # fmt: skip


@pytest.mark.parametrize(("remat", "dtype", "attention", "scan"), [
  ("none", "bfloat16", "short", True), ("names", "bfloat16", "short", True),
  ("dots", "bfloat16", "short", True), ("full", "bfloat16", "short", True),
  ("none", "float32", "short", True), ("none", "bfloat16", "xla", True),
  ("none", "bfloat16", "short", False),
])  # fmt: skip
def test_layers_keep_what_differentiation_keeps(vit_s, remat, dtype, attention, scan):
  """The count per layer against the residuals of the towers' own vjp."""
  vit_s.model.update({"remat": remat, "dtype": dtype, "attention": attention, "scan": scan})
  run = run_of(vit_s)

  width, depth, heads = two_tower.SIZES["small"]
  layers = depth if scan else depth - 1  # that keep all

  def predictions(variables, batch):
    out, _ = run.model.apply(variables, batch, train=True, mutable=["batch_stats"])
    return out["p_img"], out["p_txt"]

  def kept(rows):
    batch = jax.eval_shape(lambda: two_tower.dummy_batch(run.model, rows))
    residuals = lambda v, b: jax.vjp(lambda v: predictions(v, b), v)[1]
    leaves = jax.tree.leaves(jax.eval_shape(residuals, run.abstract_state.variables, batch))
    return sum(x.size * x.dtype.itemsize for x in leaves if x.ndim > 2 and len(x) == layers)

  layer = lambda n: memory._layer_bytes(
    n, remat, width=width, heads=heads, itemsize=np.dtype(run.model.dtype).itemsize, tensor=1,
    tiled=False, attention=attention
  )
  expected = 2 * layers * (layer(17) + layer(32))
  assert 0.9 * expected < kept(4) - kept(2) < 1.01 * expected  # newest versions keep 7% less


def test_the_fewest_micro_batches_then_the_least_recomputation(vit_s, caplog, monkeypatch):
  monkeypatch.setattr(memory.log, "propagate", True)
  vit_s.accumulate, vit_s.model.remat, vit_s.objective.group_size = 0, "auto", 128
  vit_s.mesh.data = 1
  run = build_lib.build(vit_s, training=False, devices=jax.devices()[:1])
  need = lambda a, r: run.memory(accumulate=a, remat=r)["total"]
  assert need(1, "none") > need(1, "names") > need(1, "dots") > need(1, "full")
  assert need(1, "full") > need(2, "full") > need(4, "full")

  def chosen(limit):
    config = vit_s.copy_and_resolve_references()
    memory.fill_in(config, limit / memory.SHARE, need, run.mesh)
    return config.accumulate, config.model.remat

  for choice in ((1, "none"), (1, "names"), (1, "dots"), (1, "full"), (4, "full")):
    assert chosen(need(*choice) + 1) == choice
  assert chosen(2 * need(1, "none")) == (1, "none")
  assert chosen(need(1, "none") - 1) != (1, "none")
  limit = need(2, "full") + 1
  assert limit < need(1, "full") and chosen(limit) == (2, "full")
  with caplog.at_level("INFO", "jepa_vl.memory"):
    chosen(limit)
  assert "GiB: model.remat=full, accumulate=2 (estimated" in caplog.text
  assert chosen(need(4, "full") - 1) == (4, "full")  # by the estimate, it may
  with pytest.raises(ValueError, match="nothing fits into .* accumulate=4 .*group_size"):
    chosen(memory.SHARE * need(4, "full") - 1)
  with pytest.raises(ValueError, match="does not tell"):
    memory.fill_in(vit_s, None, need, run.mesh)
  vit_s.accumulate = 2
  with pytest.raises(ValueError, match="nothing fits into .* accumulate=2 .*Set accumulate=0"):
    memory.fill_in(vit_s, 1000, need, run.mesh)
  compiled = vit_s.copy_and_resolve_references()
  memory.fill_in(compiled, 1000, need, run.mesh, refuse=False)
  assert compiled.model.remat == "full"
  memory.fill_in(vit_s, None, need, run.mesh)
  assert (vit_s.accumulate, vit_s.model.remat) == (2, "none")


def test_explicit_values_stay(vit_s):
  vit_s.accumulate, vit_s.model.remat = 2, "dots"
  run = run_of(vit_s)
  assert (run.config.accumulate, run.model.remat, run.chosen) == (2, "dots", ())


def test_micro_batches_keep_groups_devices_and_packing_whole(config):
  mesh = sharding.make_mesh(data=4, fsdp=1, tensor=1, devices=jax.devices()[:4])
  config.batch_size, config.accumulate, config.objective.group_size = 96, 0, 24
  assert memory.micro_batches(config, mesh) == [1, 2, 4]
  config.objective.group_size = 0
  assert memory.micro_batches(config, mesh) == [1, 2, 3, 4, 6, 8, 12, 24]
  config.data.text_packing, config.data.packing_group = True, 3
  assert memory.micro_batches(config, mesh) == [1, 2, 4, 8]
  one = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
  config.batch_size, config.data.text_packing = 8, False
  assert memory.micro_batches(config, one) == [1, 2, 4]  # BatchNorm needs two rows
  config.accumulate = 5
  assert memory.micro_batches(config, mesh) == [5]


def test_a_run_fills_in_what_is_open(vit_s, monkeypatch):
  config = vit_s
  config.batch_size = 4096
  config.mesh.data, config.accumulate, config.model.remat = -1, 0, "auto"
  monkeypatch.setattr(memory, "limit", lambda device: 1 << 40)
  run = build_lib.build(config)
  assert (config.accumulate, config.model.remat) == (1, "none") and run.model.remat == "none"
  assert run.meta["config"]["accumulate"] == 1 and run.chosen == ("accumulate",)
  need = run.memory(accumulate=2, remat="full")["total"]
  monkeypatch.setattr(memory, "limit", lambda device: 1.001 * need / memory.SHARE)
  config.accumulate, config.model.remat = 0, "auto"
  other = build_lib.build(config)
  assert config.accumulate > 1 and other.meta["config"]["accumulate"] == config.accumulate
  with pytest.raises(ValueError, match="begun with accumulate=1, .*--config.accumulate=1 to go on"):
    checks.resume(run.meta, other)


def test_this_machines_memory_is_half_its_ram_by_device():
  limit = memory.limit(jax.devices()[0])
  assert 2**26 < limit * 2 * jax.local_device_count() < 2**50


def test_the_start_up_line_names_every_kind(config):
  line = build_lib.describe_memory(run_of(config))
  for words in ("parameters", "optimizer", "gradients", "activations", "total", "16 rows at once"):
    assert words in line


@pytest.mark.parametrize("scan", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("remat", ["none", "names", "full"])
def test_the_estimate_is_what_the_compiler_plans(vit_s, scan, remat):
  """Here, on a CPU, whose compiler would undo what an unrolled step recomputes."""
  vit_s.model.update({"remat": remat, "scan": scan})
  run = run_of(vit_s)
  with jax.set_mesh(run.mesh):
    step = run.train_step.lower(run.abstract_state, aot.abstract_batch(run))
  plan = step.compile().memory_analysis()
  planned = plan.argument_size_in_bytes + plan.temp_size_in_bytes
  estimated = run.memory()["total"]
  print(f"scan={scan} remat={remat}: {estimated / planned - 1:+.1%} of {planned / 2**30:.2f} GiB")
  assert estimated == pytest.approx(planned, rel=0.1)
