"""The mesh, the table of parameter shardings, and moving host arrays on to the mesh."""

import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
LANES = 128  # numbers in a row of a TPU's tile
BATCH = ("data", "fsdp")  # a batch is split over both; fsdp also splits the parameters

# First match wins. Tower kernels carry a leading layer dimension, which is never split.
RULES = (
  (r"attn/qkv/kernel", P(None, "fsdp", None, "tensor", None)),  # (layer, W, 3, H, K)
  (r"attn/qkv/bias", P(None, None, "tensor", None)),
  (r"attn/[qkv]/kernel", P(None, "fsdp", "tensor", None)),  # (layer, W, H, K)
  (r"attn/[qkv]/bias", P(None, "tensor", None)),
  (r"attn/out/kernel", P(None, "tensor", None, "fsdp")),  # (layer, H, K, W)
  (r"mlp/(up|gate)/kernel", P(None, "fsdp", "tensor")),
  (r"mlp/(up|gate)/bias", P(None, "tensor")),
  (r"mlp/down/kernel", P(None, "tensor", "fsdp")),
  # (V, W): few vocabularies divide, so both axes split the width
  (r"token_embedding", P(None, ("tensor", "fsdp"))),
  (r"(head|predictor).*/kernel", P("fsdp", "tensor")),
  (r"patch_embedding/kernel", P("fsdp", "tensor")),
  (r".*", P()),  # other biases, LayerNorm, BatchNorm, positions, scalars
)


def make_mesh(*, data, fsdp, tensor, slices=-1, devices=None):
  """A mesh of all devices with axes data, fsdp, tensor; one size may be -1 (what is left).

  slices: groups of devices with a slow network (DCN) between them: TPU slices, or nodes of GPUs.
    -1 takes the devices' own word, `slice_index`; a number, that many equal groups of neighbours.
    They split `data` alone, so that only gradients and batch statistics cross that network, and
    under optim.sharded new parameters.

  Raises:
    ValueError: the sizes do not multiply to the number of devices, or the slices divide neither.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [data, fsdp, tensor]
  if sizes.count(-1) == 1:
    known = math.prod(s for s in sizes if s != -1)
    sizes[sizes.index(-1)] = len(devices) // max(known, 1)
  if min(sizes) < 1 or math.prod(sizes) != len(devices):
    raise ValueError(
      f"mesh.data={data}, mesh.fsdp={fsdp}, mesh.tensor={tensor} do not multiply to the "
      f"{len(devices)} devices; give sizes whose product is {len(devices)}, at most one as -1"
    )
  grid = _device_grid(sizes, slices, devices)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def _device_grid(sizes, slices, devices):
  """The devices as an array of these sizes, each slice one block along the first."""
  own = len({getattr(d, "slice_index", 0) for d in devices})
  count = own if slices == -1 else slices
  if count < 1 or sizes[0] % count:
    said = f"mesh.slices={slices}" + f" (the devices lie in {own})" * (slices == -1)
    raise ValueError(
      f"{said} does not divide the axis that slices split, mesh.data = {sizes[0]} of "
      f"{len(devices)} devices; make mesh.data a multiple, or set mesh.slices=1 to let all axes "
      "cross the network between slices"
    )
  if count != own:  # groups that the devices do not know of: neighbours, in the order given
    return np.asarray(devices).reshape(sizes)
  within = [sizes[0] // count, *sizes[1:]]
  if count == 1:
    return mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
  return mesh_utils.create_hybrid_device_mesh(
    within, (count, 1, 1), devices, allow_split_physical_axes=True
  )


def batch_shards(mesh):
  """Number of pieces that the batch dimension is cut into."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def axis_size(name):
  """Devices along an axis of the mesh that is set, 1 where none is."""
  return jax.sharding.get_abstract_mesh().shape.get(name, 1)


def constrain(x, *axes):
  """Pins an activation's layout; "batch" stands for the data axes. A no-op without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec_of(x.shape, *axes))


def constrain_to(tree, spec):
  """Pins every leaf of a tree of parameters' size to `spec`(name, shape, mesh)."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return tree
  pin = lambda path, x: jax.lax.with_sharding_constraint(x, spec(path_name(path), x.shape, mesh))
  return jax.tree_util.tree_map_with_path(pin, tree)


def spec_of(shape, *axes):
  """PartitionSpec of an activation in the mesh that is set, as `constrain` pins it."""
  axes = [BATCH if a == "batch" else a for a in axes]
  return _divided(axes, shape, jax.sharding.get_abstract_mesh())


def path_name(path):
  """Tree path -> "params/image/tower/blocks/attn/qkv/kernel"."""
  return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def _rule(name):
  return next(spec for pattern, spec in RULES if re.search(pattern, name))


def spec_for(name, shape, mesh):
  """PartitionSpec of one leaf by RULES; an axis that does not divide its dimension is dropped."""
  spec = _rule(name)
  return _divided(spec, shape, mesh) if len(spec) <= len(shape) else P()


def replica_spec(name, shape, mesh):
  """`spec_for`, and what that leaves whole divided over `data` where a dimension allows it.

  Of a parameter's optimizer state and update, which each replica then keeps and computes a part
  of: weight-update sharding (Xu et al., arXiv 2004.13336), ZeRO's first stage (arXiv 1910.02054).
  """
  spec = [*spec_for(name, shape, mesh)]
  spec += [None] * (len(shape) - len(spec))
  # A last dimension in pieces of fewer numbers than a TPU's tile has lanes would be mostly padding.
  data, last = mesh.shape["data"], len(shape) - 1
  free = [
    (n, -i) for i, n in enumerate(shape)
    if _pieces(spec[i], mesh) == 1 and n % data == 0 and (i < last or n // data >= LANES)
  ]  # fmt: skip
  if free:
    spec[-max(free)[1]] = "data"
  return P(*spec)


def _divided(spec, shape, mesh):
  return P(*(a if n % _pieces(a, mesh) == 0 else None for a, n in zip(spec, shape, strict=False)))


def _pieces(axes, mesh):
  """Number of pieces that an entry of a PartitionSpec (None, an axis or several) cuts into."""
  axes = (axes,) if isinstance(axes, str) else axes or ()
  return math.prod(mesh.shape[a] for a in axes)


def shardings_of(tree, mesh, spec=spec_for):
  """NamedSharding for every leaf of a tree of arrays or shapes (parameters, optimizer state)."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: NamedSharding(mesh, spec(path_name(path), x.shape, mesh)), tree
  )


def undivided(tree, mesh):
  """Names of the leaves that RULES would split over an axis of this mesh but cannot."""
  names = []
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    name = path_name(path)
    for n, axes in zip(x.shape, _rule(name), strict=False):
      if n % _pieces(axes, mesh):
        axes = (axes,) if isinstance(axes, str) else axes
        over = " x ".join(f"{a}={mesh.shape[a]}" for a in axes)
        names.append(f"{name} {tuple(x.shape)}: {n} over {over}")
  return names


def describe_arrays(tree):
  """{path: "float32 (12, 768, 3072)"} of a tree of arrays or shapes."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {path_name(path): f"{x.dtype} {tuple(x.shape)}" for path, x in leaves}


def row_parts(mesh):
  """Which rows of a batch this process feeds: `parts` of `count` equal parts, ascending.

  They are what its devices hold. They need not be neighbours (a host of a TPU pod has a square of
  chips, of which the batch runs along rows), and processes that share a part all feed it.
  """
  count = batch_shards(mesh)
  places = NamedSharding(mesh, P(BATCH)).addressable_devices_indices_map((count,))
  return tuple(sorted({index[0].start or 0 for index in places.values()})), count


def put_batch(batch, mesh):
  """This process's rows, those of `row_parts` in their order -> global arrays, split over BATCH."""
  parts, count = row_parts(mesh)
  sharding = NamedSharding(mesh, P(BATCH))

  def put(x):
    rows = len(x) // len(parts)  # of a part
    own = dict(zip(parts, x.reshape(len(parts), rows, *x.shape[1:]), strict=True))
    return jax.make_array_from_callback(
      (count * rows, *x.shape[1:]), sharding, lambda index: own[(index[0].start or 0) // rows]
    )

  return {k: put(v) for k, v in batch.items()}
