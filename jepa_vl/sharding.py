"""The mesh, the table of parameter shardings, and moving host arrays on to the mesh."""

import re

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # a batch is split over both; fsdp also splits the parameters

# First match wins. Tower kernels carry a leading layer dimension, which is never split.
RULES = (
  (r"attn/qkv/kernel", P(None, "fsdp", None, "tensor", None)),  # (layer, W, 3, H, K)
  (r"attn/out/kernel", P(None, "tensor", None, "fsdp")),  # (layer, H, K, W)
  (r"mlp/up/kernel", P(None, "fsdp", "tensor")),
  (r"mlp/down/kernel", P(None, "tensor", "fsdp")),
  (r"token_embedding", P("tensor", "fsdp")),
  (r"(head|predictor).*/kernel", P("fsdp", "tensor")),
  (r"patch_embedding/kernel", P("fsdp", "tensor")),
  (r".*", P()),  # biases, LayerNorm, BatchNorm, positions, scalars
)


def make_mesh(*, data, fsdp, tensor, devices=None):
  """A mesh of all devices with axes data, fsdp, tensor; one size may be -1 (what is left).

  Raises:
    ValueError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [data, fsdp, tensor]
  if sizes.count(-1) == 1:
    known = int(np.prod([s for s in sizes if s != -1]))
    sizes[sizes.index(-1)] = len(devices) // max(known, 1)
  if min(sizes) < 1 or int(np.prod(sizes)) != len(devices):
    raise ValueError(
      f"mesh.data={data}, mesh.fsdp={fsdp}, mesh.tensor={tensor} do not multiply to the "
      f"{len(devices)} devices; give sizes whose product is {len(devices)}, at most one as -1"
    )
  return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_shards(mesh):
  """Number of pieces that the batch dimension is cut into."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def constrain(x, *axes):
  """Pins an activation's layout; "batch" stands for the data axes. A no-op without a mesh."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, P(*(BATCH if a == "batch" else a for a in axes)))


def path_name(path):
  """Tree path -> "params/image/tower/blocks/attn/qkv/kernel"."""
  return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def _rule(name):
  return next(spec for pattern, spec in RULES if re.search(pattern, name))


def spec_for(name, shape, mesh):
  """PartitionSpec of one leaf by RULES; an axis that does not divide its dimension is dropped."""
  spec = _rule(name)
  if len(spec) > len(shape):
    return P()
  return P(*(a if a and shape[i] % mesh.shape[a] == 0 else None for i, a in enumerate(spec)))


def shardings_of(tree, mesh):
  """NamedSharding for every leaf of a tree of arrays or shapes (parameters, optimizer state)."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: NamedSharding(mesh, spec_for(path_name(path), x.shape, mesh)), tree
  )


def undivided(tree, mesh):
  """Names of the leaves that RULES would split over an axis of this mesh but cannot."""
  names = []
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    name = path_name(path)
    for i, axis in enumerate(_rule(name)[: len(x.shape)]):
      if axis and mesh.shape[axis] > 1 and x.shape[i] % mesh.shape[axis]:
        names.append(f"{name} {tuple(x.shape)}: {x.shape[i]} over {axis}={mesh.shape[axis]}")
  return names


def describe_arrays(tree):
  """{path: "float32 (12, 768, 3072)"} of a tree of arrays or shapes."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {path_name(path): f"{x.dtype} {tuple(x.shape)}" for path, x in leaves}


def put_batch(batch, mesh):
  """This process's rows (host arrays) -> global arrays, rows split over data and fsdp."""
  sharding = NamedSharding(mesh, P(BATCH))
  return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
