"""LayerNorm and GELU, which take a token's numbers as they come, by name of the implementation.

Both keep what they read and little else for the backward pass. `xla`: as XLA fuses it. `pallas`:
kernels of our own on NVIDIA GPUs (`pointwise_gpu`), interpreted, slowly, on CPUs, else as `xla`.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jepa_vl import chips, sharding
from jepa_vl.model import pointwise_gpu

IMPLEMENTATIONS = ("xla", "pallas")


def choose(name, dtype, device):
  """What `model.pointwise` is on a device, here or only compiled for: of "auto", what is faster.

  Raises:
    ValueError: unknown implementation.
  """
  if name not in ("auto", *IMPLEMENTATIONS):
    raise ValueError(
      f"model.pointwise must be one of auto, {', '.join(IMPLEMENTATIONS)}, got {name!r}"
    )
  if name != "auto":
    return name
  return "pallas" if dtype == jnp.bfloat16 and chips.has_bfloat16(device) else "xla"


class LayerNorm(nn.Module):
  """`nn.LayerNorm`, computed in float32, of the residual stream x (B, L, W) -> x and its norm.

  branch: what is to be added to x before, or None: an array like x, and the bias (W,) that was
  added to it with its gradient stopped, which has that gradient from here. So the sum costs no pass
  of its own, nor do the gradients of x, of its norm and of the bias.
  """

  eps: float
  implementation: str = "xla"

  @nn.compact
  def __call__(self, x, branch=None):
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
    bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
    return layer_norm(x, branch, scale, bias, self.eps, self.implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def layer_norm(x, branch, scale, bias, eps, implementation):
  """x (B, L, W), with the branch added if there is one, and its norm over the last axis."""
  return _norm_forward(x, branch, scale, bias, eps, implementation)[0]


def _norm_forward(x, branch, scale, bias, eps, implementation):
  def kernel(x, scale, bias, *added, interpret):
    *new, y, mean, share = pointwise_gpu.norm(
      _flat(x), scale, bias, eps, *map(_flat, added), interpret=interpret
    )
    numbers = (n.reshape(*x.shape[:-1], 1) for n in (mean, share))
    return *(n.reshape(x.shape) for n in (*new, y)), *numbers

  added = branch[:1] if branch else ()
  default = functools.partial(_norm, eps=eps)
  rows = _rows(x)
  ins, outs = (rows, P(), P(), *(rows for _ in added)), (rows,) * (3 + len(added))
  *new, y, mean, share = _choose(implementation, kernel, default, ins, outs)(
    x, scale, bias, *added
  )
  x = new[0] if new else x
  # x, two numbers a token, and of the branch's bias its type alone.
  kind = jnp.zeros(0, branch[1].dtype) if branch else None
  return (x, y), (x, mean, share, scale, kind)


def _norm(x, scale, bias, *added, eps):
  new = [x + y for y in added]
  x32 = (new[0] if new else x).astype(jnp.float32)
  mean = jnp.mean(x32, axis=-1, keepdims=True)
  variance = jnp.maximum(jnp.mean(x32**2, axis=-1, keepdims=True) - mean**2, 0)
  share = jax.lax.rsqrt(variance + eps)
  y = (x32 - mean) * (share * scale) + bias
  return *new, y.astype(x.dtype), mean, share


def _norm_backward(eps, implementation, kept, grads):
  *kept, kind = kept
  with_branch = kind is not None

  def kernel(x, mean, share, scale, around, grad, interpret):
    dx, sums = pointwise_gpu.norm_gradient(
      _flat(x), mean.reshape(-1), share.reshape(-1), scale, _flat(grad), _flat(around),
      with_branch, interpret,
    )  # fmt: skip
    return dx.reshape(x.shape), sums

  rows = _rows(kept[0])
  specs = (rows, rows, rows, P(), rows, rows)
  default = functools.partial(_norm_gradient, with_branch=with_branch)
  f = _choose(implementation, kernel, default, specs, (rows, P(rows[0])), sums=True)
  dx, sums = f(*kept, *grads)
  branch = (dx, sums[2].astype(kind.dtype)) if with_branch else None
  return dx, branch, sums[0], sums[1]


layer_norm.defvjp(_norm_forward, _norm_backward)


def _norm_gradient(x, mean, share, scale, around, grad, with_branch):
  """`around`: the gradient of the x that went on. Sums: (2 or 3, W), the scale's gradient, the
  bias's, and that of the branch's bias."""
  # Else the compiler takes what is computed again for what the forward pass had, and keeps that.
  x, mean, share, grad = jax.lax.optimization_barrier((x, mean, share, grad))
  unit, grad = (x.astype(jnp.float32) - mean) * share, grad.astype(jnp.float32)
  rows = tuple(range(x.ndim - 1))
  own = lambda v: jnp.mean(v, axis=-1, keepdims=True)
  scaled = grad * scale
  dx = share * (scaled - own(scaled) - unit * own(scaled * unit))
  dx = around + dx.astype(x.dtype)
  sums = [jnp.sum(grad * unit, axis=rows), jnp.sum(grad, axis=rows)]
  if with_branch:
    sums.append(jnp.sum(dx, axis=rows, dtype=jnp.float32))
  return dx, jnp.stack(sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def gelu(x, bias, tanh, implementation="xla"):
  """GELU of x (B, L, F) by erf or by tanh, computed in float32.

  bias: (F,), what was added to x with its gradient stopped; it has that gradient from here, where
  what it is the sum of is at hand.
  """
  kernel = lambda x, interpret: (pointwise_gpu.gelu(_flat(x), tanh, interpret).reshape(x.shape),)
  default = lambda x: (_gelu(x.astype(jnp.float32), tanh).astype(x.dtype),)
  rows = _rows(x, "tensor")
  return _choose(implementation, kernel, default, (rows,), (rows,))(x)[0]


def _gelu(x, tanh):
  # By erf, as PyTorch computes it; nn.gelu's erfc is exact far in the tail too, and three times
  # the time of a pass through memory on an H200.
  return nn.gelu(x) if tanh else x * (0.5 + 0.5 * jax.lax.erf(x * np.sqrt(0.5, dtype=np.float32)))


def _gelu_forward(x, bias, tanh, implementation):
  return gelu(x, bias, tanh, implementation), (x, bias)


def _gelu_backward(tanh, implementation, kept, grad):
  def kernel(x, grad, interpret):
    dx, sums = pointwise_gpu.gelu_gradient(_flat(x), _flat(grad), tanh, interpret)
    return dx.reshape(x.shape), sums

  def default(x, grad):
    x, grad = jax.lax.optimization_barrier((x, grad))  # as in _norm_gradient
    y, pull = jax.vjp(lambda x: _gelu(x, tanh), x.astype(jnp.float32))
    dx = pull(grad.astype(y.dtype))[0].astype(x.dtype)
    return dx, jnp.sum(dx, axis=(0, 1), dtype=jnp.float32)

  x, bias = kept
  rows = _rows(x, "tensor")
  outs = rows, P(rows[0], rows[2])
  f = _choose(implementation, kernel, default, (rows, rows), outs, sums=True)
  dx, sums = f(x, grad)
  return dx, sums.astype(bias.dtype)


gelu.defvjp(_gelu_forward, _gelu_backward)


def _flat(x):
  return x.reshape(-1, x.shape[-1])


def _rows(x, last=None):
  """How x is split in the mesh that is set, if any."""
  meshless = jax.sharding.get_abstract_mesh().empty
  return P(None, None, None) if meshless else sharding.spec_of(x.shape, "batch", None, last)


def _choose(implementation, kernel, default, in_specs, out_specs, sums=False):
  """`default`, or where it is asked for and can be `kernel`, which has an argument more: interpret.

  The first argument of both is x. sums: the last of the kernel's results is to be added up along
  its first axis.
  """

  def divided(*arrays, interpret):
    def part(*arrays):
      if pointwise_gpu.takes(arrays[0]):
        *found, last = kernel(*arrays, interpret=interpret)
        return *found, last.sum(axis=0, keepdims=True) if sums else last
      *found, last = default(*arrays)
      return *found, last[None] if sums else last

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:  # the compiler cannot divide a kernel: each device has its part
      part = jax.shard_map(part, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    *found, last = part(*arrays)
    return *found, last.sum(axis=0) if sums else last

  if implementation == "xla":
    return default
  cuda, cpu = (functools.partial(divided, interpret=interpret) for interpret in (False, True))
  return lambda *arrays: jax.lax.platform_dependent(*arrays, cuda=cuda, cpu=cpu, default=default)
