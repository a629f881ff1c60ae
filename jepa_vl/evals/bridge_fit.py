"""What learns and answers in the VLM evaluation: prompts as arrays, the bridge's step, answers."""

import contextlib
import dataclasses
import functools
import logging
import time
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jepa_vl import optim, sharding
from jepa_vl.checkpoint import Checkpoints
from jepa_vl.model import bridge as bridge_lib
from jepa_vl.state import TrainState

log = logging.getLogger(__name__)

_SAVED = 120  # seconds between two checkpoints, at least
_IN_FLIGHT = 8  # steps whose batches wait on the devices, at most


@dataclasses.dataclass(frozen=True)
class Fit:
  """AdamW with a warm-up and a cosine decay to 0 on `steps` shuffled batches of `batch_size`."""

  steps: int
  batch_size: int
  lr: float
  warmup: int
  weight_decay: float
  seed: int

  def optimizer(self):
    """jepa_vl.optim's, with the reference's usual keys."""
    keys = types.SimpleNamespace(
      name="adamw", schedule="cosine", lr=self.lr, warmup=self.warmup, warmup_from=0.0, final=0.0,
      weight_decay=self.weight_decay, decay_on="matrices", b1=0.9, b2=0.98, eps=1e-8, clip=1.0,
      mu_dtype="float32",
    )  # fmt: skip
    return optim.make_optimizer(keys, self.steps)

  def rows(self, step, count):
    """Which of `count` rows batch `step` has: a function of seed and step alone."""
    places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
    return np.array([_order(self.seed, p // count, count)[p % count] for p in places.tolist()])


@functools.lru_cache(maxsize=2)
def _order(seed, epoch, count):
  return np.random.default_rng((seed, epoch)).permutation(count)


@dataclasses.dataclass
class Speaker:
  """A frozen language model with what it reads and writes by."""

  model: Any
  params: Any
  tokenizer: Any

  @property
  def scale(self):
    """Root mean square of its token vectors."""
    table = self.params["token_embedding"]["embedding"]
    return float(jnp.sqrt(jnp.mean(jnp.square(table.astype(jnp.float32)))))


class Prompts:
  """Questions and answers as arrays: opening (p,), tokens and mask (N, t), answer, answer_mask.

  template: text with {image} and {question} in it; what stands before {image} opens every row.
  Questions are padded before, to the longest; answers behind, to `answer_tokens`, their end
  included, and longer ones are cut.
  """

  def __init__(self, tokenizer, template, questions, answers, answer_tokens):
    before, found, after = template.partition("{image}")
    if not found or "{question}" not in after:
      raise ValueError(f"template={template!r} must hold {{image}} and, behind it, {{question}}")
    self.opening = np.array(tokenizer.encode(before, start=True), np.int32)
    rows = [tokenizer.encode(after.replace("{question}", q), start=False) for q in questions]
    self.length = max(map(len, rows))
    end = tokenizer.ends[0]
    self.tokens = np.full((len(rows), self.length), end, np.int32)
    self.mask = np.zeros(self.tokens.shape, bool)
    for i, row in enumerate(rows):
      self.tokens[i, self.length - len(row) :], self.mask[i, self.length - len(row) :] = row, True
    self.answer = np.full((len(rows), answer_tokens), end, np.int32)
    self.answer_mask = np.zeros(self.answer.shape, bool)
    for i, text in enumerate(answers):
      row = [*tokenizer.encode(f" {text}", start=False), end][:answer_tokens]
      self.answer[i, : len(row)], self.answer_mask[i, : len(row)] = row, True

  def widen(self, length):
    """Pads the questions to a common length."""
    before = ((0, 0), (length - self.length, 0))
    self.tokens, self.mask = np.pad(self.tokens, before), np.pad(self.mask, before)
    self.length = length

  def __len__(self):
    return len(self.tokens)

  def batch(self, rows):
    """The arrays of some rows but for the opening."""
    return {k: getattr(self, k)[rows] for k in ("tokens", "mask", "answer", "answer_mask")}


def loss(model, params, image, batch, opening):
  """answer_loss of a batch of `Prompts`; params: the language model's."""
  text = {"opening": opening, "tokens": batch["tokens"], "mask": batch["mask"]}
  return bridge_lib.answer_loss(model, params, image, text, batch["answer"], batch["answer_mask"])


def descend(loss, tx, state):
  """One step of the optimizer down loss(params) -> (state, loss)."""
  value, grads = jax.value_and_grad(loss)(state.params)
  updates, opt = tx.update(grads, state.opt, state.params)
  params = optax.apply_updates(state.params, updates)
  return TrainState(state.step + 1, params, state.batch_stats, opt), value


def make_step(bridge, model, tx, opening):
  """step(state, language's params, batch) -> (state, loss). Only the bridge has gradients.

  batch: `features` (B, n, F) and the arrays of `Prompts`.
  """

  def step(state, frozen, batch):
    def of_bridge(params):
      image = bridge.apply({"params": params}, batch["features"])
      return loss(model, frozen, image, batch, opening)

    return descend(of_bridge, tx, state)

  return step


def new_state(params, tx):
  """The TrainState that begins with `params`."""
  return TrainState(jnp.zeros((), jnp.int32), params, {}, tx.init(params))


def start(init, tx, mesh, seed):
  """The first TrainState, of init(key) -> params, on the mesh as sharding.RULES say."""
  whole = lambda key: new_state(init(key), tx)
  shapes = jax.eval_shape(whole, jax.random.key(seed))
  return jax.jit(whole, out_shardings=sharding.shardings_of(shapes, mesh))(jax.random.key(seed))


def fill(batch, shards):
  """The batch with further rows, up to a multiple of `shards`, of which no answer is counted."""
  more = -len(batch["answer_mask"]) % shards
  if not more:
    return batch
  filled = {k: np.concatenate([v, np.repeat(v[:1], more, axis=0)]) for k, v in batch.items()}
  filled["answer_mask"][-more:] = False
  return filled


def put(batch, mesh):
  """Host arrays that every process has whole -> arrays split over the mesh's batch axes."""
  split = NamedSharding(mesh, P(sharding.BATCH))
  place = lambda x: jax.make_array_from_callback(x.shape, split, lambda index: x[index])
  return {k: place(v) for k, v in batch.items()}


def train(step, state, frozen, take, how, mesh, what, folder=""):
  """Takes `how.steps` steps on take(step)'s batches; returns the state and the last losses' mean.

  folder: where checkpoints go, "" for none; what is there is gone on from. Of several processes
  none is written: their folders need not be one.
  """
  step = jax.jit(step, donate_argnums=0)
  saved = Checkpoints(folder, keep=1) if folder and jax.process_count() == 1 else None
  # Closed also when stopped: a save in flight is finished first.
  closing = contextlib.closing(saved) if saved else contextlib.nullcontext()
  with closing:
    found = saved.restore(_abstract(state), lambda meta: None) if saved else None
    first, state = found or (0, state)
    losses, last_saved, shards = [], time.monotonic(), sharding.batch_shards(mesh)
    silent = True if jax.process_index() or how.steps - first < 200 else None
    with jax.set_mesh(mesh):
      for k in tqdm.trange(first, how.steps, desc=what, disable=silent, leave=False):
        state, value = step(state, frozen, put(fill(take(k), shards), mesh))
        losses.append(value)
        if len(losses) >= _IN_FLIGHT:
          jax.block_until_ready(losses[-_IN_FLIGHT])
        if saved and time.monotonic() - last_saved > _SAVED:
          saved.save(k + 1, state, {})
          last_saved = time.monotonic()
    if saved and first < how.steps:
      saved.save(how.steps, state, {})
  recent = [float(x) for x in losses[-50:]]
  log.info("%s: %d steps, loss %.4f", what, how.steps - first, np.mean(recent or [np.nan]))
  return state


def _abstract(state):
  as_struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  return jax.tree.map(as_struct, state)


def make_answer(bridge, speaker, prompts):
  """of_batch(bridge's params, language's params, batch) -> greedy answers' tokens (B, a)."""
  steps, ends = prompts.answer.shape[1], speaker.tokenizer.ends

  def of_batch(params, frozen, batch):
    image = bridge.apply({"params": params}, batch["features"])
    text = {"opening": prompts.opening, "tokens": batch["tokens"], "mask": batch["mask"]}
    return bridge_lib.answer(speaker.model, frozen, image, text, steps=steps, ends=ends)

  return jax.jit(of_batch)


def answer(of_batch, params, speaker, prompts, features, mesh, batch_size):
  """The answers to all `prompts`, as texts; features(rows) -> (len(rows), n, F)."""
  shards = sharding.batch_shards(mesh)
  B = -(-batch_size // shards) * shards
  found = []
  for start in range(0, len(prompts), B):
    rows = np.arange(start, start + B)
    rows = np.where(rows < len(prompts), rows, 0)  # the last batch is filled up
    batch = {k: v for k, v in prompts.batch(rows).items() if k in ("tokens", "mask")}
    with jax.set_mesh(mesh):
      tokens = of_batch(params, speaker.params, put({**batch, "features": features(rows)}, mesh))
    found.append(multihost_utils.process_allgather(tokens, tiled=True))
  return [speaker.tokenizer.decode(row) for row in np.concatenate(found)[: len(prompts)]]
