"""Every objective against plain PyTorch: values and gradients, alone and through the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch_reference as reference  # noqa: E402

from jepa_vl import objectives, optim  # noqa: E402
from jepa_vl import step as step_lib  # noqa: E402
from jepa_vl.interop import levljepa  # noqa: E402
from jepa_vl.interop.variables import merge  # noqa: E402
from jepa_vl.model import two_tower  # noqa: E402
from jepa_vl.objectives.sigreg import _directions  # noqa: E402
from jepa_vl.state import TrainState  # noqa: E402

pytestmark = pytest.mark.torch

B, D, VIEWS, GLOBAL = 24, 16, 3, 2


def same_directions(rng, dim, num_slices):
  """The directions of our image and text SIGReg under that key, (D, M) each."""
  draw = lambda key: np.moveaxis(np.asarray(_directions(key, dim, num_slices)), 0, 1)
  return [torch.tensor(draw(key).reshape(dim, num_slices)) for key in jax.random.split(rng)]


def relative_error(ours, theirs):
  """Largest difference over the largest value; where all of theirs is zero, ours must be zero."""
  ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
  assert ours.shape == theirs.shape
  size, difference = np.abs(theirs).max(initial=0), np.abs(ours - theirs).max(initial=0)
  return float(difference / size if size else np.inf if difference else 0.0)


# Arrays alone


def arrays(cfg, log_scale=2.3, noise=0.8, every_view=True):
  """What a model could have returned: embeddings off centre, predictions near their targets."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  z_txt = 1.3 * normal(B, D) + 0.2
  out = {"z_img": 0.5 * z_txt + noise * normal(B, D), "z_txt": z_txt}
  if cfg.name in ("levljepa", "levljepa_plus"):
    out |= {"p_img": z_txt + 0.5 * normal(B, D), "p_txt": out["z_img"] + 0.5 * normal(B, D)}
  if cfg.name == "levljepa_plus":
    out["views"] = out["z_img"] + 0.4 * normal(VIEWS, B, D)
    out["p_img"] = out["p_img"] + 0.5 * normal(VIEWS, B, D) if every_view else out["p_img"]
  if cfg.name in ("clip", "siglip"):
    out["log_scale"] = np.float32(log_scale)
  if cfg.name == "siglip":
    out["bias"] = np.float32(-10.0)
  return out


def in_torch(cfg, out, A, dtype, processes=1):
  """The reference's terms with the loss, and the gradient of each for each array."""
  cfg = dict(cfg)
  out = {k: torch.tensor(x, dtype=dtype, requires_grad=True) for k, x in out.items()}
  A = [a.to(dtype) for a in A]
  if processes > 1:
    loss, terms = reference.of_processes(cfg, out, A, processes)
  else:
    loss, terms = reference.objective(cfg, out, A)
  terms = {**terms, "loss": loss}
  names, leaves = zip(*out.items(), strict=True)
  grads = {}
  for term, value in terms.items():
    grad = torch.autograd.grad(value, leaves, retain_graph=True, materialize_grads=True)
    grads[term] = dict(zip(names, grad, strict=True))
  return {k: v.detach() for k, v in terms.items()}, grads


ABOVE = np.log(100.0) + 0.3  # CLIP's scale is capped at 100

# changes of the config's objective, changes of the arrays
ARRAY_CASES = {
  "mse": ({}, {}),
  "mse_sum": ({"align": "mse_sum"}, {}),
  "cosine": ({"align": "cosine"}, {}),
  "no stop-gradient": ({"stop_gradient": False}, {}),
  "two groups": ({"group_size": B // 2}, {}),
  "multiplier": ({"scale_rows": 5}, {}),
  "lambdas, knots": ({"lambda_img": 0.3, "lambda_txt": 0.1, "knots": 9, "t_max": 5.0}, {}),
  "plus, views": ({"name": "levljepa_plus"}, {}),
  "plus, mean": ({"name": "levljepa_plus"}, {"every_view": False}),
  "plus, cosine, two groups": (
    {"name": "levljepa_plus", "align": "cosine", "group_size": B // 2, "lambda_multi": 0.3}, {},
  ),
  "clip": ({"name": "clip"}, {}),
  "clip above the cap": ({"name": "clip"}, {"log_scale": ABOVE}),
  "clip above the cap, matched": ({"name": "clip"}, {"log_scale": ABOVE, "noise": 0.6}),
  "siglip": ({"name": "siglip", "chunk_size": 0}, {}),
  "siglip in chunks": ({"name": "siglip", "chunk_size": 8}, {}),
}  # fmt: skip
# At the scale of 100 a cosine's rounding is 6e-6 of a logit, and the loss here no more than 0.005.
TOLERANCE = {"clip above the cap, matched": 1e-4}


@pytest.mark.parametrize("case", ARRAY_CASES)
def test_terms_and_their_gradients(config, case):
  """Every term and the loss, and the gradient of each for each array: 1e-5.

  The reference is of float32, as ours, and of float64: what remains there is our own rounding.
  """
  cfg = config.objective
  changes, kinds = ARRAY_CASES[case]
  cfg.update({"num_slices": 128, "group_size": 0, **changes})
  out = arrays(cfg, **kinds)
  objective = objectives.from_config(cfg)
  rng = jax.random.key(3)

  def ours(out):
    loss, terms = objective(out, rng)
    terms = {**terms, "loss": loss}
    return terms, terms

  with jax.default_matmul_precision("highest"):
    grads, terms = jax.jit(jax.jacrev(ours, has_aux=True))(jax.tree.map(jnp.asarray, out))
  A = same_directions(rng, D, cfg.num_slices)
  worst = {}
  for dtype in (torch.float32, torch.float64):
    their_terms, their_grads = in_torch(cfg, out, A, dtype)
    assert terms.keys() == their_terms.keys()
    values = [relative_error(terms[k], their_terms[k]) for k in terms]
    slopes = [relative_error(grads[k][x], their_grads[k][x]) for k in terms for x in out]
    worst[dtype] = max(values), max(slopes)
  said = (f"{dtype}: terms {a:.1e}, gradients {b:.1e}" for dtype, (a, b) in worst.items())
  print(f"\n{case}:", "; ".join(said))
  assert np.max(list(worst.values())) < TOLERANCE.get(case, 1e-5)


@pytest.mark.parametrize("name", ["levljepa", "levljepa_plus"])
def test_groups_are_the_processes_of_the_reference(config, name):
  """Two groups of B/2: what two processes with B/2 rows each average, as the releases train."""
  cfg = config.objective
  cfg.update({"name": name, "num_slices": 128, "group_size": B // 2, "scale_rows": B // 2})
  out = arrays(cfg)
  objective = objectives.from_config(cfg)
  rng = jax.random.key(3)
  loss, grads = jax.jit(jax.value_and_grad(lambda out: objective(out, rng)[0]))(out)
  A = same_directions(rng, D, cfg.num_slices)
  terms, their_grads = in_torch(cfg, out, A, torch.float32, processes=2)
  errors = [relative_error(grads[x], their_grads["loss"][x]) for x in out]
  of_loss = relative_error(loss, terms["loss"])
  print(f"\n{name}, two processes: loss {of_loss:.1e}, gradients {max(errors):.1e}")
  assert max(errors) < 1e-5 and of_loss < 1e-5
  alone, _ = in_torch({**cfg, "group_size": 0}, out, A, torch.float32)
  assert relative_error(alone["loss"], terms["loss"]) > 1e-3  # it does matter


# Through the model

VOCABULARY, LENGTH, STEPS = 97, 12, 20

# changes of the configuration
MODEL_CASES = {
  "mse": {},
  "cosine": {"objective.align": "cosine"},
  "two groups": {"objective.group_size": B // 2, "objective.scale_rows": B // 2},
  "last": {"text.readout": "last", "objective.align": "mse_sum"},
  "plus": {"objective.name": "levljepa_plus"},
  "plus, mean": {"objective.name": "levljepa_plus", "model.predict_from": "mean"},
  "clip": {"objective.name": "clip", "model.predictor_depth": 0},
  "siglip": {"objective.name": "siglip", "model.predictor_depth": 0, "objective.chunk_size": 8},
}
TRAINED = [name for name in MODEL_CASES if name not in ("last", "plus, mean")]


@pytest.fixture
def case(request, config, monkeypatch):
  """(name, configuration) of one of MODEL_CASES: small, with the method's heads and optimizer."""
  monkeypatch.setitem(two_tower.SIZES, "nano", (128, 3, 2))
  config.batch_size, config.steps = B, STEPS
  config.model.update({"patch_size": 4, "embed_dim": D, "hidden_dim": 48, "predictor_depth": 4})
  config.text.length = LENGTH
  config.objective.update({"num_slices": 128, "group_size": 0, "lambda_img": 0.02})
  config.optim.update({"lr": 1e-3, "warmup": 5, "weight_decay": 0.1, "clip": 0.1})
  config.update_from_flattened_dict(MODEL_CASES[request.param])
  return request.param, config


def both_models(config):
  """The reference with random weights, our model, and the same weights as its variables."""
  c = config.model
  width, depth, heads = two_tower.SIZES[c.size]
  scalars = objectives.learned_scalars(config.objective)
  theirs = reference.Model(
    width=width, depth=depth, heads=heads, image_size=c.image_size, patch_size=c.patch_size,
    vocab_size=VOCABULARY, length=LENGTH, readout=config.text.readout, embed_dim=c.embed_dim,
    hidden_dim=c.hidden_dim, predictor_depth=c.predictor_depth, predict_from=c.predict_from,
    scalars=scalars,
  )  # fmt: skip
  ours = two_tower.from_config(
    c, config.text, vocab_size=VOCABULARY, dtype=jnp.float32, scalars=scalars
  )
  arrays = lambda tensors: {k: x.detach().numpy().copy() for k, x in tensors.items()}
  files = {
    "vision": arrays({**theirs.image.state_dict(), **theirs.scalars}),
    "text": arrays(theirs.text.state_dict()),
  }
  return theirs, ours, merge({name: levljepa.read_file(flat) for name, flat in files.items()})


def by_their_names(variables):
  """Variables, or gradients in their place, by the reference's parameter names."""
  named = {}
  for modality in ("image", "text"):
    for name, x in levljepa.to_file(variables, modality, step=0).items():
      named[f"scalars.{name}" if name in ("log_scale", "bias") else f"{modality}.{name}"] = x
  table = "text.encoder.wpe.weight"  # files have 1024 rows
  return {**named, table: named[table][:LENGTH]}


def random_batch(config, seed):
  """Images as bytes, or views as floats, and captions of all lengths."""
  rng = np.random.default_rng(seed)
  S = config.model.image_size
  if config.objective.name == "levljepa_plus":
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    half = S // 2
    images = {
      "global": normal(B, GLOBAL, S, S, 3),
      "local": normal(B, VIEWS - GLOBAL, half, half, 3),
    }
  else:
    images = {"image": rng.integers(0, 256, (B, S, S, 3), dtype=np.uint8)}
  text = rng.integers(0, VOCABULARY, (B, LENGTH)).astype(np.int32)
  mask = np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (B, 1))
  return {**images, "text": text, "mask": mask}


def torch_terms(config, model, batch, A):
  """Every term and the loss of the reference, whose processes are our groups."""
  out = model({k: torch.tensor(x) for k, x in batch.items()})
  cfg = config.objective.to_dict()
  processes = B // (cfg["group_size"] or B)
  if processes > 1:
    loss, terms = reference.of_processes(cfg, out, A, processes)
  else:
    loss, terms = reference.objective(cfg, out, A)
  return {**terms, "loss": loss}


def objective_key(config, step):
  """The objective's key in that training step, as jepa_vl.step makes it."""
  rng = jax.random.fold_in(jax.random.key(config.seed), step)
  return jax.random.split(jax.random.fold_in(rng, 0))[0]


# The loss does not depend on these: they add a constant to every row before a BatchNorm.
WITHOUT_EFFECT = ("image.encoder.norm.bias", "text.encoder.ln_f.bias")


@pytest.mark.parametrize("case", MODEL_CASES, indirect=True)
def test_gradient_of_every_parameter(case):
  """Same weights, batch and directions: terms 1e-5; each tensor's gradient 1e-4 of its largest.

  What float32 gives through both towers, five BatchNorms and back is 3e-5. Biases without effect
  have round-off for a gradient: 1e-6 of the largest in their tower.
  """
  name, config = case
  theirs, ours, variables = both_models(config)
  batch = random_batch(config, seed=0)
  objective = objectives.from_config(config.objective)
  rng = objective_key(config, step=0)

  def loss_fn(params):
    out, new = ours.apply({**variables, "params": params}, batch, train=True, mutable="batch_stats")
    loss, terms = objective(out, rng)
    return loss, ({**terms, "loss": loss}, new["batch_stats"])

  with jax.default_matmul_precision("highest"):
    grads, (terms, stats) = jax.jit(jax.grad(loss_fn, has_aux=True))(variables["params"])
  their_terms = torch_terms(config, theirs, batch, same_directions(rng, D, 128))
  their_terms["loss"].backward()
  assert terms.keys() == their_terms.keys()
  of_terms = [relative_error(terms[k], their_terms[k].detach()) for k in terms]

  grads = by_their_names({"params": grads, "batch_stats": stats})
  trained = {k: p.grad.numpy() for k, p in theirs.named_parameters() if p.requires_grad}
  errors = {k: relative_error(grads[k], grad) for k, grad in trained.items()}
  for k in WITHOUT_EFFECT:
    tower = k[: k.index("encoder.")]
    largest = max(np.abs(grad).max() for other, grad in trained.items() if other.startswith(tower))
    assert np.abs(grads[k]).max() < 1e-6 * largest and np.abs(trained[k]).max() < 1e-6 * largest
    del errors[k]
  worst = max(errors, key=errors.get)
  print(f"\n{name}: terms {max(of_terms):.1e}, gradients {errors[worst]:.1e} ({worst})")
  assert max(of_terms) < 1e-5 and errors[worst] < 1e-4
  running = {k: x for k, x in theirs.state_dict().items() if k.endswith("running_mean")}
  assert max(relative_error(grads[k], x) for k, x in running.items()) < 1e-5


def apart(theirs, named, start):
  """{name: distance of both ends of training over the distance from the start} per parameter.

  Without what has no effect, as above; among it is the biases' middle third, which shifts all
  keys of a softmax.
  """
  distances = {}
  for k, p in theirs.named_parameters():
    if p.requires_grad and k not in WITHOUT_EFFECT:
      parts = torch.stack([torch.tensor(named[k]), p.detach(), start[k]])
      if k.endswith(("attn.qkv.bias", "attn.c_attn.bias")):
        parts = parts.reshape(3, 3, -1)[:, [0, 2]]
      ours, end, begin = parts
      distances[k] = float((ours - end).norm() / (end - begin).norm())
  return distances


@pytest.mark.parametrize("case", TRAINED, indirect=True)
def test_twenty_steps(case):
  """AdamW, clipped, warm-up and cosine, weight decay, new directions each step.

  Terms and gradient norm within 1e-3 at every step: Adam divides a gradient by its size, so that
  round-off grows into steps and the runs part slowly, to some 1e-5. Parameters end within 1e-3 of
  the way that they went, which a decay, clip or schedule of another kind would not leave so.
  """
  name, config = case
  theirs, ours, variables = both_models(config)
  update = reference.trainer(theirs, config.optim.to_dict(), STEPS)
  tx = optim.make_optimizer(config.optim, STEPS)
  train_step = jax.jit(step_lib.make_train_step(
    ours, objectives.from_config(config.objective), tx, seed=config.seed, accumulate=1, log_every=99
  ))  # fmt: skip
  params = variables["params"]
  state = TrainState(jnp.zeros((), jnp.int32), params, variables["batch_stats"], tx.init(params))
  start = {k: p.detach().clone() for k, p in theirs.named_parameters()}
  errors, losses = [], []
  for step in range(STEPS):
    batch = random_batch(config, seed=step % 4)
    with jax.default_matmul_precision("highest"):
      state, metrics = train_step(state, batch)
    A = same_directions(objective_key(config, step), D, 128)
    expected = torch_terms(config, theirs, batch, A)
    norm = update(expected["loss"])
    assert norm > config.optim.clip  # clipping is part of what is compared
    losses.append(expected["loss"].item())
    expected |= {"grad_norm": norm}
    errors.append(max(relative_error(metrics[k], x.detach()) for k, x in expected.items()))
  print(f"\n{name}: loss {losses[0]:.3f} to {losses[-1]:.3f}, terms and gradient norm apart by",
        " ".join(f"{e:.0e}" for e in errors))  # fmt: skip
  assert max(errors) < 1e-3
  named = by_their_names({"params": state.params, "batch_stats": state.batch_stats})
  distances = apart(theirs, named, start)
  worst = max(distances, key=distances.get)
  print(f"parameters: apart by {distances[worst]:.1e} of their way ({worst})")
  assert distances[worst] < 1e-3


@pytest.mark.parametrize("change", [
  {"schedule": "cosine", "warmup_from": 0.0}, {"schedule": "cosine", "warmup_from": 0.01},
  {"schedule": "wsd", "warmup_from": 0.01}, {"schedule": "wsd", "decay": 0.9, "warmup_from": 0.0},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("steps", [8, 100])
def test_schedules(config, change, steps):
  """The learning rate of every step; a run of 8 steps has no room for the warm-up of 20."""
  cfg = config.optim
  cfg.update({"warmup": 20, **change})
  theirs, ours = reference.learning_rate(cfg.to_dict(), steps), optim.make_schedule(cfg, steps)
  every = range(steps + 1)
  np.testing.assert_allclose([ours(k) for k in every], [theirs(k) for k in every], rtol=1e-5)
