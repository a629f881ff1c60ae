"""benchmarks/parts.py: every product of a step, and every byte, counts in one part."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import parts
from jepa_vl import aot
from jepa_vl.aot import hlo
from jepa_vl.build import build
from jepa_vl.model import attention


@pytest.mark.slow
def test_products_of_a_step_are_the_analytic_count(config):
  """Of the whole step 3 times forward, and SIGReg's projections; the towers' are 24 n W^2."""
  config.text.tokenizer, config.objective.num_slices = "", 64
  run = build(config, devices=jax.devices()[:1])
  with jax.set_mesh(run.mesh):
    traced = run.train_step.trace(run.abstract_state, aot.abstract_batch(run))
  found = parts.flops(traced.jaxpr.jaxpr, branch_share=0)
  rows, depth, width = 16, 4, 128
  assert found.pop("SIGReg") == 2 * 2 * 2 * rows * 16 * 64  # modalities, there and back, 2 each
  assert sum(found.values()) == pytest.approx(run.flops * rows, rel=0.03)
  towers = 3 * rows * depth * 24 * (5 + 12) * width**2
  assert found["products of the towers"] == pytest.approx(towers, rel=0.02)


def test_a_kernels_products_count_as_often_as_its_programs_run():
  qkv = jax.ShapeDtypeStruct((6, 77, 3, 2, 64), jnp.float32)
  f = lambda x: attention.attend(x, None, causal=True, implementation="pallas")
  found = parts.flops(jax.make_jaxpr(f)(qkv).jaxpr, branch_share=1.0)
  assert sum(found.values()) == 6 * 2 * 2 * 2 * 80 * 128 * 64  # queries padded to 80, keys to 128


def test_a_fusion_counts_for_the_product_in_it():
  text = """HloModule m
%inner (q: f32[8,128], w: f32[128,128]) -> f32[8,128] {
  %q = f32[8,128]{1,0} parameter(0)
  %w = f32[128,128]{1,0} parameter(1)
  %d = f32[8,128]{1,0} dot(%q, %w), metadata={op_name="image/tower/blocks/mlp/up/dot_general"}
  ROOT %g = f32[8,128]{1,0} negate(%d), metadata={op_name="jit(s)/image/tower/blocks/mlp/neg"}
}
ENTRY %main (p: f32[8,128], v: f32[128,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0} parameter(0)
  %v = f32[128,128]{1,0} parameter(1)
  %f = f32[8,128]{1,0} fusion(%p, %v), calls=%inner, metadata={op_name="jit(s)/image/tower/neg"}
  %r = f32[8,128]{1,0} all-reduce(%f), replica_groups={}, metadata={op_name="jit(s)/image/x"}
  ROOT %n = f32[8,128]{1,0} negate(%r), metadata={op_name="jit(s)/image/tower/blocks/attn_norm/neg"}
}
"""
  found = parts.traffic(hlo.Program(text), depth=4, rows=8)
  assert found == {
    "products of the towers": 2 * 4096 + 65536, parts.COLLECTIVES: 8192,
    "norms, GELU, residuals, biases": 8192,
  }  # fmt: skip
