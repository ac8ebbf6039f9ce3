"""The published configs' steps, compiled by the real TPU compiler for the slices they name: `make pods`.

Limits are of MaxText 0.2.5's compiled steps at the same size and 4 sequences of 4096 a chip (libtpu 0.0.52,
JAX 0.12): 7B on four chips 77.0 GB and 4.31e9 cycles, 70B on 64 chips 95.6 GB and 3.89e10.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HBM = 95e9  # a v5p chip's


@pytest.mark.pods
@pytest.mark.parametrize(
    ("config", "topology", "most_bytes", "most_cycles"),
    [
        ("llama2_7b", "v5p:2x2x1", 77e9, 4.25e9),
        ("llama2_70b", "v5p-128", 90e9, 3.7e10),
        ("llama2_7b", None, HBM, 4.25e9),  # the slice that the file names
        ("llama2_70b", None, HBM, 3.7e10),
    ],
)
def test_the_step_fits_and_is_fast(config, topology, most_bytes, most_cycles):
    words = ["--topology", topology] if topology else []
    command = [sys.executable, "-m", "benchmarks.tpu_compile", f"configs/{config}.toml", "--json", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    print({key: value for key, value in told.items() if key != "collectives"})
    assert told["peak_hbm_bytes"] < most_bytes
    assert told["estimated_cycles"] <= most_cycles
    assert told["tokens_per_step"] == 4 * 4096 * told["chips"]
    # No weight crosses the links in f32, the state is updated in place, and no [B, T, V] is ever formed.
    assert told["f32_parameter_gathers"] == 0
    assert told["donated_arrays"] == told["state_arrays"]
    assert 0 < told["logits_positions"] < told["positions"]
    assert told["collective_seconds"] < told["seconds"] / 2


@pytest.mark.pods
@pytest.mark.parametrize(
    ("more", "most_bytes", "most_cycles"),
    [
        ([], 72e9, 2.9e10),
        (["--adapter.base", "nf4", "--topology", "v5p:2x2x2"], 72e9, 3.5e10),
    ],
    ids=["lora", "qlora"],
)
def test_the_largest_is_finetuned_on_few_chips(more, most_bytes, most_cycles):
    """The 70B by LoRA on 16 chips and, held in 4 bits, on 8: the state is little more than the weights."""
    command = [sys.executable, "-m", "benchmarks.tpu_compile", "configs/sft_llama2_70b.toml", "--json"]
    done = subprocess.run(
        [*command, "--shape", "llama2_70b", *more], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    print({key: value for key, value in told.items() if key != "collectives"})
    assert told["peak_hbm_bytes"] < most_bytes
    assert told["estimated_cycles"] <= most_cycles
    assert told["tokens_per_step"] == 4 * 4096 * told["chips"]
    held = 69e9 * (0.57 if "nf4" in more else 2) / told["chips"]
    assert held < told["state_bytes"] < 1.2 * held  # with the adapter and its moments
    assert told["donated_arrays"] == told["state_arrays"]
    # What crosses the links of a 4-bit base is its codes and scales; of a bf16 base no f32 at all.
    dtypes = {
        one["dtype"] for one in told["collectives"] if one["kind"] == "all-gather" and one["bytes"] > 2e7
    }
    assert dtypes == ({"u8"} if "nf4" in more else {"bf16"})
