"""The train step: a pure function of (state, batch), and its jitted, sharded form."""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jepa_vl import metrics as metrics_lib
from jepa_vl import sharding
from jepa_vl.state import TrainState


def make_train_step(
  model, objective, tx, *, seed, accumulate, log_every, probe=None, shard_optimizer=False
):
  """Returns train_step(state, batch) -> (state, metrics), pure.

  With `accumulate` = A the batch is cut into A micro-batches of every A-th row, whose gradients
  are averaged before one optimizer step. BatchNorm and SIGReg see one micro-batch at a time, as
  they would see a batch of B / A: it is A small batches' mean gradient, not one large batch's.
  Running statistics pass through the micro-batches in order.

  metrics: float32 scalars `loss`, `grad_norm`, `param_norm` (after the step), one per objective
  term and learned scalar, and `metrics.diagnostics` of the last micro-batch, computed in every
  `log_every`-th step and zero in the others.

  probe: an OnlineProbe, for which batches have `label`. Its loss is of stopped gradients and has
  no part in `loss` or `grad_norm`, so the encoder trains as without it.

  shard_optimizer: as of `state.abstract_state`; each replica computes its part of the update.
  """

  def loss_fn(trained, batch_stats, batch, rng, due):
    params, weights = trained
    variables = {"params": params, "batch_stats": batch_stats}
    rng_objective, rng_dropout = jax.random.split(rng)
    out, new = model.apply(
      variables, batch, train=True, mutable=["batch_stats"], rngs={"dropout": rng_dropout}
    )
    loss, terms = objective(out, rng_objective)
    terms = {"loss": loss, **terms, **{name: out[name] for name, _ in model.scalars}}
    if probe:
      apart, of_probe = probe.loss(weights, jax.lax.stop_gradient(out["cls"]), batch["label"])
      loss, terms = loss + apart, terms | of_probe
    return loss, (terms, _diagnose(out, due), new["batch_stats"])

  grad_fn = _accumulated(jax.grad(loss_fn, has_aux=True), accumulate)

  def train_step(state, batch):
    rng = jax.random.fold_in(jax.random.key(seed), state.step)
    due = (state.step + 1) % log_every == 0
    trained = state.params, state.probe.get("weights")
    (grads, of_probe), (terms, diagnostics, batch_stats) = grad_fn(
      trained, state.batch_stats, batch, rng, due
    )
    if shard_optimizer:
      grads = sharding.constrain_to(grads, sharding.replica_spec)
    with jax.named_scope("optimizer"):
      updates, opt = tx.update(grads, state.opt, state.params)
      params = optax.apply_updates(state.params, updates)
    norms = {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
    metrics = {**terms, **norms, **diagnostics}
    probed = probe.update(state.probe, of_probe) if probe else state.probe
    return TrainState(state.step + 1, params, batch_stats, opt, probed), metrics

  return train_step


def _accumulated(grad_fn, accumulate):
  """grad_fn over `accumulate` micro-batches: mean gradients and terms, the last's diagnostics."""

  def micro(trained, batch_stats, batch, rng, due, i):
    rows = jax.tree.map(lambda x: _every(x, accumulate, i), batch)
    return grad_fn(trained, batch_stats, rows, jax.random.fold_in(rng, i), due)

  def accumulated(trained, batch_stats, batch, rng, due):
    def body(carry, i):
      batch_stats, sums = carry
      grads, (terms, diagnostics, batch_stats) = micro(trained, batch_stats, batch, rng, due, i)
      sums = jax.tree.map(lambda a, b: a + b / accumulate, sums, (grads, terms))
      return (batch_stats, sums), diagnostics

    shapes = jax.eval_shape(micro, trained, batch_stats, batch, rng, due, 0)
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0], shapes[1][0]))
    (batch_stats, (grads, terms)), diagnostics = jax.lax.scan(
      body, (batch_stats, sums), jnp.arange(accumulate)
    )
    return grads, (terms, jax.tree.map(lambda x: x[-1], diagnostics), batch_stats)

  return accumulated if accumulate > 1 else lambda *args: micro(*args, 0)


def _diagnose(out, due):
  """`metrics.diagnostics` of the embeddings and predictions where `due`, else zeros."""
  out = {k: out[k] for k in ("z_img", "z_txt", "p_img", "p_txt")}
  if out["p_img"].ndim == 3:  # every view's prediction: the first one's stands for them
    out["p_img"] = out["p_img"][0]
  diagnostics = metrics_lib.diagnostics
  zeros = lambda out: jax.tree.map(jnp.zeros_like, jax.eval_shape(diagnostics, out))
  return jax.lax.cond(due, diagnostics, zeros, jax.lax.stop_gradient(out))


def _every(x, stride, i):
  # A strided cut leaves every device its own rows; a contiguous one would move them all.
  return x.reshape(-1, stride, *x.shape[1:])[:, i]


def jit_train_step(train_step, abstract_state, mesh):
  """Jits with the state's shardings, rows split over data and fsdp, and the state donated."""
  state = jax.tree.map(lambda x: x.sharding, abstract_state)
  replicated = NamedSharding(mesh, P())
  rows = NamedSharding(mesh, P(sharding.BATCH))
  # XLA's own products for GPUs leave biases and residuals to passes of their own; cuBLAS adds them.
  nvidia = mesh.devices.flat[0].platform in ("gpu", "cuda")
  return jax.jit(
    train_step,
    in_shardings=(state, rows),
    out_shardings=(state, replicated),
    donate_argnums=0,
    compiler_options={"xla_gpu_enable_triton_gemm": False} if nvidia else None,
  )
