"""Arithmetic in a GPU's own instructions, where Triton's functions take several times as many.

Those see to results below 1e-38, which here are 0, and join no sum with a product.
on_gpu: False for the same in JAX, where a kernel is interpreted.
"""

import functools
import struct

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu


def exp2(x, scale, less, on_gpu):
  """2 ** (scale x - less) in float32; x and less: arrays that broadcast."""
  if not on_gpu:
    return jnp.exp2(x * scale - less)
  code = f"fma.rn.f32 t, $1, {_literal(scale)}, $2; ex2.approx.ftz.f32 $0, t;"
  return _elementwise(code, x, jnp.broadcast_to(-less, x.shape))


def polynomial(x, coefficients, on_gpu):
  """coefficients[0] + coefficients[1] x + ... in float32."""
  last, *others = coefficients[::-1]
  if not on_gpu:
    return functools.reduce(lambda total, a: total * x + a, others, jnp.full_like(x, last))
  steps = "".join(f"fma.rn.f32 t, t, $1, {_literal(a)}; " for a in others)
  return _elementwise(f"mov.f32 t, {_literal(last)}; {steps}mov.f32 $0, t;", x)


def sigmoid2(x, on_gpu):
  """1 / (1 + 2 ** -x) in float32."""
  if not on_gpu:
    return 1 / (1 + jnp.exp2(-x))
  raised = "neg.f32 t, $1; ex2.approx.ftz.f32 t, t"
  return _elementwise(f"{raised}; add.f32 t, t, {_literal(1)}; rcp.approx.ftz.f32 $0, t;", x)


def _literal(number):
  (bits,) = struct.unpack("<I", struct.pack("<f", number))
  return f"0f{bits:08X}"


def _elementwise(code, *args):
  """$0 of `code`, which has a register t; args: float32 arrays of one shape, its $1 and so on."""
  return plgpu.elementwise_inline_asm(
    f"{{.reg .f32 t; {code}}}", args=args, constraints=",".join(["=f", *"f" * len(args)]), pack=1,
    result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, jnp.float32)],
  )[0]  # fmt: skip
