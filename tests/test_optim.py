"""Schedules follow their formulas; one optimizer step is PyTorch's AdamW."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from configs import base
from jepa_vl import optim, sharding
from jepa_vl.model import two_tower


@pytest.fixture
def cfg():
  c = base.get_config().optim
  c.lr, c.warmup, c.warmup_from, c.final, c.decay = 2e-4, 100, 0.01, 0.1, 0.2
  return c


def warmup(step, cfg):
  return cfg.lr * (cfg.warmup_from + (1 - cfg.warmup_from) * step / cfg.warmup)


def cosine(cfg, progress):
  """From lr at progress 0 to lr * final at 1."""
  return cfg.lr * (cfg.final + (1 - cfg.final) * (1 + math.cos(math.pi * progress)) / 2)


@pytest.mark.parametrize("step", [0, 37, 99, 100, 101, 550, 999, 1000])
def test_cosine(cfg, step):
  expected = warmup(step, cfg) if step < 100 else cosine(cfg, (step - 100) / 900)
  assert float(optim.make_schedule(cfg, 1000)(step)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("step", [0, 37, 99, 100, 500, 799, 800, 801, 900, 999, 1000])
def test_warmup_stable_decay(cfg, step):
  cfg.schedule = "wsd"
  expected = warmup(step, cfg) if step < 100 else cosine(cfg, max(step - 800, 0) / 200)
  assert float(optim.make_schedule(cfg, 1000)(step)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", optim.SCHEDULES)
@pytest.mark.parametrize("steps", [2, 3, 10, 150])
def test_a_shortened_run_warms_up_for_half_of_it_at_most(cfg, name, steps):
  cfg.schedule, cfg.decay = name, 0.5
  schedule = optim.make_schedule(cfg, steps)
  rates = np.array([float(schedule(step)) for step in range(steps + 1)])
  peak = steps // 2
  assert rates[peak] == pytest.approx(cfg.lr)
  assert (np.diff(rates[: peak + 1]) > 0).all() and (np.diff(rates[peak:]) < 0).all()
  assert rates[-1] == pytest.approx(cfg.lr * cfg.final)


@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_a_run_of_one_step_takes_it_at_the_full_rate(cfg, name):
  cfg.schedule = name
  assert float(optim.make_schedule(cfg, 1)(0)) == pytest.approx(cfg.lr)


@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_no_warmup_starts_at_the_full_rate(cfg, name):
  cfg.schedule, cfg.warmup = name, 0
  assert float(optim.make_schedule(cfg, 1000)(0)) == pytest.approx(cfg.lr)


def test_a_decay_longer_than_what_follows_the_warmup_still_ends_at_the_final_rate(cfg):
  cfg.schedule, cfg.decay = "wsd", 1.0
  schedule = optim.make_schedule(cfg, 1000)
  assert float(schedule(550)) == pytest.approx(cosine(cfg, 0.5))
  assert float(schedule(1000)) == pytest.approx(cfg.lr * cfg.final)


@pytest.fixture
def params(config):
  model = two_tower.from_config(
    config.model, config.text, vocab_size=50, dtype=jnp.float32, scalars={"log_scale": 0.0}
  )
  batch = two_tower.dummy_batch(model, 2)
  return jax.eval_shape(lambda: model.init(jax.random.key(0), batch, train=False))["params"]


def test_decay_mask_of_all_spares_learned_scalars_alone(params):
  mask = optim.decay_mask("all")(params)
  assert not mask.pop("log_scale")
  assert all(jax.tree.leaves(mask))


def test_decay_mask_of_matrices_spares_vectors_and_positions(params):
  mask = optim.decay_mask("matrices")(params)
  assert jax.tree.structure(mask) == jax.tree.structure(params)
  decayed, spared = set(), set()
  for path, is_decayed in jax.tree_util.tree_leaves_with_path(mask):
    names = [key.key for key in path]
    (decayed if is_decayed else spared).add(names[-1])
    assert is_decayed == (names[-1] == "kernel" or "token_embedding" in names), names
  assert decayed == {"kernel", "embedding"}
  assert {"bias", "scale", "position_embedding", "log_scale"} <= spared


def adamw(params, grads_of_steps, cfg, rates, decayed):
  """torch.optim.AdamW after clip_grad_norm_, in float64."""
  p = {k: v.astype(np.float64) for k, v in params.items()}
  m, v = ({k: np.zeros_like(x) for k, x in p.items()} for _ in range(2))
  for t, (grads, lr) in enumerate(zip(grads_of_steps, rates, strict=True), start=1):
    norm = math.sqrt(sum(float(np.sum(g.astype(np.float64) ** 2)) for g in grads.values()))
    scale = min(cfg.clip / norm, 1) if cfg.clip else 1
    for k in p:
      g = grads[k].astype(np.float64) * scale
      m[k] = cfg.b1 * m[k] + (1 - cfg.b1) * g
      v[k] = cfg.b2 * v[k] + (1 - cfg.b2) * g**2
      if k in decayed:
        p[k] = p[k] * (1 - lr * cfg.weight_decay)
      denominator = np.sqrt(v[k] / (1 - cfg.b2**t)) + cfg.eps
      p[k] -= lr * (m[k] / (1 - cfg.b1**t)) / denominator
  return p


@pytest.mark.parametrize("decay_on", ["all", "matrices"])
@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
def test_steps_are_those_of_pytorch_adamw(cfg, decay_on, clip):
  """Three steps; gradients near eps show where eps stands, the large decay that it is decoupled."""
  cfg.lr, cfg.warmup, cfg.eps, cfg.weight_decay = 0.1, 1, 1e-3, 0.5
  cfg.decay_on, cfg.clip = decay_on, clip
  rng = np.random.default_rng(0)
  draw = lambda scale: {
    "kernel": (scale * rng.normal(size=(3, 4))).astype(np.float32),
    "bias": (scale * rng.normal(size=4)).astype(np.float32),
  }
  params, grads = draw(1.0), [draw(3.0), draw(1e-3), draw(1.0)]
  tx, schedule = optim.make_optimizer(cfg, 10), optim.make_schedule(cfg, 10)
  found, state = params, tx.init(params)
  for g in grads:
    updates, state = tx.update(g, state, found)
    found = optax.apply_updates(found, updates)
  rates = [float(schedule(step)) for step in range(3)]
  decayed = {"kernel", "bias"} if decay_on == "all" else {"kernel"}
  expected = adamw(params, grads, cfg, rates, decayed)
  for k in params:
    np.testing.assert_allclose(found[k], expected[k], rtol=2e-5, atol=1e-6)


def blocks(rng):
  """Parameters of one tower of three layers, W = 6, H = 2, K = 3, and of a head."""
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  attn = {"qkv": {"kernel": draw(3, 6, 3, 2, 3), "bias": draw(3, 3, 2, 3)}}
  attn["out"] = {"kernel": draw(3, 2, 3, 6)}
  mlp = {"up": {"kernel": draw(3, 6, 24)}, "down": {"kernel": draw(3, 24, 6)}}
  image = {"tower": {"blocks": {"attn": attn, "mlp": mlp}}, "cls": draw(1, 1, 6)}
  return {"image": image, "image_head": {"dense_0": {"kernel": draw(6, 5)}}}


def matrices(name, x):
  """The views of a kernel's layers as matrices that Muon takes, one by one."""
  if "qkv" in name:
    return [x[layer, :, i].reshape(6, 6) for layer in range(3) for i in range(3)]
  return [x[layer].reshape(6, 6) if "attn/out" in name else x[layer] for layer in range(3)]


def newton_schulz(m):
  """Five quintic steps of Keller Jordan's coefficients towards the nearest orthogonal matrix."""
  x = m / np.linalg.norm(m)
  for _ in range(5):
    a = x @ x.T
    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
  return x


def leaves(tree):
  return {sharding.path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("decay_on", ["all", "matrices"])
def test_muon_steps_each_layers_matrix_on_its_own(cfg, decay_on):
  """Two steps beside float64: Nesterov momentum, Newton-Schulz, size, decay; AdamW elsewhere."""
  cfg.name, cfg.lr, cfg.warmup, cfg.weight_decay, cfg.clip = "muon", 0.1, 0, 0.5, 0.0
  cfg.decay_on = decay_on
  rng = np.random.default_rng(0)
  params, grads = blocks(rng), [blocks(rng), blocks(rng)]
  tx, schedule = optim.make_optimizer(cfg, 10), optim.make_schedule(cfg, 10)
  rates = [float(schedule(step)) for step in range(2)]
  found, state = params, tx.init(params)
  for g in grads:
    updates, state = tx.update(g, state, found)
    found = optax.apply_updates(found, updates)

  start, found, steps = leaves(params), leaves(found), [leaves(g) for g in grads]
  by_muon = {k for k in start if "blocks" in k and k.endswith("kernel")}
  assert len(by_muon) == 4
  for name in by_muon:
    p, of_steps = start[name].astype(np.float64), [g[name].astype(np.float64) for g in steps]
    p = [x.copy() for x in matrices(name, p)]
    momentum = [np.zeros_like(x) for x in p]
    for t, (g, lr) in enumerate(zip(of_steps, rates, strict=True), start=1):
      for i, m in enumerate(matrices(name, g)):
        momentum[i] = 0.95 * momentum[i] + 0.05 * m
        ahead = 0.95 * momentum[i] / (1 - 0.95 ** (t + 1)) + 0.05 * m / (1 - 0.95**t)
        step = 0.2 * max(m.shape) ** 0.5 * newton_schulz(ahead)
        p[i] = p[i] - lr * (step + cfg.weight_decay * p[i])
    for a, b in zip(matrices(name, found[name]), p, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4, err_msg=name)
  rest = start.keys() - by_muon
  cut = lambda tree: {k: tree[k] for k in rest}
  decayed = {k for k in rest if decay_on == "all" or k.endswith("kernel")}
  expected = adamw(cut(start), [cut(g) for g in steps], cfg, rates, decayed)
  for name in rest:
    np.testing.assert_allclose(found[name], expected[name], atol=1e-5, err_msg=name)


def test_muon_takes_the_towers_matrices_and_its_state_is_split_as_they_are(params):
  """Momentum alone for these, two moments for the rest; RULES finds both by their paths."""
  c = base.get_config().optim
  c.name = "muon"
  state = leaves(jax.eval_shape(optim.make_optimizer(c, 10).init, params))
  names = {k for k in state if "/muon/" in k and "/mu/" in k}
  ends = ("attn/qkv/kernel", "attn/out/kernel", "mlp/up/kernel", "mlp/down/kernel")
  assert {k.partition("/mu/")[2] for k in names} == {
    f"{tower}/tower/blocks/{end}" for tower in ("image", "text") for end in ends
  }
  of_adam = [k.partition("/nu/")[2] for k in state if "/nu/" in k]
  assert len(of_adam) + len(names) == len(leaves(params))
  assert "text/token_embedding/embedding" in of_adam
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  for name in names:
    own = leaves(params)[name.partition("/mu/")[2]]
    spec = sharding.spec_for(name, state[name].shape, mesh)
    assert spec == sharding.spec_for(name.partition("/mu/")[2], own.shape, mesh) != P()


def test_muon_flops_by_the_width_of_a_layer():
  """Four W x W matrices and two of W x 4W, three layers: 5 (4 x 6 + 2 x 18) W^3 of each."""
  assert optim.muon_flops(blocks(np.random.default_rng(0))) == 3 * 300 * 6**3


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_a_first_moment_in_bfloat16_halves_it_alone_and_hardly_changes_the_steps(cfg, name):
  cfg.name, cfg.lr, cfg.warmup = name, 0.01, 0
  rng = np.random.default_rng(0)
  params, found, state = blocks(rng), {}, {}
  grads = [blocks(rng) for _ in range(3)]
  for dtype in ("float32", "bfloat16"):
    cfg.mu_dtype = dtype
    tx = optim.make_optimizer(cfg, 10)
    found[dtype], state[dtype] = params, tx.init(params)
    for g in grads:
      updates, state[dtype] = tx.update(g, state[dtype], found[dtype])
      found[dtype] = optax.apply_updates(found[dtype], updates)
  types = [{k: x.dtype.name for k, x in leaves(s).items()} for s in state.values()]
  changed = {k for k in types[0] if types[0][k] != types[1][k]}
  assert changed == {k for k in types[0] if "/mu/" in k} and len(changed) == len(leaves(params))
  assert {types[1][k] for k in changed} == {"bfloat16"}
  moved = [leaves(jax.tree.map(lambda a, b: a - b, found[d], params)) for d in found]
  for k, x in moved[0].items():
    np.testing.assert_allclose(moved[1][k], x, atol=0.05 * np.abs(x).max(), err_msg=k)


@pytest.mark.parametrize(
  ("key", "message"),
  [
    ("name", "optim.name must be one of adamw, muon, got 'other'"),
    ("schedule", "optim.schedule must be one of cosine, wsd, got 'other'"),
    ("decay_on", "optim.decay_on must be 'all' or 'matrices', got 'other'"),
    ("mu_dtype", "optim.mu_dtype must be one of float32, bfloat16, got 'other'"),
  ],
)
def test_unknown_names_are_refused(cfg, key, message):
  cfg[key] = "other"
  with pytest.raises(ValueError, match=message):
    optim.make_optimizer(cfg, 10)
