"""Plans as text: tables, sentences, the cost of a run."""

from __future__ import annotations

import dataclasses

import pytest

from llama_jax.plan.explain import explain
from llama_jax.plan.table import bar, budget, tables
from tests.plan.plans import PLAN, TOO_LARGE


def test_a_step_is_computation_waiting_and_launches():
    assert PLAN.step_seconds == pytest.approx(13.1 + 0.75 + 0.15)
    assert PLAN.mfu == pytest.approx(3.2e15 / 14 / 459e12)
    assert PLAN.mfu_full_attention / PLAN.mfu == pytest.approx(3.5 / 3.2)
    assert PLAN.mfu_without_waiting == pytest.approx(3.2e15 / 13.1 / 459e12)
    assert PLAN.chip == "v5p"


def test_the_cost_of_a_run_follows_tokens_and_price():
    whole = budget(PLAN)
    assert whole.chip_hours == pytest.approx(1000 * 14 * 64 / 3600)
    assert whole.dollars == pytest.approx(4.20 * whole.chip_hours)
    tenth = budget(PLAN, tokens=100 * PLAN.tokens_per_step, price=1.0)
    assert (tenth.steps, tenth.price_source) == (100, "as given")
    assert tenth.dollars == pytest.approx(whole.chip_hours / 10)


def test_a_chip_without_a_price_says_so():
    cost = budget(dataclasses.replace(PLAN, topology="2 x tpu7x:4x4x4"))
    assert cost.dollars is None
    assert "--price" in cost.price_source


def test_tables_show_every_part_and_axis():
    shown = tables(PLAN, budget(PLAN))
    text = "\n".join("  ".join(row) for table in shown for row in table.rows)
    for part in ("parameters", "activations", "feed-forward products", "optimizer", "all-gather over fsdp"):
        assert part in text
    assert "waiting for collectives" in text
    assert "1.1 TB" in text
    assert "DCN" in text
    assert all(len(row) == len(table.header) for table in shown for row in table.rows)
    assert "DOES NOT FIT" in str(tables(TOO_LARGE, budget(TOO_LARGE))[-1].rows)


def test_bars_grow_by_eighths():
    assert [bar(n, 16, 2) for n in (0, 1, 4, 8, 9, 16, 20)] == ["", "▏", "▌", "█", "█▏", "██", "██"]


def test_each_large_part_is_explained_by_its_roofline():
    text = "\n".join(explain(PLAN))
    assert (
        "Feed-forward products: 10.00 s (71.4% of the step), bound by matrix units: 400 TFLOP/s, 87%" in text
    )
    assert "Optimizer" not in text  # under 1%
    assert "88% is hidden" in text  # 0.5 of 4 s
    assert "mesh.gradient_dtype = bfloat16" in text
    assert text.endswith("Stragglers are not modelled.")
    assert "13.0 GB too much" in explain(TOO_LARGE)[0]
