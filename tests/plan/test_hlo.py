"""Reading a compiled program's text: cycles by trip counts, collectives, shapes, donation."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from llama_jax.plan import collectives, hlo

# A program in the compiler's own words, cut to what matters: a loop in a loop, a fusion that calls another
# computation, a conditional, a call, and a custom call whose attribute runs over lines that begin with `}`.
PROGRAM = """\
HloModule jit_step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias), \
{1}: (2, {}, may-alias) }, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%fused (p: bf16[4,8]) -> bf16[4,8] {
  ROOT %inner.1 = bf16[4,8]{1,0} fusion(%p), kind=kLoop, calls=%add, \
backend_config={"estimated_cycles":"1000000"}
}

%all-reduce-scatter.3 (input: f32[64,8]) -> f32[16,8] {
  %input = f32[64,8]{1,0} parameter(0)
  %all-reduce.9 = f32[64,8]{1,0} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice = f32[16,8]{1,0} dynamic-slice(%all-reduce.9, %i), dynamic_slice_sizes={16,8}
}

%inner_cond (s: (s32[], f32[8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(3)
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

%inner_body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %work.1 = f32[8]{0:T(128)} fusion(%s), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"10"}
  %gather.1 = bf16[1,64,8]{2,1,0:T(8,128)(2,1)} all-gather(%w), \
replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}
  ROOT %next = (s32[], f32[8]) tuple(%i, %work.1)
}

%outer_cond (s: (s32[], f32[8])) -> pred[] {
  ROOT %wrapped = pred[] fusion(%s), kind=kLoop, calls=%outer_compare
}

%outer_compare (s: s32[]) -> pred[] {
  %bound.2 = s32[] constant(5)
  ROOT %lt.2 = pred[] compare(%s, %bound.2), direction=LT
}

%outer_body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %while.1 = (s32[], /*index=1*/f32[8]{0}) while(%s), condition=%inner_cond, body=%inner_body
  %scatter.1 = f32[16,8]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.3
  %kernel.1 = (bf16[4,32000]{1,0}, f32[4]{0}) custom-call(%q), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="attention"}
  %after.1 = f32[8]{0} copy(%kernel.1), backend_config={"estimated_cycles":"100"}
  ROOT %out = (s32[], f32[8]) tuple(%i, %after.1)
}

%cheap (x: f32[8]) -> f32[8] {
  ROOT %c = f32[8]{0} copy(%x), backend_config={"estimated_cycles":"1"}
}

%dear (x: f32[8]) -> f32[8] {
  ROOT %d = f32[8]{0} copy(%x), backend_config={"estimated_cycles":"7000"}
}

%called (x: f32[8]) -> f32[8] {
  ROOT %e = f32[8]{0} copy(%x), backend_config={"estimated_cycles":"20000"}
}, execution_thread="sparsecore"

ENTRY %main (a: f32[8], b: s32[], c: f32[8]) -> (f32[8], f32[8]) {
  %while.2 = (s32[], f32[8]{0}) while(%start), condition=%outer_cond, body=%outer_body
  %branch = f32[8]{0} conditional(%p, %a, %c), branch_computations={%cheap, %dear}
  %call.1 = f32[8]{0} call(%a), to_apply=%called
  %unknown = f32[8]{0} fusion(%a), kind=kLoop, calls=%fused, \
backend_config={"estimated_cycles":"9223372036854775807"}
  %start.1 = (f32[4]{0}, f32[16]{0}) all-gather-start(%a), replica_groups=[2,4]<=[8]
  %done.1 = f32[16]{0} all-gather-done(%start.1)
  ROOT %result = (f32[8], f32[8]) tuple(%branch, %call.1)
}
"""


@pytest.fixture(scope="module")
def module():
    return hlo.parse(PROGRAM)


def test_cycles_are_multiplied_by_trip_counts(module):
    """Inner loop 3 x 10 and 100 beside it, 5 times; the dear branch; the call. What is fused counts once."""
    assert hlo.estimated_cycles(module) == 5 * (3 * 10 + 100) + 7000 + 20000


def test_most_expensive_instructions_come_first(module):
    costs = [(total, times, one.name) for total, times, one in hlo.cycles_by_instruction(module)]
    assert costs == [(20000, 1, "e"), (7000, 1, "d"), (500, 5, "after.1"), (150, 15, "work.1")]


def test_a_line_starting_with_a_brace_does_not_end_a_computation(module):
    body = [instruction.name for instruction in module.computations["outer_body"]]
    assert body == ["while.1", "scatter.1", "kernel.1", "after.1", "out"]
    kernel = module.computations["outer_body"][2]
    assert kernel.opcode == "custom-call"
    assert kernel.arrays == [("bf16", (4, 32000)), ("f32", (4,))]
    assert 'op_name="attention"' in kernel.rest


def test_collectives_with_kind_bytes_group_and_times(module):
    found = {one.name: one for one in collectives.find(module)}
    told = {n: (c.kind, c.dtype, c.bytes, c.group, c.times, c.overlapped) for n, c in found.items()}
    assert told == {
        "gather.1": ("all-gather", "bf16", 64 * 8 * 2, 4, 15, False),
        "scatter.1": ("reduce-scatter", "f32", 64 * 8 * 4, 4, 5, False),
        "start.1": ("all-gather", "f32", 16 * 4, 4, 1, False),  # nothing runs before its end
    }


def test_equal_collectives_are_merged(module):
    found = collectives.find(module)
    assert [(c.kind, c.times) for c in collectives.summed([*found, *found])] == [
        ("all-gather", 30),
        ("reduce-scatter", 10),
        ("all-gather", 2),
    ]


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1},{2,3}}", 2),
        ("replica_groups=[4,16]<=[64]", 16),
        ("replica_groups=[8,8]<=[8,8]T(1,0)", 8),
        ("replica_groups=mesh['data'=2,'fsdp'=4,'tensor'=3] {'fsdp','tensor'}", 12),
        ("replica_groups=mesh['axis_0'=64] {'axis_0'}", 64),
    ],
)
def test_every_replica_group_format(groups, size):
    line = f"  %r = f32[2]{{0}} all-reduce(%a), {groups}"
    text = f"HloModule m\n\nENTRY %main (a: f32[2]) -> f32[2] {{\n{line}\n}}\n"
    (one,) = collectives.find(hlo.parse(text))
    assert (one.kind, one.bytes, one.group) == ("all-reduce", 8, size)


def test_combined_collectives_count_fully_and_async_operands_do_not():
    def moved(shape, opcode):
        line = f"  %r = {shape} {opcode}(%a), replica_groups={{{{0,1}}}}"
        text = f"HloModule m\n\nENTRY %main (a: f32[2]) -> f32[2] {{\n{line}\n}}\n"
        return collectives.find(hlo.parse(text))[0].bytes

    assert moved("(f32[2]{0}, f32[6]{0})", "all-reduce") == 4 * 8
    assert moved("(f32[2]{0}, f32[4]{0})", "all-gather-start") == 4 * 4


def test_a_known_trip_count_is_used(module):
    (loop,) = hlo.parse(
        "HloModule m\n\nENTRY %main (a: s32[]) -> s32[] {\n  %w = s32[] while(%a), condition=%c, body=%b, "
        'backend_config={"known_trip_count":{"n":"17"}}\n}\n'
    ).computations["main"]
    assert hlo.trip_count(module, loop) == 17
    assert hlo.trip_count(module, module.computations["main"][0]) == 5  # from the fused comparison


def test_a_loop_that_counts_by_two_runs_half_as_often():
    """As the compiler unrolls the loops into which it turns a product and the collective beside it."""
    text = PROGRAM.replace(
        "  ROOT %next = (s32[], f32[8]) tuple(%i, %work.1)",
        "  %two = s32[] constant(2)\n  %at = s32[] get-tuple-element(%s), index=0\n"
        "  %ahead = s32[]{:T(128)} add(%at, %two)\n"
        "  ROOT %next = (s32[], f32[8]) tuple(%ahead, %work.1)",
    )
    module = hlo.parse(text)
    (loop,) = (one for one in module.computations["outer_body"] if one.opcode == "while")
    assert hlo.trip_count(module, loop) == 2  # 0 and 2, below 3
    assert hlo.trip_count(hlo.parse(PROGRAM), loop) == 3


def test_a_loop_without_a_bound_is_an_error(module):
    loop = hlo.Instruction("w", "s32[]", "while", "%a), condition=%add, body=%inner_body")
    with pytest.raises(ValueError, match="loop w has no constant bound in its condition add"):
        hlo.trip_count(module, loop)


def test_other_dimensions_of_arrays_with_a_dimension(module):
    assert hlo.beside(module, 32000) == {4}
    assert hlo.beside(module, 8) == {1, 16, 64}
    assert hlo.beside(module, 31999) == set()


def test_donated_parameters(module):
    assert hlo.donated(module) == {0, 2}
    assert hlo.donated(hlo.parse("HloModule m, entry_computation_layout={()->f32[]}\n")) == set()


@pytest.mark.pods
def test_reads_what_the_tpu_compiler_writes():
    """A scan of six products on 2 x 2 chips, the weights gathered in bf16, the state donated."""
    script = """
    import json, os
    import jax, jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec as P
    from llama_jax.plan import collectives, hlo
    from llama_jax.meshes import make_mesh

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
    mesh = make_mesh("fsdp=4", devices=devices)

    def step(weights, x):
        def layer(x, w):
            w = jax.sharding.reshard(w.astype(jnp.bfloat16), P(None, None))
            return jnp.dot(x, w, out_sharding=P("fsdp", None)), None
        y, _ = jax.lax.scan(layer, x, weights)
        return weights + 1, y.sum()

    def abstract(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    with jax.set_mesh(mesh):
        weights = abstract((6, 1024, 1024), jnp.float32, None, "fsdp", None)
        x = abstract((4096, 1024), jnp.bfloat16, "fsdp", None)
        text = jax.jit(step, donate_argnums=0).lower(weights, x).compile().as_text()
    module = hlo.parse(text)
    gathers = [c for c in collectives.find(module) if c.kind == "all-gather"]
    print(json.dumps({
        "cycles": hlo.estimated_cycles(module),
        "gathers": [(c.dtype, c.bytes, c.group, c.times) for c in gathers],
        "donated": sorted(hlo.donated(module)),
    }))
    """
    environment = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    floor = 6 * 2 * 1024**3 / (8 * 128 * 128 * 2)  # FLOPs over those of a cycle
    assert floor < told["cycles"] < 20 * floor
    assert told["gathers"] == [["bf16", 1024 * 1024 * 2, 4, 6]]
    assert told["donated"] == [0]
