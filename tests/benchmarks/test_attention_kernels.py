"""Mosaic's schedule of attention's kernels for v5p: what the loops over tiles issue, within 3%."""

from __future__ import annotations

import pytest

from benchmarks import attention_kernels
from benchmarks.attention_kernels import largest_block, measure


@pytest.mark.pods
@pytest.mark.parametrize(("kernel", "bundles"), [("forward", 4188), ("gradient", 9232)])
def test_a_tile_takes_as_many_bundles_as_it_did(kernel, bundles):
    found, share = measure("ours", kernel, "v5p:2x2x1")
    assert found <= 1.03 * bundles
    assert 0.8 < share <= 1


def test_the_block_with_most_products_and_no_mask(tmp_path, monkeypatch):
    """Of two loops with the same products, the shorter; what is around them does not count."""
    use = ["== CAPACITY:", "MATMUL, VALU", " 4 4", "== UTILIZATION:"]
    use += ["0 1"] * 2 + ["4 0"] * 3 + ["4 1", "4 1", "4 1", "0 1"] + ["0 0"]
    (tmp_path / "1-splash-final_hlo-static-per-bundle-utilization.txt").write_text("\n".join(use))
    labels = {2: "LB", 5: "LB"}
    program = "\n".join(f"  {hex(at)} {labels.get(at, '')} : > {{ nop }}" for at in range(10))
    program = program.replace("0x9  : > { nop }", "0x9  : > { sbr.rel }").replace("0x0", "0")
    (tmp_path / "2-splash-final_bundles.txt").write_text(program)
    assert largest_block(tmp_path) == (3, 1.0)
    assert attention_kernels.SIDES["ours"] == 512
