"""Collectives and memory traffic read from what XLA compiled, for eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jepa_vl import sharding
from jepa_vl.aot import hlo

ROWS, COLUMNS, TRIPS = 16, 128, 5
LOCAL = ROWS * COLUMNS * 4  # bytes of one device's float32 block


@pytest.fixture
def mesh():
  return sharding.make_mesh(data=4, fsdp=2, tensor=1)


def compiled(f, mesh, shape=(8 * ROWS, COLUMNS)):
  mapped = jax.shard_map(f, mesh=mesh, in_specs=P(sharding.BATCH), out_specs=P(sharding.BATCH))
  x = jax.ShapeDtypeStruct(
    shape, jnp.float32, sharding=NamedSharding(mesh, P(sharding.BATCH))
  )
  return jax.jit(mapped).lower(x).compile().as_text()


def found(text, **kwargs):
  collectives = hlo.Program(text, **kwargs).collectives()
  return {(c.kind, c.bytes, c.runs): c.groups for c in collectives}


def looped(x):
  body = lambda c, _: (jnp.tanh(jax.lax.pmean(c, "data")), None)
  return jax.lax.scan(body, jax.lax.pmean(x, sharding.BATCH), None, length=TRIPS)[0]


def test_a_collective_in_a_loop_counts_as_often_as_it_runs(mesh):
  groups = found(compiled(lambda x: looped(x) + x, mesh))
  assert set(groups) == {("all-reduce", LOCAL, 1.0), ("all-reduce", LOCAL, float(TRIPS))}
  # data is the outer axis of (4, 2, 1): its groups are every other device
  members = groups["all-reduce", LOCAL, float(TRIPS)]
  assert sorted(map(sorted, members.tolist())) == [[0, 2, 4, 6], [1, 3, 5, 7]]
  assert groups["all-reduce", LOCAL, 1.0].size == 8


def test_a_loop_whose_length_is_in_its_condition_alone(mesh):
  text = compiled(lambda x: looped(x) + x, mesh)
  assert "known_trip_count" in text
  assert found(text.replace("known_trip_count", "nothing")).keys() == found(text).keys()


@pytest.mark.parametrize(("collective", "kind"), [
  (lambda x: jax.lax.all_gather(x, "data").sum(0), "all-gather"),
  (lambda x: jnp.tile(jax.lax.psum_scatter(x, "data", tiled=True), (4, 1)), "reduce-scatter"),
  (lambda x: jax.lax.ppermute(x, "data", [(i, (i + 1) % 4) for i in range(4)]),
   "collective-permute"),
  (lambda x: jax.lax.all_to_all(x, "data", 0, 0, tiled=True), "all-to-all"),
])  # fmt: skip
def test_what_each_kind_gives(mesh, collective, kind):
  """A device gives its whole block, whatever comes back."""
  (found_kind, size, runs), groups = next(iter(found(compiled(collective, mesh)).items()))
  assert (found_kind, runs) == (kind, 1.0)
  assert size == LOCAL
  assert groups is None or groups.shape == (2, 4)


def test_a_branch_counts_by_its_share(mesh):
  def f(x):
    return jax.lax.cond(
      jnp.sum(x) > 0, lambda x: jax.lax.pmean(x, "data"), lambda x: x + 1, x
    )

  one = jax.shard_map(f, mesh=mesh, in_specs=P(sharding.BATCH), out_specs=P(sharding.BATCH),
                      check_vma=False)  # fmt: skip
  x = jax.ShapeDtypeStruct(
    (8 * ROWS, COLUMNS), jnp.float32, sharding=NamedSharding(mesh, P(sharding.BATCH))
  )
  text = jax.jit(one).lower(x).compile().as_text()
  assert [runs for _, _, runs in found(text, branch_share=0.25)] == [0.25]


@pytest.mark.parametrize(("text", "groups"), [
  ("replica_groups={{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
  ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
  ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
  ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
  ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x", [[0, 1, 2, 3]]),
  ("replica_groups=mesh['a'=4] {'a':(2)2}, x", [[0, 1], [2, 3]]),
  ("replica_groups=mesh['a'=4] {'a':(1)2}, x", [[0, 2], [1, 3]]),
  ("replica_groups={}, x", None),
])  # fmt: skip
def test_groups_in_every_spelling(text, groups):
  members = hlo._groups(text)
  assert (members if members is None else members.tolist()) == groups


def test_memory_traffic_of_a_loop_is_its_slices_not_its_arrays():
  """A loop over the rows of a large array reads each row once, and writes one result."""
  n = 1 << 16
  f = lambda x: jax.lax.map(lambda row: jnp.cumsum(jnp.sin(row)), x)
  text = jax.jit(f).lower(jax.ShapeDtypeStruct((50, n), jnp.float32)).compile().as_text()
  once = 50 * n * 4
  assert 2 * once <= hlo.Program(text).hbm_bytes() <= 16 * once  # the whole array 50 times: 100


def test_memory_traffic_of_one_fusion():
  n = 1 << 20
  x = jax.ShapeDtypeStruct((n,), jnp.float32)
  text = jax.jit(lambda x, y: jnp.sin(x) * y + 1).lower(x, x).compile().as_text()
  assert hlo.Program(text).hbm_bytes() == 3 * 4 * n


def test_vector_memory_of_a_tpu_is_free():
  text = """HloModule m
ENTRY %main (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %a = f32[8,128]{1,0:T(8,128)S(1)} negate(%p)
  ROOT %b = f32[8,128]{1,0:T(8,128)} negate(%a)
}
"""
  assert hlo.Program(text).hbm_bytes() == 4 * 4096
  assert hlo.Program(text).hbm_bytes(on_chip=True) == 2 * 4096


def test_a_kernel_reads_its_operands_and_writes_its_results():
  """Whatever it does in vector memory; a place that is only set aside is neither."""
  text = """HloModule m
ENTRY %main (p: bf16[8,128], q: f32[8,128]) -> (bf16[8,128], f32[4]) {
  %p = bf16[8,128]{1,0} parameter(0)
  %q = f32[8,128]{1,0} parameter(1)
  %a = f32[50,8,128]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %k = (bf16[8,128]{1,0}, f32[4]{0}) custom-call(%p, %q), custom_call_target="tpu_custom_call"
}
"""
  program = hlo.Program(text)
  assert program.hbm_bytes(on_chip=True) == 2048 + 4096 + 2048 + 16
  assert [op.name for op, _ in program.traffic()] == ["k"]


def test_a_fusion_reads_what_it_slices_and_writes_what_it_updates():
  """One row of 50 is read, another written in place; the 49 others are left alone."""
  text = """HloModule m
%inner (q: f32[50,1024], j: s32[]) -> f32[1,1024] {
  %q = f32[50,1024]{1,0} parameter(0)
  %j = s32[] parameter(1)
  ROOT %s = f32[1,1024]{1,0} dynamic-slice(%q, %j, %j), dynamic_slice_sizes={1,1024}
}
%outer (a: f32[50,1024], b: f32[50,1024], i: s32[]) -> f32[50,1024] {
  %a = f32[50,1024]{1,0} parameter(0)
  %b = f32[50,1024]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %f = f32[1,1024]{1,0} fusion(%a, %i), kind=kLoop, calls=%inner
  ROOT %u = f32[50,1024]{1,0} dynamic-update-slice(%b, %f, %i, %i)
}
ENTRY %main (x: f32[50,1024], y: f32[50,1024], k: s32[]) -> f32[50,1024] {
  %x = f32[50,1024]{1,0} parameter(0)
  %y = f32[50,1024]{1,0} parameter(1)
  %k = s32[] parameter(2)
  ROOT %r = f32[50,1024]{1,0} fusion(%x, %y, %k), kind=kLoop, calls=%outer
}
"""
  assert hlo.Program(text).hbm_bytes() == pytest.approx(2 * 4096, abs=8)


def test_a_collective_in_pieces_counts_once():
  """As libtpu 0.0.42 writes one that goes on within the fusions of other work."""
  gather = """all-gather(%p), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, \
frontend_attributes={chain_id="1"}"""
  text = f"""HloModule m
%begin (p: bf16[2,128]) -> (bf16[2,128], bf16[8,128]) {{
  %p = bf16[2,128]{{1,0}} parameter(0)
  %g = bf16[8,128]{{1,0}} {gather}
  ROOT %c = (bf16[2,128]{{1,0}}, bf16[8,128]{{1,0}}) custom-call(%g), \
custom_call_target="AsyncCollectiveStart"
}}
%work (p: bf16[2,128], q: bf16[8,128], x: f32[1024]) -> (f32[1024], bf16[2,128], bf16[8,128]) {{
  %p = bf16[2,128]{{1,0}} parameter(0)
  %q = bf16[8,128]{{1,0}} parameter(1)
  %x = f32[1024]{{0}} parameter(2)
  %n = f32[1024]{{0}} negate(%x)
  %g = bf16[8,128]{{1,0}} {gather}
  ROOT %t = (f32[1024]{{0}}, bf16[2,128]{{1,0}}, bf16[8,128]{{1,0}}) tuple(%n, %p, %g)
}}
%end (p: bf16[2,128], q: bf16[8,128]) -> bf16[8,128] {{
  %p = bf16[2,128]{{1,0}} parameter(0)
  %q = bf16[8,128]{{1,0}} parameter(1)
  %g = bf16[8,128]{{1,0}} {gather}
  ROOT %c = bf16[8,128]{{1,0}} custom-call(%p, %q, %g), custom_call_target="AsyncCollectiveDone"
}}
ENTRY %main (a: bf16[2,128], x: f32[1024]) -> bf16[8,128] {{
  %a = bf16[2,128]{{1,0}} parameter(0)
  %x = f32[1024]{{0}} parameter(1)
  %s = (bf16[2,128]{{1,0}}, bf16[8,128]{{1,0}}) fusion(%a), kind=kCustom, calls=%begin
  %sp = bf16[2,128]{{1,0}} get-tuple-element(%s), index=0
  %sq = bf16[8,128]{{1,0}} get-tuple-element(%s), index=1
  %w = (f32[1024]{{0}}, bf16[2,128]{{1,0}}, bf16[8,128]{{1,0}}) fusion(%sp, %sq, %x), \
kind=kOutput, calls=%work
  %wp = bf16[2,128]{{1,0}} get-tuple-element(%w), index=1
  %wq = bf16[8,128]{{1,0}} get-tuple-element(%w), index=2
  ROOT %e = bf16[8,128]{{1,0}} fusion(%wp, %wq), kind=kCustom, calls=%end
}}
"""
  program = hlo.Program(text)
  (found,) = program.collectives()
  assert (found.kind, found.bytes, found.runs) == ("all-gather", 512, 1)
  traffic = {op.name: moved for op, moved in program.traffic()}
  assert traffic == {"s": 512 + 512 + 2048, "w": 2 * 4096}


def test_what_is_no_hlo_is_named():
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.Program("hello")


def test_a_subaxis_group_covers_every_device_once():
  members = hlo._groups("replica_groups=mesh['a'=2,'b'=8,'c'=3] {'b':(2)2,'c'}")
  assert sorted(members.ravel()) == list(range(48)) and members.shape == (8, 6)
  assert np.array_equal(members[0], [0, 1, 2, 6, 7, 8])


def test_what_hosts_sum_between_tpu_slices_is_sent():
  """As libtpu 0.0.42 writes it for two slices; what goes to a host for other ends is not."""
  text = """HloModule m

ENTRY %main (p: f32[128,8]) -> f32[128,8] {
  %p = f32[128,8]{1,0} parameter(0)
  %t = token[] after-all()
  %s = (f32[128,8]{1,0}, u32[], token[]) send(%p, %t), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %d = token[] send-done(%s), channel_id=2, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %o = (f32[128,8]{1,0}, u32[], token[]) send(%p, %d), channel_id=3, is_host_transfer=true
  ROOT %c = f32[128,8]{1,0} copy(%p)
}
"""
  (found,) = hlo.Program(text).collectives()
  assert (found.kind, found.bytes, found.groups) == ("send", 128 * 8 * 4, None)
