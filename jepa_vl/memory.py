"""What a train step asks of a device's memory, and how a batch is made to fit into it.

Parameters, gradients and optimizer state are exact, from the shardings. Activations are counted
from what automatic differentiation keeps of each layer; the compiler's own plan differs from it.
"""

import logging
import math
import os

import jax
import numpy as np

from jepa_vl import sharding
from jepa_vl.model import two_tower

log = logging.getLogger(__name__)

GIB = 2**30
REMAT = ("none", "names", "dots", "full")  # from the least recomputation to the least memory

# The estimate is good to a quarter, so this share of a device's memory is planned for; what asks
# for the least is tried with more.
SHARE = 0.8


def state_bytes(abstract_state):
  """{"parameters", "optimizer"} in bytes on each device; running statistics are parameters."""
  params = (abstract_state.params, abstract_state.batch_stats)
  return {"parameters": _per_device(params), "optimizer": _per_device(abstract_state.opt)}


def _per_device(tree):
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


def estimate(config, model, abstract_state, mesh, *, sides, text_rows):
  """Bytes on each device by kind, with their "total", for the batch and micro-batches of `config`.

  sides: of every view of an image; text_rows: rows of the text tower per caption.
  """
  found = state_bytes(abstract_state)
  found["gradients"] = _per_device(abstract_state.params)
  if config.accumulate > 1:
    found["gradients"] *= 2  # the sum, and one micro-batch's
  if np.dtype(model.dtype).itemsize == 2:
    found["parameters in bf16"] = _per_device(abstract_state.params["image"]) // 2
    found["parameters in bf16"] += _per_device(abstract_state.params["text"]["tower"]) // 2
  rows = config.batch_size / config.accumulate / sharding.batch_shards(mesh)
  found["batch"] = config.accumulate * rows * _batch_bytes(model, sides)
  found["activations"] = rows * _row_bytes(config, model, mesh, sides, text_rows)
  found = {k: int(v) for k, v in found.items()}
  return found | {"total": sum(found.values())}


def _batch_bytes(model, sides):
  return sum(3 * side**2 for side in sides) + 5 * model.text_length


def _row_bytes(config, model, mesh, sides, text_rows):
  """Activations of one pair: what all layers keep, one layer's own arrays, heads, objective."""
  width, depth, heads = two_tower.SIZES[model.size]
  itemsize = np.dtype(model.dtype).itemsize
  tpu = mesh.devices.flat[0].platform == "tpu"
  kwargs = dict(
    width=width, heads=heads, itemsize=itemsize, tensor=mesh.shape["tensor"], tiled=tpu,
    attention=model.attention,
  )  # fmt: skip
  images = [two_tower.image_tokens(model, side) for side in sides]
  kept = lambda n, remat: _layer_bytes(n, remat, **kwargs)
  of_towers = lambda f: (sum(f(n) for n in images), text_rows * f(model.text_length))
  # Unrolled, the last layer keeps little, and nothing once the backward pass is at a whole one;
  # but XLA for CPUs plans for speed, and takes a tenth more than in a loop.
  loop = model.scan or mesh.devices.flat[0].platform == "cpu"
  total = (depth if loop else depth - 1) * sum(of_towers(lambda n: kept(n, model.remat)))
  # The backward pass of one layer holds its gradients, and the whole layer beside what was kept of
  # it: computed again, or copied out of the loop's stacks.
  whole = loop or model.remat != "none"
  held = lambda n: _gradient_bytes(n, **kwargs) + (kept(n, "none") if whole else 0)
  total += max(of_towers(held))
  total += sum(3 * side**2 * (itemsize + 4) for side in sides)  # pixels, and their patches
  layers = (1 + model.predictor_depth) * (len(sides) + 1)
  total += layers * model.hidden_dim * 3 * itemsize
  return total + _objective_bytes(config)


def _layer_bytes(tokens, remat, *, width, heads, itemsize, tensor, tiled, attention):
  """What one layer keeps of one row of `tokens` for its backward pass.

  Counted from the residuals of `jax.vjp`: "full" keeps the layer's input; "dots" also qkv, the
  attention's and the MLP's products; "names" the attention's result too; "none" also what norms and
  GELU gave, four numbers of each token's norms, and what the attention keeps: probabilities in
  float32 and rounded (xla), rounded ones, their sums and the float32 result (short), neither
  (pallas, cudnn).
  """
  n = _up(tokens, 8) if tiled else tokens
  if remat == "full":
    return n * width * itemsize
  if remat == "names":
    return n * width * itemsize * (2 + 8 / tensor)
  if remat == "dots":
    return n * width * itemsize * (2 + 7 / tensor)
  logits = n * (_up(tokens, 128) if tiled else tokens) * heads / tensor
  of_attention = {
    "xla": logits * (4 + itemsize), "short": logits * itemsize + n * (heads + width) * 4 / tensor,
    "pallas": 0, "cudnn": 0,
  }  # fmt: skip
  return n * (width * itemsize * (4 + 12 / tensor) + 4 * 4) + of_attention[attention]


def _gradient_bytes(tokens, *, width, heads, itemsize, tensor, tiled, attention):
  """Of one layer's largest arrays: hidden units', and the logits', in float32 and rounded."""
  n = _up(tokens, 8) if tiled else tokens
  logits = n * (_up(tokens, 128) if tiled else tokens) * heads * (attention in ("xla", "short"))
  return (4 * n * width * itemsize + logits * (4 + itemsize)) / tensor


def _objective_bytes(config):
  """Of one row: only the contrastive baselines hold it against other rows."""
  rows = config.batch_size // config.accumulate
  if config.objective.name == "clip":
    return 3 * 4 * rows
  if config.objective.name == "siglip":
    return 3 * 4 * min(config.objective.chunk_size or rows, rows)
  return 3 * 4 * config.model.embed_dim


def _up(n, multiple):
  return -(-n // multiple) * multiple


def limit(device):
  """Bytes that a program may use of a device: its allocator's, or of a CPU half the machine's RAM.

  None where neither is known (devices that are only compiled for).
  """
  if device.platform == "cpu":
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return ram // 2 // jax.local_device_count()
  stats = device.memory_stats() or {}
  return stats.get("bytes_limit")


def is_open(config):
  """Whether the config leaves remat or the number of micro-batches to the device's memory."""
  return config.accumulate == 0 or config.model.remat == "auto"


def fill_in(config, bytes_limit, estimate_for, mesh, refuse=True):
  """Sets `accumulate` = 0 and `model.remat` = "auto" to what fits; says what was chosen.

  The fewest micro-batches that fit, and for these the least recomputation: recomputing changes no
  number, while BatchNorm and SIGReg see one micro-batch at a time.

  Args:
    estimate_for: (accumulate, remat) -> bytes per device.
    refuse: False to take the least where nothing fits: the compiler knows better.

  Raises:
    ValueError: the memory is not known and micro-batches are asked for, or nothing fits.
  """
  if not bytes_limit and config.accumulate:
    log.warning("this device does not tell its memory: model.remat=none")
    config.model.remat = "none"
    return
  if not bytes_limit:
    raise ValueError(
      "accumulate=0 asks for this device's memory, which it does not tell; set it, for example 1 "
      "with model.remat=full"
    )
  remats = REMAT if config.model.remat == "auto" else (config.model.remat,)
  choices = [(a, r) for a in micro_batches(config, mesh) for r in remats]
  need = {choice: estimate_for(*choice) for choice in choices}
  smallest = min(need, key=need.get)
  fitting = (choice for choice in choices if need[choice] <= SHARE * bytes_limit)
  accumulate, remat = chosen = next(fitting, smallest)
  text = (
    f"{bytes_limit / GIB:.1f} GiB: model.remat={remat}, accumulate={accumulate} (estimated "
    f"{need[chosen] / GIB:.1f} GiB"
  )
  if refuse and need[chosen] > bytes_limit:
    ways = "Set accumulate=0 (as many micro-batches as memory asks for), lower batch_size"
    if config.accumulate == 0:
      ways = "Lower batch_size or objective.group_size (a micro-batch holds at least one group)"
    raise ValueError(
      f"nothing fits into a device's {text} at the least). {ways}, split the "
      "parameters with mesh.fsdp, or take a smaller model.size; model.remat=full with accumulate "
      "given tries it all the same"
    )
  if config.accumulate == 0 or remat != "none":
    log.info("memory of a device: %s; %.0f%% are planned for)", text, 100 * SHARE)
  config.accumulate, config.model.remat = accumulate, remat


def micro_batches(config, mesh):
  """Values of `accumulate` that devices, SIGReg's groups and packing allow, ascending."""
  if config.accumulate:
    return [config.accumulate]
  unit = sharding.batch_shards(mesh)
  if config.data.text_packing:
    unit *= config.data.packing_group
  if config.objective.name.startswith("levljepa"):
    unit = math.lcm(unit, config.objective.group_size or 1)
  B = config.batch_size  # of which BatchNorm needs two rows at a time
  return [a for a in range(1, B // 2 + 1) if B % a == 0 and B // a % unit == 0] or [1]
