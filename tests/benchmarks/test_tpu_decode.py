"""Generation compiled by the TPU compiler: a prompt of 131,072 tokens on eight chips. `make pods`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LENGTH, CHIPS, LAYERS = 131_072, 8, 2


@pytest.mark.pods
def test_7b_holds_an_eighth_of_the_cache_and_moves_none_of_it():
    """With two of its layers: what they need grows with their number."""
    command = [sys.executable, "-m", "benchmarks.tpu_decode", "llama2_7b", "--topology", "v5p:2x2x2"]
    command += ["--mesh", f"context={CHIPS}", "--length", str(LENGTH), "--layers", str(LAYERS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    prefill, decode = map(json.loads, done.stdout.splitlines())
    print(prefill, decode, sep="\n")
    share = 2 * LAYERS * 2 * 4096 * LENGTH // CHIPS  # of keys and values in bf16
    weights = 2 * (2 * 32_000 * 4096 + LAYERS * (4 * 4096**2 + 3 * 4096 * 11_008))
    for program in (prefill, decode):
        assert program["peak_hbm_bytes"] < weights + share * CHIPS / 2  # no whole cache
        shapes = [re.findall(r"\d+", shape.partition("[")[2]) for shape in program["collectives"]]
        assert shapes and not [s for s in shapes if {str(LENGTH), str(LENGTH // CHIPS)} & set(s)]
    held = weights / CHIPS + share  # `context` divides stored weights too
    assert held < decode["argument_bytes"] < held + 5e6
