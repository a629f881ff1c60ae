"""Captions that share rows: the same numbers as one to a row, whatever else the step does."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from records import record, write
from test_step import ALONE, MESHES, adam_gradients, example, few_devices, with_gradient

from configs import presets
from jepa_vl import build as build_lib
from jepa_vl import sharding
from jepa_vl import state as state_lib
from jepa_vl.data import packing, pipeline, sources
from jepa_vl.model import gpt, two_tower

__all__ = ["few_devices"]  # a fixture of every test here too
B, L = 16, 12


@pytest.fixture
def config(config):
  config.data.text_packing = True
  config.data.packing_group, config.data.packing_tokens = 8, 9
  return config


@pytest.fixture
def cfg(config):
  """The pipeline's configuration."""
  return build_lib.build(config).data_config


def captions(rng, rows, length, lengths=None):
  """A batch of the tokenizer's form; the last token of each stands for the EOT."""
  lengths = rng.integers(1, length + 1, rows) if lengths is None else lengths
  return {
    "text": rng.integers(1, 99, (rows, length)).astype(np.int32),
    "mask": np.arange(length) < np.asarray(lengths)[:, None],
    "truncated": rng.random(rows) < 0.1,
    "index": np.arange(rows),
  }


def read_back(packed, cfg):
  """The captions of a packed batch as token lists, in the order of the batch's rows."""
  text, position, readout = (packed[f"packed_{k}"] for k in ("text", "position", "readout"))
  flat, place = (x.reshape(len(x), -1) for x in (text, position))
  found = [
    [flat[g, end - place[g, end] : end + 1].tolist() for end in ends]
    for g, ends in enumerate(readout)
  ]
  # Micro-batch a has the groups a, a + A, ... and of the batch the rows a, a + A, ...
  A = cfg.accumulate
  micro = [sum(found[a::A], []) for a in range(A)]
  return [micro[row % A][row // A] for row in range(readout.size)]


def unpacked(packed, cfg):
  """The same captions one to a row, as `text` and `mask`."""
  tokens = read_back(packed, cfg)
  length = packed["packed_text"].shape[-1]
  rest = {k: v for k, v in packed.items() if not k.startswith("packed_")}
  return rest | {
    "text": np.array([t + [0] * (length - len(t)) for t in tokens], np.int32),
    "mask": np.arange(length) < np.array([len(t) for t in tokens])[:, None],
  }


def model_arrays(batch):
  return {k: v for k, v in batch.items() if k in pipeline.MODEL_KEYS}


# --- where the tokens lie


def cases():
  rng = np.random.default_rng(0)
  for _ in range(150):
    g, A, length = int(rng.integers(1, 20)), int(rng.integers(1, 4)), int(rng.integers(1, 30))
    rows = g * A * int(rng.integers(1, 4))
    mean = rng.uniform(1, length)
    lengths = np.clip(rng.lognormal(np.log(mean), 0.7, rows).astype(int), 1, length)
    yield captions(rng, rows, length, lengths), g, int(rng.integers(1, length + 1)), A
  yield captions(rng, 16, 12, [1] * 16), 8, 1, 1  # only EOT, and eight in a row of twelve
  yield captions(rng, 16, 12, [12] * 16), 8, 12, 2  # full rows, nothing to gain
  yield captions(rng, 16, 12, [12] * 16), 8, 1, 1  # all cut to one token
  yield captions(rng, 8, 1, [1] * 8), 4, 1, 2


def with_keys(cfg, batch, group, tokens, accumulate):
  cfg = cfg.copy_and_resolve_references()
  cfg.update({"packing_group": group, "packing_tokens": tokens, "accumulate": accumulate})
  cfg.text_length = batch["text"].shape[1]
  return cfg


def test_every_caption_lies_whole_in_one_row_of_its_group(cfg):
  for batch, *keys in cases():
    cfg = with_keys(cfg, batch, *keys)
    packed = packing.pack(batch, cfg)
    text, position, readout = (packed[f"packed_{k}"] for k in ("text", "position", "readout"))
    rows, length = batch["text"].shape
    R = packing.rows_per_group(cfg)
    assert R * length >= cfg.packing_group * cfg.packing_tokens > (R - 1) * length
    assert text.shape == position.shape == (rows // cfg.packing_group, R, length)
    assert readout.shape == (rows // cfg.packing_group, cfg.packing_group)
    assert {text.dtype, position.dtype, readout.dtype} == {np.dtype(np.int32)}
    assert packed.keys() == (batch.keys() | {f"packed_{k}" for k in ("text", "position", "readout")}
                             ) - {"text", "mask"}  # fmt: skip
    taken = np.zeros((len(text), R * length), int)
    for g, ends in enumerate(readout):
      for end in ends:
        n = position.reshape(len(text), -1)[g, end] + 1
        start = end - n + 1
        assert start // length == end // length, "split over rows"
        taken[g, start : end + 1] += 1
        np.testing.assert_array_equal(
          position.reshape(len(text), -1)[g, start : end + 1], np.arange(n)
        )
    assert taken.max() == 1, "two captions overlap"
    assert (text.reshape(taken.shape)[taken == 0] == 0).all()
    assert (position.reshape(taken.shape)[taken == 0] == 0).all()
    again = packing.pack(batch, cfg)
    assert all(again[k].tobytes() == packed[k].tobytes() for k in packed)


def test_only_the_longest_captions_are_cut_and_keep_their_eot(cfg):
  """Each group's captions are cut to one length, the largest at which they find room."""
  cut = 0
  for batch, *keys in cases():
    cfg = with_keys(cfg, batch, *keys)
    packed = packing.pack(batch, cfg)
    whole = [row[m].tolist() for row, m in zip(batch["text"], batch["mask"], strict=True)]
    g, A, length = cfg.packing_group, cfg.accumulate, batch["text"].shape[1]
    rows = np.arange(len(whole)).reshape(-1, g * A)
    groups = [block[a::A] for block in rows for a in range(A)]
    found = read_back(packed, cfg)
    for members in groups:
      lengths = np.array([len(whole[i]) for i in members])
      after = np.array([len(found[i]) for i in members])
      cap = after.max() if (after < lengths).any() else length
      np.testing.assert_array_equal(after, np.minimum(lengths, cap))
      for larger in range(cap + 1, length + 1):
        _, fits = packing.best_fit(
          np.minimum(lengths, larger)[None], rows=packing.rows_per_group(cfg), length=length
        )
        assert not fits[0], f"{larger} would do"
      for i in members:
        assert found[i] == whole[i][: len(found[i]) - 1] + whole[i][-1:]
        assert packed["truncated"][i] == (batch["truncated"][i] or len(found[i]) < len(whole[i]))
      cut += int((after < lengths).sum())
  assert cut > 500


def test_most_of_the_rows_is_filled():
  """With lengths like web captions' nearly all room is used before anything is cut."""
  rng = np.random.default_rng(0)
  lengths = np.clip(rng.lognormal(3.0, 0.7, (200, 32)), 1, 77).astype(int)
  after, _ = packing.fit(lengths, rows=10, length=77)
  full = (after < lengths).any(axis=1)
  assert full.sum() > 50
  assert after[full].sum() > 0.97 * full.sum() * 10 * 77


# --- batches


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  names = [" ".join(["grinning face"] * (1 + i % 6)) for i in range(23)]
  path = tmp_path_factory.mktemp("data") / "a.array_record"
  write(path, [record(i, caption=name, tags=[]) for i, name in enumerate(names)])
  return sources.open_source("array_record", str(path), "")


def take(source, tok, cfg, steps, *, start=0, **process):
  batches = pipeline.batches(source, tok, cfg, batch_size=B, seed=3, start_step=start, **process)
  return [next(batches) for _ in range(steps)]


def assert_equal(found, expected):
  for a, b in zip(found, expected, strict=True):
    assert a.keys() == b.keys()
    for k in a:
      np.testing.assert_array_equal(a[k], b[k], err_msg=k)


def test_batches_do_not_depend_on_processes_workers_or_a_restart(source, tok, cfg):
  cfg.packing_group, cfg.packing_tokens, cfg.accumulate = 2, 6, 2
  straight = take(source, tok, cfg, 5)
  assert any(b["truncated"].any() for b in straight)
  assert_equal(take(source, tok, cfg, 3, start=2), straight[2:])
  for processes in (2, 4):
    parts = [
      take(source, tok, cfg, 5, parts=(p,), count=processes) for p in range(processes)
    ]
    shares = zip(*parts, strict=True)
    assert_equal([{k: np.concatenate([b[k] for b in s]) for k in s[0]} for s in shares], straight)
  cfg.workers = 2
  assert_equal(take(source, tok, cfg, 3, start=2), straight[2:])


def test_a_batch_is_the_packed_form_of_the_unpacked_one(source, tok, cfg):
  packed = take(source, tok, cfg, 3)
  cfg.text_packing = False
  assert_equal(packed, [packing.pack(b, cfg) for b in take(source, tok, cfg, 3)])


# --- numbers


def pair(config):
  """A training batch with its captions packed, some cut for it, and the same one to a row."""
  config.data.packing_tokens = 6
  cfg = build_lib.build(config).data_config
  uncut = np.zeros(config.batch_size, bool)
  packed = packing.pack(example(config, 50) | {"truncated": uncut}, cfg)
  assert 0 < packed["truncated"].sum() < config.batch_size / 2
  return model_arrays(packed), model_arrays(unpacked(packed, cfg))


def step(config, mesh_sizes, batch, start):
  """Metrics, gradients and running statistics of one step on that mesh."""
  c = config.copy_and_resolve_references()
  c.mesh.update(mesh_sizes)
  run = build_lib.build(c)
  state = jax.device_put(start, jax.tree.map(lambda x: x.sharding, run.abstract_state))
  with jax.set_mesh(run.mesh):
    state, metrics = run.train_step(state, sharding.put_batch(batch, run.mesh))
  return jax.device_get((metrics, adam_gradients(state), state.batch_stats))


@pytest.mark.parametrize(("preset", "accumulate", "mesh_sizes"), [
  ("", 2, MESHES[0]),
  pytest.param("clip", 1, MESHES[2], marks=pytest.mark.slow),
  pytest.param("siglip", 1, MESHES[0], marks=pytest.mark.slow),
  pytest.param("plus", 1, MESHES[1], marks=pytest.mark.slow),
], ids=str)  # fmt: skip
def test_packed_on_a_mesh_equals_unpacked_on_one_device(config, preset, accumulate, mesh_sizes):
  """Every metric and running statistic, and every tensor's gradient, to 1e-5 of its largest."""
  presets.apply(config, preset)
  config.accumulate, config.batch_size = accumulate, accumulate * B
  config.data.packing_group = B // (mesh_sizes["data"] * mesh_sizes["fsdp"])
  config.data.local_size = 8
  config.optim.clip = 0.0
  packed, plain = pair(config)
  run = build_lib.build(config)
  start = jax.device_get(state_lib.init_state(run.model, run.tx, run.mesh, 0))
  found = step(config, mesh_sizes, packed, start)
  expected = step(config, ALONE, plain, start)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  jax.tree.map(close, (found[0], found[2]), (expected[0], expected[2]))

  def same_gradient(path, a, b):
    name = sharding.path_name(path)
    a, b = (with_gradient(name, x) for x in (a, b))
    largest = np.abs(b).max(initial=0)
    assert largest > 0 or not b.size, name
    assert np.abs(a - b).max(initial=0) <= 1e-5 * largest, name

  jax.tree_util.tree_map_with_path(same_gradient, found[1], expected[1])


def test_packing_adds_no_communication(config):
  """The text tower's gradient compiled for eight devices has the same collectives."""
  config.mesh.data = 8
  config.data.packing_group = 2
  run = build_lib.build(config)
  state = run.abstract_state

  def loss(params, batch_stats, batch):
    variables = {"params": params, "batch_stats": batch_stats}
    out, _ = run.model.apply(variables, batch, train=True, mutable="batch_stats")
    return jnp.sum(jnp.sin(out["z_txt"]))

  def collectives(batch):
    batch = sharding.put_batch({k: v for k, v in batch.items() if k != "image"}, run.mesh)
    with jax.set_mesh(run.mesh):
      lowered = jax.jit(jax.grad(loss)).lower(state.params, state.batch_stats, batch)
      text = lowered.compile().as_text()
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= (\S.*?) ({kinds})(?:-start)?\(", text)
    return Counter((kind, x) for types, kind in found for x in re.findall(r"\w+\[[\d,]*\]", types))

  with_rows, plain = (collectives(batch) for batch in pair(config))
  assert sum(with_rows.values()) > 10
  assert with_rows == plain


def text_tower(dtype):
  """batch -> what the text tower reads of it, (B, W) float32."""
  tower = gpt.GPT(
    width=32, depth=2, heads=2, vocab_size=100, length=L, readout="eot", scan=True, remat="none",
    attention="short",
    pointwise="xla",
    dtype=dtype,
  )  # fmt: skip
  init = jax.jit(tower.init)(jax.random.key(0), np.zeros((1, L), int), np.ones((1, L), bool))
  # Larger than at the start of training, so that attention attends to something.
  params = jax.tree.map(lambda x: 8 * x, init)

  @jax.jit
  def read(batch):
    if "text" in batch:
      return tower.apply(params, batch["text"], batch["mask"])
    position, readout = batch["packed_position"], batch["packed_readout"]
    return tower.apply(params, batch["packed_text"], position=position, readout=readout)

  return lambda batch: np.asarray(read(model_arrays(batch)), np.float32)


def test_no_caption_sees_another(cfg):
  """Another caption in one's place, as long or shorter, moves that embedding and no other."""
  read = text_tower(jnp.float32)
  batch = captions(np.random.default_rng(0), B, L, 1 + np.arange(B) % 9)
  before = read(packing.pack(batch, cfg))
  np.testing.assert_allclose(before, read(batch), atol=1e-5)
  for row in range(B):
    other = {**batch, "text": batch["text"].copy()}
    other["text"][row] = 99 - other["text"][row]
    moved = (read(packing.pack(other, cfg)) != before).any(axis=1)
    assert moved.tolist() == [i == row for i in range(B)]
  short = batch["mask"].sum(axis=1) <= 3
  shorter = {**batch, "mask": batch["mask"] & (np.arange(L) < 3)}
  after = read(packing.pack(shorter, cfg))
  np.testing.assert_allclose(after[short], before[short], atol=1e-5)
  assert (np.abs(after - before).max(axis=1) > 0.01).tolist() == (~short).tolist()


def test_bfloat16(cfg):
  read = text_tower(jnp.bfloat16)
  batch = captions(np.random.default_rng(0), B, L, 1 + np.arange(B) % 9)
  packed, plain = read(packing.pack(batch, cfg)), read(batch)
  np.testing.assert_allclose(packed, plain, atol=0.02 * np.abs(plain).max())


# --- configuration


def test_flops_count_the_rows_that_are_computed(config):
  config.data.packing_group, config.data.packing_tokens = 16, 5  # 80 tokens: 7 rows of 12
  run = build_lib.build(config)
  none, plain = (3 * two_tower.forward_flops(run.model, (), rows) for rows in (0, 1))
  assert run.flops - none == pytest.approx((plain - none) * 7 / 16)
  config.data.text_packing = False
  assert build_lib.build(config).flops == plain


def test_what_cannot_be_packed_is_refused(config, source, tok, cfg):
  def refused(match, **changes):
    c = config.copy_and_resolve_references()
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    with pytest.raises(ValueError, match=match):
      build_lib.build(c)
    return c

  refused("text.readout='last' at the end of its row: set text.readout='eot'", text__readout="last")
  refused("data.packing_tokens=13 is more than .* text.length=12", data__packing_tokens=13)
  refused("^data.packing_tokens must be at least 1, got 0", data__packing_tokens=0)
  refused("^data.packing_group must be at least 1, got 0", data__packing_group=0)
  wrong = {"data__packing_group": 12, "batch_size": 64, "accumulate": 2, "mesh__data": 4}
  c = refused("packing_group=12 does not divide the 8 rows of a device .*; use 4$", **wrong)
  c.data.packing_group = 4
  build_lib.build(c)
  with pytest.raises(ValueError, match="packing_group=8 x accumulate=1 .* 4 rows .* use 4$"):
    take(source, tok, cfg, 1, count=4)
