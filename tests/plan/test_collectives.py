"""Reading collectives: what SparseCore runs beside computation, replica groups, sends between slices."""

from __future__ import annotations

import dataclasses

import pytest

from llama_jax.plan import collectives, hlo

# In the TPU compiler's own words, cut to what matters: a loop of three trips with an all-gather on SparseCore
# that has a product beside it, a reduce-scatter with none, and a send to another slice.
PROGRAM = """\
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%called.1 (p: bf16[8,128]) -> bf16[32,128] {
  ROOT %all-gather.1 = bf16[32,128]{1,0} all-gather(%p), \\
replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}
}, execution_thread="sparsecore"

%called.2 (p: f32[32,128]) -> f32[8,128] {
  ROOT %reduce-scatter.1 = f32[8,128]{1,0} reduce-scatter(%p), \\
replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}, execution_thread="sparsecore"

%fused (p: f32[8]) -> f32[8] {
  ROOT %f = f32[8]{0} copy(%p)
}

%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %ag.call-start = ((), (), (s32[8]{0}, /*index=1*/s32[0]{0})) custom-call-start(), \
async_execution_thread="sparsecore", called_computations={%called.1}
  %busy.1 = f32[8]{0} fusion(%a), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"10"}
  %ag.call-update = ((bf16[8,128]{1,0}), bf16[32,128]{1,0}, (s32[8]{0})) custom-call-update(%ag.call-start, \
%p)
  BETWEEN
  %ag.call-done = bf16[32,128]{1,0} custom-call-done(%ag.call-update), frontend_attributes={a="b"}
  %rs.call-start = ((), (), (s32[8]{0})) custom-call-start(), called_computations={%called.2}
  %busy.3 = f32[8]{0} fusion(%a), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"10"}
  %rs.call-update = ((f32[32,128]{1,0}), f32[8,128]{1,0}, (s32[8]{0})) custom-call-update(%rs.call-start, %g)
  %cast = f32[8]{0} bitcast(%busy.3)
  %rs.call-done = f32[8,128]{1,0} custom-call-done(%rs.call-update)
  %send.1 = (f32[8,128]{1,0}, u32[]{:S(2)}, token[]) send(%x, %t), channel_id=1, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  ROOT %next = (s32[], f32[8]) tuple(%i, %busy.1)
}

%condition (s: (s32[], f32[8])) -> pred[] {
  %bound = s32[] constant(3)
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %while.1 = (s32[], f32[8]{0}) while(%start), condition=%condition, body=%body
  %send.2 = (f32[16]{0}, u32[], token[]) send(%to_the_host, %t), channel_id=9, is_host_transfer=true
  ROOT %result = f32[8]{0} get-tuple-element(%while.1), index=1
}
"""
PRODUCT = """\
%busy.2 = f32[8]{0} fusion(%a), kind=kOutput, calls=%fused, backend_config={"estimated_cycles":"10"}
"""


@pytest.mark.parametrize("product", [True, False])
def test_a_collective_overlaps_if_computation_runs_between_its_operands_and_its_end(product):
    module = hlo.parse(PROGRAM.replace("BETWEEN\n", PRODUCT if product else ""))
    found = {one.name: one for one in collectives.find(module)}
    told = {name: (c.kind, c.bytes, c.group, c.times, c.overlapped) for name, c in found.items()}
    assert told == {
        "ag.call-start": ("all-gather", 32 * 128 * 2, 4, 3, product),
        "rs.call-start": ("reduce-scatter", 32 * 128 * 4, 4, 3, False),
    }
    assert collectives.asynchronous_share(list(found.values())) == pytest.approx(product / 3)


def test_sends_to_other_slices_are_counted_and_not_those_to_the_host():
    assert collectives.sent_between_slices(hlo.parse(PROGRAM)) == 3 * 8 * 128 * 4


@pytest.mark.parametrize(
    ("text", "groups", "axes"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", ((0, 1, 2, 3), (4, 5, 6, 7)), ("b",)),
        ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7)), ("b",)),
        ("[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7)), ("a",)),
        ("mesh['a'=2,'b'=4] {'a'}", ((0, 4), (1, 5), (2, 6), (3, 7)), ("a",)),
        ("mesh['a'=2,'b'=4] {'a','b'}", ((0, 1, 2, 3, 4, 5, 6, 7),), ("a", "b")),
        ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}", ((0, 1, 2, 3), (4, 5, 6, 7)), ("b",)),
        ("{{0},{1},{2},{3},{4},{5},{6},{7}}", tuple((n,) for n in range(8)), ()),
    ],
)
def test_replica_groups_and_the_mesh_axes_that_they_span(text, groups, axes):
    found = collectives.replica_groups(f"%x), replica_groups={text}, use_global_device_ids=true")
    assert found == groups
    assert collectives.mesh_axes(groups, {"a": 2, "b": 4}) == axes


def test_pairs_are_no_groups():
    assert collectives.replica_groups("%x), source_target_pairs={{0,1},{1,0}}") is None


def test_the_pairs_of_a_permute():
    line = "  %p = f32[2]{0} collective-permute(%a), channel_id=3, source_target_pairs={{0,1},{1,2},{2,0}}"
    text = f"HloModule m\n\nENTRY %main (a: f32[2]) -> f32[2] {{\n{line}\n}}\n"
    (one,) = collectives.find(hlo.parse(text))
    assert (one.kind, one.pairs, one.groups, one.moved) == (
        "collective-permute",
        ((0, 1), (1, 2), (2, 0)),
        (),
        8,
    )


def test_sums_of_zero_filled_weights_between_several_slices_are_the_gathers_that_they_stand_for():
    mesh = {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}
    weights = collectives.Collective(
        "all-reduce", "bf16", 64, 4, 1, True, groups=((0, 1, 2, 3), (4, 5, 6, 7))
    )
    gradients = dataclasses.replace(weights, dtype="f32")
    everywhere = dataclasses.replace(weights, groups=(tuple(range(8)),))
    found = collectives.with_gathers([weights, gradients, everywhere], mesh, "bf16")
    assert [one.kind for one in found] == ["all-gather", "all-reduce", "all-reduce"]
    assert [one.moved for one in found] == [48, 96, 96]
