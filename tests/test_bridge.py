"""The bridge into a frozen language model: where its loss is, what it changes, how it goes on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jepa_vl import sharding
from jepa_vl.evals import bridge_fit, scratch_language
from jepa_vl.model import bridge as bridge_lib
from jepa_vl.model import language

ASKED = ["is it red ?", "what is it ?", "is it ?", "what ?"] * 4
SAID = ["no", "a ring", "no", "ring"] * 4
HOW = bridge_fit.Fit(steps=6, batch_size=8, lr=1e-2, warmup=1, weight_decay=0.0, seed=0)


@pytest.fixture(scope="module")
def speaker():
  """A language model of random weights and a tokenizer of its few words."""
  tokenizer, size = scratch_language.words([*ASKED, *SAID, "look : so :"])
  c = language.Config(
    vocab_size=size, width=32, depth=1, heads=2, kv_heads=1, head_dim=16, hidden=64, length=64,
    norm="rms", norm_eps=1e-5, positions="rotary", mlp="swiglu", qkv_bias=False, out_bias=False,
    mlp_bias=False, tied=True, rope_theta=1e4,
  )  # fmt: skip
  model = language.LanguageModel(c, True, "none", jnp.float32)
  one = jnp.zeros((1, 1), jnp.int32)
  init = jax.jit(lambda key: model.init(key, one, one > -1, method="of_tokens")["params"])
  params = jax.tree.map(lambda x: 4 * x, init(jax.random.key(0)))  # surer of what it says
  return bridge_fit.Speaker(model, params, tokenizer)


@pytest.fixture(scope="module")
def prompts(speaker):
  return bridge_fit.Prompts(
    speaker.tokenizer, "look : {image} {question} so :", ASKED, SAID, answer_tokens=3
  )


def features(rows):
  return np.random.default_rng(0).standard_normal((16, 4, 6)).astype(np.float32)[rows]


def fit(speaker, prompts, mesh, how=HOW, folder="", params=None):
  bridge = bridge_lib.Bridge(32, 16, speaker.scale, jnp.float32)
  tx = how.optimizer()
  init = lambda key: bridge.init(key, jnp.zeros((1, 4, 6)))["params"]
  state = bridge_fit.start(init, tx, mesh, 0)
  step = bridge_fit.make_step(bridge, speaker.model, tx, prompts.opening)
  seen = []

  def take(k):
    seen.append(k)
    rows = how.rows(k, len(prompts))
    return {**prompts.batch(rows), "features": features(rows)}

  state = bridge_fit.train(step, state, speaker.params, take, how, mesh, "a test", folder)
  return bridge, state, seen


def test_pooling_keeps_rows_in_order():
  x = jnp.arange(16.0).reshape(1, 4, 4, 1)
  assert bridge_lib.pool(x, 1)[0, :, 0].tolist() == list(range(16))
  assert bridge_lib.pool(x, 2)[0, :, 0].tolist() == [2.5, 4.5, 10.5, 12.5]
  with pytest.raises(ValueError, match="pool=3 does not divide the grid of 4 x 4"):
    bridge_lib.pool(x, 3)


def test_image_tokens_begin_at_the_scale_of_words(speaker):
  bridge = bridge_lib.Bridge(32, 16, speaker.scale, jnp.float32)
  for size in (1.0, 100.0):
    x = size * features(slice(None))
    out = bridge.apply(bridge.init(jax.random.key(0), x), x)
    assert float(jnp.sqrt(jnp.mean(out**2))) == pytest.approx(speaker.scale, rel=1e-3)


def loss_of(speaker, prompts, image, rows=slice(3)):
  """Of the first rows."""
  batch = {k: v[rows] for k, v in prompts.batch(np.arange(16)).items()}
  loss = lambda p, x: bridge_fit.loss(speaker.model, p, x, batch, prompts.opening)
  return float(jax.jit(loss)(speaker.params, image[rows]))


def test_the_loss_is_of_the_answers_alone(speaker, prompts):
  """As read off the logits of each row by itself, without any padding."""
  image = np.random.default_rng(1).standard_normal((16, 4, 32)).astype(np.float32) * 0.1
  found = loss_of(speaker, prompts, image)
  encode, model = speaker.tokenizer.encode, speaker.model

  @jax.jit
  def logits_of(params, before, image, after):
    embed = lambda ids: model.apply({"params": params}, ids[None], method="embed")
    x = jnp.concatenate([embed(before), image[None], embed(after)], axis=1)
    return model.apply({"params": params}, x, jnp.ones(x.shape[:2], bool))[0][0]

  losses = []
  for i in range(3):  # of another length each
    text = encode(f" {ASKED[i]} so :", start=False)
    answer = np.array([*encode(SAID[i], start=False), speaker.tokenizer.ends[0]])
    before, after = np.array(encode("look :", start=True)), np.array([*text, *answer])
    logits = logits_of(speaker.params, before, image[i], after)[-len(answer) - 1 : -1]
    losses += optax.softmax_cross_entropy_with_integer_labels(logits, answer).tolist()
  assert len(losses) == 2 + 3 + 2
  assert float(found) == pytest.approx(np.mean(losses), abs=1e-5)


def test_only_the_bridge_learns(speaker, prompts, mesh):
  """The language model gets no gradient and no optimizer state, and the answers improve."""
  before = jax.tree.map(np.array, speaker.params)
  bridge, state, _ = fit(speaker, prompts, mesh, dataclasses.replace(HOW, steps=40))
  jax.tree.map(np.testing.assert_array_equal, before, speaker.params)
  sizes = {x.shape for x in jax.tree.leaves(state.opt)}
  assert not sizes & {x.shape for x in jax.tree.leaves(before) if x.ndim > 2}
  x = features(np.arange(16))
  first = bridge.init(jax.random.key(0), x)
  losses = [loss_of(speaker, prompts, bridge.apply(p, x), slice(16))
            for p in (first, {"params": state.params})]  # fmt: skip
  assert losses[1] < losses[0] - 0.3


def test_every_mesh_trains_the_same_bridge(speaker, prompts, mesh):
  _, one, _ = fit(speaker, prompts, mesh)
  many = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  _, other, _ = fit(speaker, prompts, many)
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4)
  jax.tree.map(close, one.params, other.params)


@pytest.mark.parametrize("devices", [3, 6])
def test_a_batch_that_the_devices_do_not_divide_trains_the_same(speaker, prompts, mesh, devices):
  """The rows that fill it up count for nothing."""
  _, one, _ = fit(speaker, prompts, mesh)
  odd = sharding.make_mesh(data=devices, fsdp=1, tensor=1, devices=jax.devices()[:devices])
  _, other, _ = fit(speaker, prompts, odd)
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4)
  jax.tree.map(close, one.params, other.params)


def test_a_stopped_fit_goes_on_as_if_it_had_not(speaker, prompts, mesh, tmp_path, monkeypatch):
  _, straight, _ = fit(speaker, prompts, mesh)
  monkeypatch.setattr(bridge_fit, "_SAVED", 0)
  stop = lambda self, step, count: 1 / 0 if step == 4 else rows(self, step, count)
  rows = bridge_fit.Fit.rows
  close, closed = bridge_fit.Checkpoints.close, []
  with monkeypatch.context() as m, pytest.raises(ZeroDivisionError):
    m.setattr(bridge_fit.Fit, "rows", stop)
    m.setattr(bridge_fit.Checkpoints, "close", lambda self: closed.append(close(self)))
    fit(speaker, prompts, mesh, folder=str(tmp_path / "fit"))
  _, resumed, seen = fit(speaker, prompts, mesh, folder=str(tmp_path / "fit"))
  assert closed and seen == [4, 5]  # the save in flight was finished
  jax.tree.map(np.testing.assert_array_equal, straight.params, resumed.params)
  assert fit(speaker, prompts, mesh, folder=str(tmp_path / "fit"))[2] == []  # done before


def test_batches_are_of_seed_and_step_alone():
  how = dataclasses.replace(HOW, batch_size=5)
  rows = np.concatenate([how.rows(k, 10) for k in range(4)])
  assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
  assert rows[:10].tolist() != rows[10:].tolist()
  assert how.rows(3, 10).tolist() == rows[15:].tolist()


def test_answers_do_not_depend_on_their_batch(speaker, prompts, mesh):
  bridge, state, _ = fit(speaker, prompts, mesh)
  of_batch = bridge_fit.make_answer(bridge, speaker, prompts)
  found = [
    bridge_fit.answer(of_batch, state.params, speaker, prompts, features, mesh, size)
    for size in (3, 16)
  ]
  assert found[0] == found[1] and len(found[0]) == 16


def test_a_template_needs_both_places(speaker):
  for template in ("{question}", "{image}", "{question} {image}"):
    with pytest.raises(ValueError, match="must hold {image} and, behind it, {question}"):
      bridge_fit.Prompts(speaker.tokenizer, template, ASKED, SAID, 3)
