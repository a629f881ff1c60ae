"""The train step: equal under every mesh, accumulation as defined, stop-gradient that stops."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import presets
from jepa_vl import checkpoint, checks, objectives, sharding
from jepa_vl import state as state_lib
from jepa_vl.build import build

MESHES = [
  {"data": 8, "fsdp": 1, "tensor": 1},
  {"data": 1, "fsdp": 8, "tensor": 1},
  {"data": 2, "fsdp": 2, "tensor": 2, "slices": 2},
]


def example(config, vocab_size, seed=0):
  rng = np.random.default_rng(seed)
  B, S, L = config.batch_size, config.model.image_size, config.text.length
  shapes = {"image": (S,)}
  if config.data.augment == "dino":
    shapes = {"global": (2, S), "local": (3, S // 2)}
  return {
    **{k: rng.integers(0, 256, (B, *s, s[-1], 3), dtype=np.uint8) for k, s in shapes.items()},
    "text": rng.integers(0, vocab_size, (B, L)).astype(np.int32),
    "mask": np.arange(L)[None] < rng.integers(1, L + 1, (B, 1)),
  }


ALONE = {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.fixture(autouse=True)
def few_devices(monkeypatch):
  """A mesh takes as many of the eight devices as its sizes ask for."""
  make = sharding.make_mesh
  few = lambda *, slices, **sizes: make(
    **sizes, slices=slices, devices=jax.devices()[: math.prod(sizes.values())]
  )
  monkeypatch.setattr(sharding, "make_mesh", few)


def run_on(config, mesh_sizes):
  c = config.copy_and_resolve_references()
  c.mesh.update(mesh_sizes)
  return build(c)


def first_step(config, mesh_sizes):
  """State before and after one step, and the metrics, on that mesh."""
  run, c = run_on(config, mesh_sizes), config
  state = state_lib.init_state(
    run.model, run.tx, run.mesh, c.seed, shard_optimizer=c.optim.sharded
  )
  before = jax.device_get(state)
  batch = sharding.put_batch(example(c, run.model.vocab_size), run.mesh)
  with jax.set_mesh(run.mesh):
    state, metrics = run.train_step(state, batch)
  return before, state, jax.device_get(metrics)


def adam_moment(state):
  return next(s.mu for s in jax.tree.leaves(state.opt, is_leaf=lambda x: hasattr(x, "mu"))
              if hasattr(s, "mu"))  # fmt: skip


def adam_gradients(state):
  """The first step's gradients, from Adam's first moment."""
  return jax.tree.map(lambda m: np.asarray(m) / 0.1, adam_moment(state))


def with_gradient(name, leaf):
  """The part of a leaf whose gradient is not exactly zero by construction.

  A softmax does not change when all keys are shifted, and BatchNorm takes out the constant that
  the final norm's bias adds. What is computed there is round-off, which Adam turns into steps of
  up to lr in either direction.
  """
  if name.endswith("attn/qkv/bias"):
    return np.delete(leaf, 1, axis=-3)
  return leaf[:0] if name.endswith("final_norm/bias") else leaf


@pytest.mark.parametrize(
  ("preset", "mesh_sizes"),
  [
    pytest.param("", MESHES[0], marks=pytest.mark.slow),
    *[("", sizes) for sizes in MESHES[1:]],
    ("sharded optimizer", {"data": 4, "fsdp": 1, "tensor": 2}),
    ("unrolled", MESHES[2]),
    *(pytest.param(p, MESHES[2], marks=pytest.mark.slow) for p in ("plus", "clip", "siglip")),
  ],
  ids=str,
)
def test_sharded_equals_single_device(config, mesh_sizes, preset):
  """Loss terms, gradients and one AdamW step, float32, 1e-5."""
  if preset == "sharded optimizer":
    config.optim.sharded = True
  elif preset == "unrolled":
    config.model.scan = False
  else:
    presets.apply(config, preset)
  config.objective.group_size = 8
  config.objective.chunk_size = 4
  config.data.local_size = 8
  config.optim.warmup_from = 1.0  # a first step of the full learning rate
  config.optim.clip = 0.0
  before, alone, metrics = first_step(config, ALONE)
  same, sharded, metrics2 = first_step(config, mesh_sizes)
  jax.tree.map(np.testing.assert_array_equal, before.params, same.params)
  for name, value in metrics.items():
    np.testing.assert_allclose(metrics2[name], value, rtol=1e-5, atol=1e-5, err_msg=name)

  def close(path, a, b):
    atol = 1e-5 * max(1, np.abs(b).max(initial=0))  # a float32 sum errs by its largest terms
    np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5, err_msg=sharding.path_name(path))

  jax.tree_util.tree_map_with_path(close, adam_gradients(alone), adam_gradients(sharded))
  jax.tree_util.tree_map_with_path(close, alone.batch_stats, jax.device_get(sharded.batch_stats))

  moved = 0
  share = 2e-3 if preset == "plus" else 1e-3  # one of a bias's 512, with three times the rows

  def close_after_adam(path, a, b, start):
    nonlocal moved
    name = sharding.path_name(path)
    a, b, start = (with_gradient(name, x) for x in (a, b, start))
    # Adam divides by the gradient's size: a component that is itself round-off may step by lr
    # either way. Those are few, and everything else agrees.
    off = np.abs(a - b) > 1e-5
    assert off.sum() <= share * off.size, f"{name}: {off.sum()} of {off.size} differ"
    moved += int((np.abs(a - start) > 1e-5).any())

  jax.tree_util.tree_map_with_path(
    close_after_adam, jax.device_get(alone.params), jax.device_get(sharded.params), before.params
  )
  assert moved > 20


@pytest.mark.slow
def test_options_that_save_are_the_same_on_every_mesh(config):
  """Patches are drawn and matrices orthogonalised as on one device."""
  config.model.update({"image_size": 32, "patch_dropout": 0.5})
  config.optim.update({"name": "muon", "mu_dtype": "bfloat16", "warmup_from": 1.0})
  before, alone, metrics = first_step(config, ALONE)
  _, sharded, metrics2 = first_step(config, MESHES[2])
  for name, value in metrics.items():
    np.testing.assert_allclose(metrics2[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
  kernel = lambda state: np.asarray(state.params["image"]["tower"]["blocks"]["mlp"]["up"]["kernel"])
  moved = [kernel(state) - kernel(before) for state in (alone, sharded)]
  size = np.sqrt(np.mean(moved[0] ** 2)) / config.optim.lr
  assert 0.05 < size < 0.25  # below 0.2, for so few rows leave directions without a gradient
  np.testing.assert_allclose(moved[1], moved[0], atol=0.02 * config.optim.lr)
  for path, x in jax.tree_util.tree_leaves_with_path(sharded.opt):
    name = sharding.path_name(path)
    if re.search("blocks/.*kernel$", name):
      assert "/mu/" in name and x.dtype == jnp.bfloat16, name
      assert np.prod(x.sharding.shard_shape(x.shape)) == x.size / 4, name


def test_a_sharded_optimizers_state_is_split_over_data_and_parameters_are_not(config):
  config.optim.sharded = True
  _, state, _ = first_step(config, {"data": 4, "fsdp": 1, "tensor": 2})
  up = lambda tree: next(
    x for path, x in jax.tree_util.tree_leaves_with_path(tree)
    if sharding.path_name(path).endswith("image/tower/blocks/mlp/up/kernel")
  )  # fmt: skip
  shard = lambda x: x.sharding.shard_shape(x.shape)
  assert shard(up(state.params)) == (4, 128, 256)
  assert shard(up(state.opt)) == (4, 32, 256)


@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_checkpoint_goes_on_with_the_optimizer_sharded_otherwise(config, sharded, tmp_path):
  """From step 1 with `optim.sharded` turned over: the state as saved, and the next step as before.

  Laid out by the new value, so that the option can be turned on when memory is short.
  """
  mesh = {"data": 4, "fsdp": 1, "tensor": 1}
  config.optim.sharded = sharded
  _, straight, _ = first_step(config, mesh)
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
  checkpoints.save(1, straight, run_on(config, mesh).meta)
  checkpoints.close()
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
  config.optim.sharded = not sharded
  other = run_on(config, mesh)
  step, state = checkpoints.restore(
    other.abstract_state, check=lambda meta: checks.resume(meta, other)
  )
  checkpoints.close()
  assert step == 1
  jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (state, straight)))
  kernel = adam_moment(state)["image"]["tower"]["blocks"]["mlp"]["up"]["kernel"]
  part = np.prod(kernel.sharding.shard_shape(kernel.shape))
  assert part == kernel.size / (1 if sharded else 4)
  config.optim.sharded = sharded
  same = run_on(config, mesh)
  batch = sharding.put_batch(example(config, same.model.vocab_size, seed=1), same.mesh)
  with jax.set_mesh(same.mesh):
    _, expected = same.train_step(straight, batch)
    _, found = other.train_step(state, batch)
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_parameters_are_split_as_the_table_says(config):
  _, state, _ = first_step(config, {"data": 2, "fsdp": 2, "tensor": 2})
  kernel = state.params["image"]["tower"]["blocks"]["mlp"]["up"]["kernel"]
  assert kernel.shape == (4, 128, 512)
  assert kernel.sharding.shard_shape(kernel.shape) == (4, 64, 256)
  for path, x in jax.tree_util.tree_leaves_with_path((state.params, state.opt)):
    name = sharding.path_name(path)
    if re.search("kernel$|token_embedding", name):  # moments too: nothing large is left whole
      assert np.prod(x.sharding.shard_shape(x.shape)) == x.size / 4, name


def test_accumulation_is_the_mean_over_micro_batches(config):
  """Two micro-batches of every second row, each with its own BatchNorm and SIGReg: the mean."""
  config.optim.clip = 0.0
  config.accumulate = 2
  _, state, metrics = first_step(config, ALONE)
  run = build(config)
  objective = objectives.from_config(config.objective)
  start = state_lib.init_state(run.model, run.tx, run.mesh, config.seed)
  batch = example(config, run.model.vocab_size)
  rng = jax.random.fold_in(jax.random.key(config.seed), 0)
  stats, grads, losses = start.batch_stats, [], []
  for i in range(2):
    rows = {k: v[i::2] for k, v in batch.items()}

    def loss_fn(params, stats=stats, rows=rows, i=i):
      out, new = run.model.apply(
        {"params": params, "batch_stats": stats}, rows, train=True, mutable="batch_stats"
      )
      rng_objective = jax.random.split(jax.random.fold_in(rng, i))[0]
      return objective(out, rng_objective)[0], new["batch_stats"]

    (loss, stats), g = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(start.params)
    losses.append(loss)
    grads.append(g)
  np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
  mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4)
  jax.tree.map(close, adam_gradients(state), jax.device_get(mean))
  jax.tree.map(close, jax.device_get(state.batch_stats), jax.device_get(stats))


@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize(("term", "own", "other"), [
  ("align/img_to_txt", "image", "text"), ("align/txt_to_img", "text", "image"),
])  # fmt: skip
def test_stop_gradient_stops(config, stop_gradient, term, own, other):
  """With it, the prediction of one modality gives the predicted one's tower no gradient at all."""
  config.objective.update({"stop_gradient": stop_gradient, "lambda_img": 0.0, "lambda_txt": 0.0})
  run = build(config)
  terms = objectives.from_config(config.objective)
  state = state_lib.init_state(run.model, run.tx, run.mesh, 0)
  batch = example(config, run.model.vocab_size)

  def loss(params):
    variables = {"params": params, "batch_stats": state.batch_stats}
    out, _ = run.model.apply(variables, batch, train=True, mutable="batch_stats")
    return terms(out, jax.random.key(0))[1][term]

  grads = jax.jit(jax.grad(loss))(state.params)
  norm = lambda name: sum(float(jnp.sum(jnp.abs(g))) for g in jax.tree.leaves(grads[name]))
  assert norm(own) > 0 and norm(f"{own}_predictor") > 0
  for name in (other, f"{other}_head"):
    assert (norm(name) == 0) == stop_gradient
  assert norm(f"{other}_predictor") == 0


def test_predictor_dropout_acts_on_predictions_in_training_alone(config):
  """Embeddings stay, predictions differ with the key, and evaluation knows no dropout."""
  outs = {}
  for rate in (0.0, 0.5):
    config.model.predictor_dropout = rate
    run = build(config)
    state = state_lib.init_state(run.model, run.tx, run.mesh, 0)
    batch = example(config, run.model.vocab_size)

    @functools.partial(jax.jit, static_argnums=0)
    def apply(train, key, run=run, variables=state.variables, batch=batch):
      rngs = {"dropout": jax.random.key(key)}
      return run.model.apply(variables, batch, train=train, mutable="batch_stats", rngs=rngs)[0]

    outs[rate] = [apply(True, 0), apply(True, 1), apply(False, 0)]
  same = lambda a, b, names: all(jnp.allclose(a[k], b[k], atol=1e-6) for k in names)
  z, p = ("z_img", "z_txt"), ("p_img", "p_txt")
  for without, with_dropout in zip(outs[0.0], outs[0.5], strict=True):
    assert same(without, with_dropout, z)
  assert same(outs[0.0][0], outs[0.0][1], p) and same(outs[0.0][2], outs[0.5][2], p)
  for a, b in ((outs[0.5][0], outs[0.5][1]), (outs[0.0][0], outs[0.5][0])):
    assert not any(same(a, b, (k,)) for k in p)
  _, state, metrics = first_step(config, ALONE)  # the step has a key for it
  assert np.isfinite(metrics["loss"])


def test_weights_are_applied_once(config):
  """loss = (1 - lv - lt)/2 (both alignments) + lv SIGReg(z_v) + lt SIGReg(z_t)."""
  cfg = config.objective
  cfg.update({"lambda_img": 0.1, "lambda_txt": 0.3})
  z = {k: jax.random.normal(jax.random.key(i), (16, 8))
       for i, k in enumerate(("z_img", "z_txt", "p_img", "p_txt"))}  # fmt: skip
  loss, terms = objectives.from_config(cfg)(z, jax.random.key(9))
  expected = (
    0.6 * (terms["align/img_to_txt"] + terms["align/txt_to_img"]) / 2
    + 0.1 * terms["sigreg/img"]
    + 0.3 * terms["sigreg/txt"]
  )
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  np.testing.assert_allclose(
    terms["align/img_to_txt"], np.mean((z["p_img"] - z["z_txt"]) ** 2), rtol=1e-6
  )


def test_sigreg_draws_directions_for_each_modality_and_step(config):
  """Equal embeddings score alike but not the same: M fresh directions for every call."""
  z = jax.random.normal(jax.random.key(0), (16, 8))
  out = dict.fromkeys(("z_img", "z_txt", "p_img", "p_txt"), z)
  objective = objectives.from_config(config.objective)
  terms = [objective(out, jax.random.key(i))[1] for i in range(2)]
  scores = [t[f"sigreg/{m}"] for t in terms for m in ("img", "txt")]
  assert len({float(s) for s in scores}) == 4
  np.testing.assert_allclose(scores, np.mean(scores), rtol=0.3)


@pytest.mark.parametrize("align", ["mse_sum", "cosine"])
def test_other_alignments(config, align):
  config.objective.align = align
  z = {k: jax.random.normal(jax.random.key(i), (16, 8))
       for i, k in enumerate(("z_img", "z_txt", "p_img", "p_txt"))}  # fmt: skip
  _, terms = objectives.from_config(config.objective)(z, jax.random.key(9))
  p, t = np.asarray(z["p_txt"], np.float64), np.asarray(z["z_img"], np.float64)
  cos = (p * t).sum(1) / np.linalg.norm(p, axis=1) / np.linalg.norm(t, axis=1)
  expected = {"mse_sum": ((p - t) ** 2).sum(1).mean(), "cosine": (2 - 2 * cos).mean()}[align]
  np.testing.assert_allclose(terms["align/txt_to_img"], expected, rtol=1e-5)


def test_loss_falls_on_sixteen_pairs(config):
  config.optim.warmup_from = 1.0
  config.steps = 60
  run = build(config)
  state = state_lib.init_state(run.model, run.tx, run.mesh, 0)
  batch = sharding.put_batch(example(config, run.model.vocab_size), run.mesh)
  losses = []
  with jax.set_mesh(run.mesh):
    for _ in range(40):
      state, metrics = run.train_step(state, batch)
      losses.append(float(metrics["loss"]))
  assert np.mean(losses[-5:]) < 0.5 * losses[0]
  assert int(state.step) == 40
