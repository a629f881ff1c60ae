"""The kernels' inline PTX, read by a small interpreter, against the same in JAX."""

import re
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import triton as plgpu

from jepa_vl.model import ptx

INSTRUCTIONS = {
  "mov.f32": lambda a: a,
  "neg.f32": lambda a: -a,
  "add.f32": lambda a, b: a + b,
  "fma.rn.f32": lambda a, b, c: a * b + c,
  "ex2.approx.ftz.f32": lambda a: np.exp2(a),
  "rcp.approx.ftz.f32": lambda a: 1 / a,
}


def interpret(code, *, args, constraints, pack, result_shape_dtypes):
  """What `plgpu.elementwise_inline_asm` would give, in float64."""
  assert constraints == ",".join(["=f", *"f" * len(args)]) and pack == 1
  (declared, *lines) = code.strip("{} ").rstrip(";").split(";")
  assert declared == ".reg .f32 t"
  values = {f"${i}": np.asarray(x, np.float64) for i, x in enumerate(args, start=1)}
  for line in lines:
    name, target, *operands = re.split(r",? +", line.strip())
    assert target in ("t", "$0")
    values[target] = INSTRUCTIONS[name](*(_value(o, values) for o in operands))
  return [jnp.asarray(values["$0"], jnp.float32)]


def _value(operand, values):
  if operand.startswith("0f"):
    return struct.unpack(">f", bytes.fromhex(operand[2:]))[0]
  return values[operand]


@pytest.mark.parametrize(
  "f",
  [
    lambda x, on_gpu: ptx.exp2(x, 0.18, x[:, :1], on_gpu),
    lambda x, on_gpu: ptx.sigmoid2(x, on_gpu),
    lambda x, on_gpu: ptx.polynomial(x, (0.5, -2.0, 0.25), on_gpu),
    lambda x, on_gpu: ptx.polynomial(x, (0.5, -2.0), on_gpu),
  ],
  ids=["exp2", "sigmoid2", "square", "line"],
)
def test_the_instructions_compute_what_is_said(f, monkeypatch):
  monkeypatch.setattr(plgpu, "elementwise_inline_asm", interpret)
  x = jnp.linspace(-9, 9, 60).reshape(4, 15)
  np.testing.assert_allclose(f(x, True), f(x, False), rtol=2e-6, atol=2e-6)


def test_each_has_its_definition():
  x = np.linspace(-9, 9, 15, dtype=np.float32)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)
  close(ptx.exp2(x, 0.5, np.float32(2), False), 2 ** (x / 2 - 2))
  close(ptx.sigmoid2(x, False), 1 / (1 + 2**-x))
  close(ptx.polynomial(x, (0.5, -2, 0.25), False), 0.5 - 2 * x + 0.25 * x**2)
