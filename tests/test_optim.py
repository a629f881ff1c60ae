"""Schedules follow their formulas; one optimizer step is PyTorch's AdamW."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from jepa_vl import optim
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


@pytest.mark.parametrize(
  ("key", "message"),
  [
    ("name", "optim.name must be one of adamw, got 'other'"),
    ("schedule", "optim.schedule must be one of cosine, wsd, got 'other'"),
    ("decay_on", "optim.decay_on must be 'all' or 'matrices', got 'other'"),
  ],
)
def test_unknown_names_are_refused(cfg, key, message):
  cfg[key] = "other"
  with pytest.raises(ValueError, match=message):
    optim.make_optimizer(cfg, 10)
