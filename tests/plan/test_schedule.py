"""What computation waits for, in the order of a compiled program."""

from __future__ import annotations

import pytest

from llama_jax.plan import hlo, schedule
from llama_jax.plan.wiring import DCN, Use

HEADER = "HloModule jit_step, is_scheduled=true\n\n"
LOOP = """\
%condition (s: (s32[], f32[8])) -> pred[] {
  %bound = s32[] constant(TRIPS)
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
BODY
  ROOT %next = (s32[], f32[8]) tuple(%i, %x)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  ROOT %loop = (s32[], f32[8]{0}) while(%start), condition=%condition, body=%body
}
"""


def entry(*lines: str) -> hlo.Module:
    body = "".join(f"  {line}\n" for line in lines)
    return hlo.parse(f"{HEADER}ENTRY %main (a: f32[8]) -> f32[8] {{\n{body}}}\n")


def start(name: str) -> str:
    return f"%{name}-start = (f32[2], f32[8]) all-gather-start(%a), replica_groups={{{{0,1}}}}"


def done(name: str) -> str:
    return f"%{name}-done = f32[8] all-gather-done(%{name}-start)"


def work(name: str) -> str:
    return f"%{name} = f32[8] fusion(%a), kind=kLoop, calls=%f"


def simulate(module, seconds, **uses):
    """The time, and what is waited for, by name."""
    sides = {name: [Use(frozenset([side]), time)] for name, (side, time) in uses.items()}
    now, waits = schedule.simulate(module, seconds, {n.replace("_", "-"): use for n, use in sides.items()})
    assert now == pytest.approx(total(module, seconds) + sum(wait.exposed for wait in waits.values()))
    return now, {name: pytest.approx(wait.exposed) for name, wait in waits.items()}


def total(module, seconds):
    return sum(seconds.get(one.name, 0) * times for one, times in hlo.executed(module))


@pytest.mark.parametrize(("computed", "exposed"), [(3, 2), (5, 0), (9, 0)])
def test_what_computation_does_not_hide_is_exposed(computed, exposed):
    module = entry(start("a"), work("x"), done("a"))
    assert simulate(module, {"x": computed}, a_start=(0, 5))[1] == {"a-start": exposed}


def test_collectives_on_the_same_links_queue_and_on_others_do_not():
    module = entry(start("a"), start("b"), work("x"), done("a"), done("b"))
    same = simulate(module, {"x": 5}, a_start=(0, 5), b_start=(0, 5))
    other = simulate(module, {"x": 5}, a_start=(0, 5), b_start=(1, 5))
    assert (same[0], other[0]) == (10, 5)


def test_a_synchronous_collective_is_exposed_whole_but_for_what_it_is_fused_with():
    module = entry("%gather = f32[8] all-gather(%a), replica_groups={{0,1}}", work("x"))
    assert simulate(module, {"x": 9}, gather=(0, 5)) == (14, {"gather": 5})
    assert simulate(module, {"x": 9, "gather": 2}, gather=(0, 5)) == (14, {"gather": 3})


def test_sparse_core_starts_when_it_has_its_operands():
    module = entry(
        "%a-start = ((), (), (s32[8])) custom-call-start(), called_computations={%c}",
        work("x"),
        "%a-update = ((f32[2]), f32[8], (s32[8])) custom-call-update(%a-start, %a)",
        work("y"),
        "%a-done = f32[8] custom-call-done(%a-update)",
    )
    assert simulate(module, {"x": 9, "y": 2}, a_start=(0, 5))[1] == {"a-start": 3}


def test_what_other_slices_send_is_waited_for_where_it_is_received():
    runtime = '_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="r"'
    module = entry(
        f"%send = (f32[8], u32[], token[]) send(%a, %t), frontend_attributes={{{runtime}}}",
        f"%recv = (f32[8], u32[], token[]) recv(%t), frontend_attributes={{{runtime}}}",
        "%send-done = token[] send-done(%send)",
        work("x"),
        "%recv-done = (f32[8], token[]) recv-done(%recv)",
    )
    assert simulate(module, {"x": 3}, send=(DCN, 5))[1] == {"send": 2}


@pytest.mark.parametrize("trips", [1, 2, 7])
def test_a_loop_is_its_body_as_often_and_links_stay_busy_from_one_trip_to_the_next(trips):
    lines = [start("a"), work("x"), done("a"), start("b"), work("y")]  # b outlasts the trip
    body = "\n".join(f"  {line}" for line in lines)
    module = hlo.parse(HEADER + LOOP.replace("TRIPS", str(trips)).replace("BODY", body))
    now, waits = simulate(module, {"x": 4, "y": 1}, a_start=(0, 4), b_start=(0, 3))
    # From the second trip on, a waits for the 2 seconds that b takes beyond y.
    assert (now, waits["a-start"]) == (5 + 7 * (trips - 1), 2 * (trips - 1))
