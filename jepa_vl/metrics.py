"""Collapse diagnostics, the throughput meter and the metric writers."""

import functools
import json
import logging
import math
import os
import time

import jax
import jax.numpy as jnp

from jepa_vl import chips, sharding

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def diagnostics(out, temperature=0.07):
  """What the LeVLJEPA authors log of a batch, from z and p of both modalities, (B, D) each.

  Cosine of matched and of rolled (mismatched) pairs, of each prediction with its target and its
  rolled target; effective ranks; positive logit, log-sum-exp and their gap at `temperature`.
  """
  unit = lambda x: x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-8)
  z_img, z_txt, p_img, p_txt = (unit(out[k]) for k in ("z_img", "z_txt", "p_img", "p_txt"))
  cos = lambda a, b: jnp.mean(jnp.sum(a * b, axis=-1))
  rolled = lambda a: jnp.roll(a, 1, axis=0)
  positive = cos(z_img, z_txt) / temperature
  lse = jnp.mean(_logsumexp(z_img / temperature, z_txt))
  return {
    "cos/matched": cos(z_img, z_txt),
    "cos/rolled": cos(z_img, rolled(z_txt)),
    "cos/img_to_txt": cos(p_img, z_txt),
    "cos/img_to_txt_rolled": cos(p_img, rolled(z_txt)),
    "cos/txt_to_img": cos(p_txt, z_img),
    "cos/txt_to_img_rolled": cos(p_txt, rolled(z_img)),
    "rank/img": effective_rank(out["z_img"]),
    "rank/txt": effective_rank(out["z_txt"]),
    "logit/positive": positive,
    "logit/logsumexp": lse,
    "logit/gap": positive - lse,
  }


def _logsumexp(a, b):
  """Log of the sum over b's rows of exp(a . b), (B,) from (B, D) each; never a (B, B) array."""
  b = sharding.constrain(b, None, None)  # gathered once; a's rows stay where they are
  columns = b.reshape(-1, math.gcd(len(b), 1024), b.shape[1])

  def body(total, some):
    return jnp.logaddexp(total, jax.nn.logsumexp(_matmul(a, some.T), axis=1)), None

  return jax.lax.scan(body, jnp.full(len(a), -jnp.inf), columns)[0]


def singular_values(z):
  """Singular values of the centred rows, descending. z: (B, D) -> (D,) float32."""
  z = z.astype(jnp.float32)
  z = z - jnp.mean(z, axis=0)
  eigenvalues = jnp.linalg.eigvalsh(_matmul(z.T, z))
  return jnp.sqrt(jnp.maximum(eigenvalues[::-1], 0))


def effective_rank(z):
  """exp of the entropy of the normalised singular values of the centred batch; in [1, D]."""
  return rank_of_spectrum(singular_values(z))


def rank_of_spectrum(s):
  """exp of the entropy of singular values s (D,), normalised."""
  p = s / (jnp.sum(s) + 1e-12)
  return jnp.exp(-jnp.sum(p * jnp.log(p + 1e-12)))


def collapse_warning(metrics, embed_dim, rows):
  """A sentence if the logged diagnostics show collapsed embeddings, else None.

  Collapse shows as an effective rank below a fifth of what D and the rows allow (a healthy run is
  past a third once warmed up), or as predictions that fit a mismatched target as well: a point.
  """
  ceiling = min(embed_dim, rows)
  for modality in ("img", "txt"):
    rank = metrics[f"rank/{modality}"]
    predicted = "img_to_txt" if modality == "txt" else "txt_to_img"
    own, other = metrics[f"cos/{predicted}"], metrics[f"cos/{predicted}_rolled"]
    if rank < 0.2 * ceiling or (other > 0.5 and own - other < 0.1):
      return (
        f"the {modality} embeddings are collapsing: effective rank {rank:.1f} of {ceiling} "
        f"(cosine of a prediction with its target {own:.3f}, with another {other:.3f}). What "
        "prevents this in LeVLJEPA is SIGReg: check objective.lambda_img and objective.lambda_txt "
        "(the reference uses 0.02)"
      )
  return None


def peak_flops(device):
  """Published bf16 peak of a jax device in FLOP/s, or None where it is not known (a CPU)."""
  chip = chips.find(device.device_kind)
  return chip.flops if chip else None


class Meter:
  """Examples per second, MFU and the share of time spent waiting for data, between two reads.

  flops_at: function of a step's number -> FLOPs of one example in that step.
  """

  def __init__(self, batch_size, flops_at, devices):
    peak = peak_flops(devices[0])
    self._batch_size, self._flops_at = batch_size, flops_at
    self._peak = peak * len(devices) if peak else None
    self._reset()

  def _reset(self):
    self._start, self._waited, self._steps = time.perf_counter(), 0.0, 0
    self._flops = 0.0

  def step(self, number, waited):
    """Counts step `number`; `waited`: seconds that the device stood idle for its batch."""
    self._waited += waited
    self._steps += 1
    self._flops += self._batch_size * self._flops_at(number)

  def pause(self, seconds):
    """Leaves evaluation and saving out of the clock."""
    self._start += seconds

  def read(self):
    """Since the last read: examples_per_s, step_time (s), mfu or None, data_wait in [0, 1]."""
    elapsed = max(time.perf_counter() - self._start, 1e-9)
    rate = self._steps * self._batch_size / elapsed
    rates = {
      "examples_per_s": rate,
      "step_time": elapsed / max(self._steps, 1),
      "mfu": self._flops / elapsed / self._peak if self._peak else None,
      "data_wait": min(self._waited / elapsed, 1.0),
    }
    self._reset()
    return rates


class Progress:
  """A progress bar on a terminal; elsewhere one line per logged step."""

  def __init__(self, steps, start):
    import tqdm  # late: see Writer
    import tqdm.contrib.logging

    on = jax.process_index() == 0
    self._bar = tqdm.tqdm(
      total=steps, initial=start, unit="step", disable=None if on else True, dynamic_ncols=True
    )
    self._print = on and self._bar.disable
    # Log lines are written above the bar, not through it.
    self._redirect = tqdm.contrib.logging.logging_redirect_tqdm([logging.getLogger("jepa_vl")])
    self._steps, self._seen = steps, start

  def __enter__(self):
    self._redirect.__enter__()
    return self

  def __exit__(self, *error):
    self._redirect.__exit__(*error)
    self._bar.close()

  def step(self, step):
    """Moves the bar to `step`."""
    self._bar.update(step - self._seen)
    self._seen = step

  def log(self, step, values):
    """Shows a logged step's loss and rates."""
    mfu = "" if values["mfu"] is None else f", MFU {values['mfu']:.1%}"
    text = (
      f"loss {values['loss']:.4f}, {values['examples_per_s']:.0f} examples/s{mfu}, "
      f"{values['step_time'] * 1e3:.0f} ms/step, waiting for data {values['data_wait']:.0%}"
    )
    self._bar.set_postfix_str(text)
    if self._print:
      left = (self._steps - step) * values["step_time"] / 60
      print(f"step {step}/{self._steps}: {text}, {left:.1f} min left", flush=True)


class Writer:
  """metrics.jsonl, evals.jsonl and TensorBoard (and W&B when asked for) in the workdir.

  Only process 0 writes. After a resume the lines past `resumed_step` are cut off, so that a
  step stands in a file once; None leaves them all.
  """

  def __init__(self, workdir, *, resumed_step, wandb=""):
    self._on = jax.process_index() == 0
    self._workdir = workdir
    self._wandb = None
    if not self._on:
      return
    import tensorboardX  # late: it is slow to import and only one process needs it

    resumed = resumed_step is not None
    for name in ("metrics.jsonl", "evals.jsonl") if resumed else ():
      _rewrite(os.path.join(workdir, name), lambda r: r["step"] <= resumed_step)
    self._tensorboard = tensorboardX.SummaryWriter(
      os.path.join(workdir, "tensorboard"), purge_step=resumed_step + 1 if resumed else None,
      flush_secs=30,
    )  # fmt: skip
    if wandb:
      self._wandb = _start_wandb(wandb, workdir)

  def metrics(self, step, values):
    """One training step's scalars."""
    if self._on:
      self._append("metrics.jsonl", {"step": step, **values})
      self._scalars(step, values)

  def evaluation(self, step, name, values):
    """One evaluation's scalars; a repeated evaluation takes the place of the first."""
    if self._on:
      path = os.path.join(self._workdir, "evals.jsonl")
      _rewrite(path, lambda r: (r["step"], r["name"]) != (step, name))
      self._append("evals.jsonl", {"step": step, "name": name, "metrics": values})
      beside = ("@low", "@high")  # a curve each would hide the others
      curves = {k: v for k, v in values.items() if not k.endswith(beside)}
      self._scalars(step, {f"{name}/{k}": v for k, v in curves.items()})

  def close(self):
    if self._on:
      self._tensorboard.close()
    if self._wandb:
      self._wandb.finish()

  def _append(self, name, record):
    with open(os.path.join(self._workdir, name), "a") as f:
      f.write(json.dumps(record) + "\n")

  def _scalars(self, step, values):
    scalars = {k: v for k, v in values.items() if v is not None and math.isfinite(v)}
    for name, value in scalars.items():
      self._tensorboard.add_scalar(name, value, step)
    if self._wandb:
      self._wandb.log(scalars, step=step)


def read_jsonl(path):
  """All complete records of a JSONL file; [] if there is none. A line cut by a kill is left out."""
  if not os.path.exists(path):
    return []
  records = []
  with open(path) as f:
    for number, line in enumerate(f, 1):
      if not line.endswith("\n"):
        break
      try:
        records.append(json.loads(line))
      except json.JSONDecodeError as e:
        raise ValueError(f"{path} line {number} is no JSON ({e}); delete that line") from e
  return records


def _rewrite(path, keep):
  if os.path.exists(path):
    kept = [r for r in read_jsonl(path) if keep(r)]
    with open(path + ".tmp", "w") as f:
      f.writelines(json.dumps(r) + "\n" for r in kept)
    os.replace(path + ".tmp", path)


def _start_wandb(project, workdir):
  try:
    import wandb
  except ImportError as e:
    raise ValueError(
      f"wandb={project!r} was asked for, but the package is not installed: pip install wandb, "
      "or leave the key empty"
    ) from e
  # A workdir's own run: a resumed one goes on in it, and equal folder names do not share one.
  path = os.path.join(workdir, "wandb_id")
  known = None
  if os.path.exists(path):
    with open(path) as f:
      known = f.read()
  run = wandb.init(project=project, dir=workdir, resume="allow", id=known or None)
  with open(path, "w") as f:
    f.write(run.id)
  return run
