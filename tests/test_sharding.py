"""The mesh, the table of shardings, and which rows each process feeds."""

import re
import types

import jax
import numpy as np
import processes
import pytest
from test_step import example

from configs import presets
from jepa_vl import objectives, sharding
from jepa_vl.build import build
from jepa_vl.model.heads import Head

MESHES = [
  {"data": 8, "fsdp": 1, "tensor": 1},
  {"data": 1, "fsdp": 8, "tensor": 1},
  {"data": 1, "fsdp": 1, "tensor": 8},
  {"data": 4, "fsdp": 2, "tensor": 1, "slices": 2},
  {"data": 4, "fsdp": 1, "tensor": 2, "slices": 4},
  {"data": 1, "fsdp": 4, "tensor": 2},
  {"data": 2, "fsdp": 1, "tensor": 4},
  {"data": 2, "fsdp": 2, "tensor": 2, "slices": 2},
]


def ids(mesh):
  return np.vectorize(lambda d: d.id)(mesh.devices)


# --- the mesh


@pytest.mark.parametrize(("sizes", "shape"), [
  ({"data": -1, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
  ({"data": 2, "fsdp": -1, "tensor": 1}, (2, 4, 1)),
  ({"data": 1, "fsdp": 2, "tensor": -1}, (1, 2, 4)),
])  # fmt: skip
def test_one_size_is_inferred(sizes, shape):
  assert sharding.make_mesh(**sizes).devices.shape == shape


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_groups_lie_within_a_slice_of_neighbours(sizes):
  """Each fsdp x tensor group is one run of devices, and each slice's rows are together."""
  mesh = sharding.make_mesh(**sizes)
  for group in ids(mesh):
    assert np.ptp(group) == group.size - 1
  slices = sizes.get("slices", 1)
  for number, block in enumerate(np.split(ids(mesh), slices)):
    assert set(block.flat) == set(range(number * 8 // slices, (number + 1) * 8 // slices))


def devices_in_slices(count):
  """Eight devices that say which of `count` slices they lie in, in turn, as TPUs and GPUs do."""
  device = lambda i: types.SimpleNamespace(
    id=i, slice_index=i % count, process_index=i, device_kind="", platform="gpu"
  )
  return [device(i) for i in range(8)]


def test_slices_are_those_that_the_devices_name():
  grid = sharding._device_grid([4, 2, 1], -1, devices_in_slices(2))
  assert [[d.slice_index for d in row.flat] for row in grid] == [[0, 0], [0, 0], [1, 1], [1, 1]]
  # One may take them for something else.
  grid = sharding._device_grid([1, 4, 2], 1, devices_in_slices(2))
  assert grid.shape == (1, 4, 2)


@pytest.mark.parametrize(("sizes", "slices", "words"), [
  ([2, 2, 2], 4, "mesh.slices=4 does not divide .* mesh.data = 2 of 8 devices"),
  ([8, 1, 1], 3, "mesh.slices=3 does not divide"),
  ([8, 1, 1], 0, "mesh.slices=0 does not divide"),
  ([1, 4, 2], -1, r"mesh.slices=-1 \(the devices lie in 2\) .* or set mesh.slices=1"),
])  # fmt: skip
def test_slices_that_do_not_divide_are_refused(sizes, slices, words):
  with pytest.raises(ValueError, match=words):
    sharding._device_grid(sizes, slices, devices_in_slices(2))


# --- rows

ROWS = """
import jax, numpy as np
from jax.experimental import multihost_utils
from jepa_vl import sharding

rows = np.arange(24 * 5).reshape(24, 5)
for sizes, order in {cases!r}:
  devices = [jax.devices()[i] for i in order]
  mesh = sharding.make_mesh(**dict(zip(("data", "fsdp", "tensor"), sizes)), devices=devices)
  parts, count = sharding.row_parts(mesh)
  own = np.concatenate([np.split(rows, count)[p] for p in parts])
  found = sharding.put_batch({{"x": own}}, mesh)["x"]
  everywhere = multihost_utils.process_allgather(found, tiled=True)
  np.testing.assert_array_equal(everywhere, rows)
  print("parts", sizes, parts, count)
"""


def test_each_process_feeds_what_its_devices_hold():
  """Two processes of three devices: neighbouring rows, the same ones, scattered, overlapping."""
  cases = [
    ((6, 1, 1), range(6), (0, 1, 2), (3, 4, 5)),
    ((1, 3, 2), (0, 3, 1, 4, 2, 5), (0, 1, 2), (0, 1, 2)),
    ((1, 1, 6), range(6), (0,), (0,)),
    ((2, 3, 1), (0, 5, 1, 4, 2, 3), (0, 2, 4), (1, 3, 5)),
    ((3, 1, 2), range(6), (0, 1), (1, 2)),
  ]
  program = ROWS.format(cases=[(sizes, list(order)) for sizes, order, *_ in cases])
  for process, result in enumerate(processes.run(2, program, devices=3, timeout=200)):
    assert result.code == 0, result.output
    for case in cases:
      count = case[0][0] * case[0][1]
      assert f"parts {case[0]} {case[2 + process]} {count}" in result.output


# --- the table


def test_what_does_not_divide_stays_whole_and_is_named():
  mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
  attn = {"qkv": {"kernel": np.zeros((2, 192, 3, 3, 64)), "bias": np.zeros((2, 3, 3, 64))}}
  tree = {
    "tower": {"attn": attn},
    "token_embedding": {"embedding": np.zeros((50257, 192))},
    "image_head": {"out": {"kernel": np.zeros((10, 6))}, "bias": np.zeros(7)},
  }
  specs = jax.tree.map(lambda s: s.spec, sharding.shardings_of(tree, mesh))
  qkv = specs["tower"]["attn"]["qkv"]
  assert tuple(qkv["kernel"]) == (None, "fsdp", None, None, None)
  assert tuple(specs["token_embedding"]["embedding"]) == (None, ("tensor", "fsdp"))
  assert tuple(specs["image_head"]["out"]["kernel"]) == (None, "tensor")
  assert sharding.undivided(tree, mesh) == [
    "image_head/out/kernel (10, 6): 10 over fsdp=4",
    "tower/attn/qkv/bias (2, 3, 3, 64): 3 over tensor=2",
    "tower/attn/qkv/kernel (2, 192, 3, 3, 64): 3 over tensor=2",
  ]
  tree["token_embedding"]["embedding"] = np.zeros((50257, 190))
  assert "190 over tensor=2 x fsdp=4" in str(sharding.undivided(tree, mesh))
  assert not sharding.undivided(tree, sharding.make_mesh(data=8, fsdp=1, tensor=1))


def test_heads_and_hidden_units_are_computed_in_parts(config, capfd):
  """Per device half of the attention heads and of the MLP's hidden units, by the compiled code."""
  config.mesh.update({"data": 2, "fsdp": 2, "tensor": 2, "slices": 2})
  run = build(config)
  B, W, L = config.batch_size // 4, 128, config.text.length
  batch = sharding.put_batch(example(config, run.model.vocab_size), run.mesh)
  with jax.set_mesh(run.mesh):
    text = run.train_step.lower(run.abstract_state, batch).compile().as_text()
  shape = lambda name: {
    tuple(map(int, dims.split(",")))
    for dims in re.findall(rf"= f32\[([\d,]+)\]\S* dot\([^\n]*/gpt/[^\n]*{name}/dot_general", text)
  }
  assert (B * L, 3 * W // 2) in shape("attn/qkv") and (B * L, 4 * W // 2) in shape("mlp/up")
  assert not any({3 * W, 4 * W} & set(s) for s in shape("attn/qkv") | shape("mlp/(?:up|down)"))
  assert (B * L, W) in shape("attn/out")
  # A layout from which XLA finds no way but to make all rows on all devices, or finds that best.
  assert f"[{config.batch_size},{L}," not in text
  assert "rematerialization" not in capfd.readouterr().err


# --- the numbers


def head_and_objectives(config):
  """f(variables, batch): every objective's value and gradients through heads with BatchNorm."""
  head = Head(depth=2, hidden_dim=32, out_dim=8, dropout=0.0, dtype="float32")
  cfgs = {}
  for name, group in (("grouped", 4), ("global", 0), ("plus", 4), ("clip", 0), ("siglip", 0)):
    c = config.copy_and_resolve_references()
    presets.apply(c, name if name in presets.PRESETS else "")
    c.objective.group_size, c.objective.chunk_size = group, 5
    cfgs[name] = c.objective

  def apply(params, x):  # (B, W) or (B, V, W)
    rows = x.reshape(-1, x.shape[-1])
    z, new = head.apply({"params": params["image_head"]}, rows, train=True, mutable="batch_stats")
    z = z.reshape(*x.shape[:-1], -1)
    return sharding.constrain(z, "batch", *[None] * (z.ndim - 1)), new

  def loss(params, batch, cfg):
    z = {k: apply(params, batch[k]) for k in ("img", "txt")}
    out = {f"{kind}_{k}": v for k, (v, _) in z.items() for kind in "zp"}
    views, new = apply(params, batch["views"])
    out["views"] = views.swapaxes(0, 1)  # (V, B, D)
    out |= objectives.learned_scalars(cfg)
    return objectives.from_config(cfg)(out, jax.random.key(3))[0], new

  def every(params, batch):
    grad = lambda cfg: jax.value_and_grad(loss, has_aux=True)(params, batch, cfg)
    return {name: grad(cfg) for name, cfg in cfgs.items()}

  return head, every


def numbers_on(config, mesh):
  head, every = head_and_objectives(config)
  rng = np.random.default_rng(0)
  batch = {"img": (16, 24), "txt": (16, 24), "views": (16, 3, 24)}
  batch = {k: rng.normal(size=shape).astype(np.float32) for k, shape in batch.items()}
  params = {"image_head": head.init(jax.random.key(0), batch["img"], train=True)["params"]}
  params = jax.device_put(params, sharding.shardings_of(params, mesh))
  with jax.set_mesh(mesh):
    return jax.device_get(jax.jit(every)(params, sharding.put_batch(batch, mesh)))


@pytest.fixture(scope="module")
def alone():
  """What one device gives, once."""
  return {}


@pytest.mark.parametrize("sizes", [
  *(MESHES[i] for i in (0, 1, 2, 7)),
  *(pytest.param(MESHES[i], marks=pytest.mark.slow) for i in (3, 4, 5, 6)),
], ids=str)  # fmt: skip
def test_every_objective_and_batchnorm_give_the_same_numbers(config, mesh, alone, sizes):
  """Values, running statistics and gradients to 1e-5 of each array's largest."""
  if not alone:
    alone |= numbers_on(config, mesh)
  found = numbers_on(config, sharding.make_mesh(**sizes))

  def close(path, a, b):
    error = np.abs(a - b).max() / max(np.abs(a).max(), 1e-3)
    assert error < 1e-5, f"{sharding.path_name(path)}: {error:.1e}"

  jax.tree_util.tree_map_with_path(close, alone, found)
  assert {k: np.isfinite(v[0][0]) for k, v in found.items()} == dict.fromkeys(alone, True)
