"""What fits heads on frozen features: AdamW for several rates at once, and a bank of features."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jepa_vl import sharding

HELD_OUT = 10  # every tenth
_AT_ONCE = 256  # rows whose features are asked for in one go: enough to fill a device


@dataclasses.dataclass(frozen=True)
class Fit:
  """AdamW with a cosine decay to 0 on shuffled batches, one head per learning rate of `lrs`."""

  epochs: int
  batch_size: int
  lrs: tuple
  weight_decay: float
  seed: int


def held_out(places):
  """Which places among training rows choose hyper-parameters, where no split is for it."""
  return places % HELD_OUT == HELD_OUT - 1


def part(count):
  """(rows to fit on, rows that choose hyper-parameters) of so many; all twice if they are few."""
  rows = np.arange(count)
  held = held_out(rows)
  return (rows[~held], rows[held]) if held.any() else (rows, rows)


class Bank:
  """Features of rows, (n, ...): what fits into memory is kept, the rest is made again when asked.

  make: rows -> their features; gib: of memory. They are kept, and come, at half precision.
  """

  def __init__(self, make, gib):
    self._make, self._left = make, gib * 2**30
    self._rows, self._parts, self._kept = [], [], None

  def add(self, rows, features):
    """Takes the features of further rows, which get the next places."""
    features = features.astype(np.float16)
    size = features.nbytes
    if size <= self._left:
      self._left -= size
      self._parts.append(features)
    else:
      self._left = 0  # a first stretch of the places is kept, without gaps
    self._rows.extend(rows)

  def __len__(self):
    return len(self._rows)

  def __getitem__(self, places):
    """The features at an array of places."""
    if self._kept is None:
      self._kept = np.concatenate(self._parts) if self._parts else ()
      self._rows, self._parts = np.array(self._rows), None
    here = places < len(self._kept)
    if here.all():
      return self._kept[places]
    made = self._make(self._rows[places[~here]]).astype(np.float16)
    found = np.empty((len(places), *made.shape[1:]), np.float16)
    found[~here] = made
    if here.any():
      found[here] = self._kept[places[here]]
    return found


class Moments:
  """Mean and standard deviation over all but the last axis, from one stretch after another."""

  def __init__(self):
    self._count, self._sum, self._squares = 0, 0.0, 0.0

  def add(self, x):
    x = x.reshape(-1, x.shape[-1]).astype(np.float64)
    self._count += len(x)
    self._sum, self._squares = self._sum + x.sum(axis=0), self._squares + (x**2).sum(axis=0)

  def read(self):
    """(W,) twice, float32; the deviation is never 0."""
    mean = self._sum / self._count
    std = np.sqrt(np.maximum(self._squares / self._count - mean**2, 0)) + 1e-5
    return mean.astype(np.float32), std.astype(np.float32)


def adamw(loss, start, take, rows, how, mesh, what="fitting"):
  """Fits a head per learning rate on the same batches.

  Args:
    loss: (params, *arrays of a batch) -> scalar; start: its first params, the same for all heads.
    take: rows -> arrays of host values, whose first dimension is the rows'; rows: to fit on.
    how: Fit; what: the progress bar's name.

  Returns:
    The params of all heads, with a leading dimension of len(how.lrs), on the host.
  """
  shards, K = sharding.batch_shards(mesh), len(how.lrs)
  B = max(min(how.batch_size, len(rows)) // shards, 1) * shards
  steps = max(how.epochs * len(rows) // B, 1)
  # A rate of 1 here: each head scales the update by its own.
  tx = optax.adamw(optax.cosine_decay_schedule(1.0, steps), weight_decay=how.weight_decay)

  def one(params, state, lr, batch):
    updates, state = tx.update(jax.grad(loss)(params, *batch), state, params)
    return jax.tree.map(lambda p, u: p + lr * u, params, updates), state

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, states, batch):
    return jax.lax.map(lambda row: one(*row, batch), (params, states, jnp.float32(how.lrs)))

  split, whole = NamedSharding(mesh, P(sharding.BATCH)), NamedSharding(mesh, P())
  put = lambda v, how: jax.make_array_from_callback(v.shape, how, lambda index: v[index])
  repeat = lambda p: put(np.repeat(np.asarray(p)[None], K, axis=0), whole)
  params = jax.tree.map(repeat, start)
  states = jax.jit(jax.vmap(tx.init))(params)
  rng = np.random.default_rng(how.seed)
  order = np.concatenate([rng.permutation(rows) for _ in range(steps * B // len(rows) + 1)])
  together = max(_AT_ONCE // B, 1)
  silent = True if jax.process_index() or steps < 200 else None
  for first in tqdm.trange(0, steps, together, desc=what, disable=silent, leave=False):
    arrays = take(order[first * B : min(first + together, steps) * B])
    for i in range(min(together, steps - first)):
      batch = [put(v[i * B : (i + 1) * B], split) for v in arrays]
      params, states = step(params, states, batch)
    # Steps in flight hold their batches; virtual CPU devices want few of them.
    jax.block_until_ready(params)
  return jax.tree.map(np.asarray, params)


def pick(params, index):
  """One head's params of what `adamw` returns."""
  return jax.tree.map(lambda p: p[index], params)
