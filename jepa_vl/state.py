"""TrainState, built from shapes and materialised sharded."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from jepa_vl import sharding
from jepa_vl.model import two_tower


@flax.struct.dataclass
class TrainState:
  """Everything that training changes; `step` is the number of steps taken."""

  step: jax.Array
  params: Any
  batch_stats: Any
  opt: Any
  probe: Any = flax.struct.field(default_factory=dict)  # of the online probe, if there is one

  @property
  def variables(self):
    """What `model.apply` and evaluations take."""
    return {"params": self.params, "batch_stats": self.batch_stats}


def init_fn(model, tx, probe=None):
  """Returns init(key) -> TrainState, pure and traceable."""

  def init(key):
    # Scanned, whatever the step is: the same numbers, in a program of one layer.
    variables = model.clone(scan=True).init(key, two_tower.dummy_batch(model, 1), train=False)
    params = variables["params"]
    stats = variables.get("batch_stats", {})
    probed = probe.init() if probe else {}
    return TrainState(jnp.zeros((), jnp.int32), params, stats, tx.init(params), probed)

  return init


def abstract_state(model, tx, mesh, probe=None, shard_optimizer=False):
  """The state as ShapeDtypeStructs that carry their shardings; nothing is allocated.

  shard_optimizer: the optimizer's part is divided over the mesh's `data` axis, too.
  """
  shapes = jax.eval_shape(init_fn(model, tx, probe), jax.random.key(0))
  as_struct = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  return jax.tree.map(as_struct, shapes, _shardings(shapes, mesh, shard_optimizer))


def init_state(model, tx, mesh, seed, probe=None, shard_optimizer=False):
  """The initial state on the mesh; each device makes only its own shards."""
  init = init_fn(model, tx, probe)
  shapes = jax.eval_shape(init, jax.random.key(seed))
  with jax.set_mesh(mesh):
    return jax.jit(init, out_shardings=_shardings(shapes, mesh, shard_optimizer))(
      jax.random.key(seed)
    )


def _shardings(shapes, mesh, shard_optimizer):
  found = sharding.shardings_of(shapes, mesh)
  if shard_optimizer:
    found = found.replace(opt=sharding.shardings_of(shapes.opt, mesh, sharding.replica_spec))
  return found


def init_variables(model, mesh, seed):
  """The variables that `init_state` starts from, without an optimizer: the untrained network."""
  return init_state(model, optax.identity(), mesh, seed).variables


def count(params):
  """Number of parameters in a tree of arrays or shapes."""
  return sum(x.size for x in jax.tree.leaves(params))
