"""The training steps of configs/, compiled by the TPU compiler for the slices they name: `make pods`.

The limits are those of MaxText 0.2.5's compiled steps of the same size, with 4 sequences of 4096 per chip
(libtpu 0.0.52, JAX 0.12): 7B on four chips 77.0 GB and 4.31e9 cycles, 70B on 64 chips 95.6 GB and 3.89e10.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HBM = 95e9  # bytes per v5p chip


@pytest.mark.pods
@pytest.mark.parametrize(
    ("config", "topology", "max_bytes", "max_cycles"),
    [
        ("llama2_7b", "v5p:2x2x1", 77e9, 4.25e9),
        ("llama2_70b", "v5p-128", 90e9, 3.7e10),
        ("llama2_7b", None, HBM, 4.25e9),  # the slice in mesh.topology
        ("llama2_70b", None, HBM, 3.7e10),
    ],
)
def test_the_step_fits_and_is_fast(config, topology, max_bytes, max_cycles):
    arguments = ["--topology", topology] if topology else []
    command = [sys.executable, "-m", "benchmarks.tpu_compile", f"configs/{config}.toml", "--json", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    print({key: value for key, value in report.items() if key != "collectives"})
    assert report["peak_hbm_bytes"] < max_bytes
    assert report["estimated_cycles"] <= max_cycles
    assert report["tokens_per_step"] == 4 * 4096 * report["chips"]
    # No all-gather of f32 weights, the state is donated, and logits [B, T, V] never exist as a whole.
    assert report["f32_parameter_gathers"] == 0
    assert report["donated_arrays"] == report["state_arrays"]
    assert 0 < report["logits_positions"] < report["positions"]
    assert report["collective_seconds"] < report["seconds"] / 2


@pytest.mark.pods
@pytest.mark.parametrize(
    ("overrides", "max_bytes", "max_cycles"),
    [
        ([], 72e9, 2.9e10),
        (["--adapter.base", "nf4", "--topology", "v5p:2x2x2"], 72e9, 3.5e10),
    ],
    ids=["lora", "qlora"],
)
def test_70b_is_finetuned_on_few_chips(overrides, max_bytes, max_cycles):
    """The 70B by LoRA on 16 chips and by QLoRA on 8: the state is little overrides than the weights."""
    command = [sys.executable, "-m", "benchmarks.tpu_compile", "configs/sft_llama2_70b.toml", "--json"]
    done = subprocess.run(
        [*command, "--shape", "llama2_70b", *overrides], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    print({key: value for key, value in report.items() if key != "collectives"})
    assert report["peak_hbm_bytes"] < max_bytes
    assert report["estimated_cycles"] <= max_cycles
    assert report["tokens_per_step"] == 4 * 4096 * report["chips"]
    base_bytes = 69e9 * (0.57 if "nf4" in overrides else 2) / report["chips"]
    assert base_bytes < report["state_bytes"] < 1.2 * base_bytes  # with the adapter and its moments
    assert report["donated_arrays"] == report["state_arrays"]
    # A 4-bit base is all-gathered as codes and scales, a bf16 base never as f32.
    dtypes = {
        one["dtype"] for one in report["collectives"] if one["kind"] == "all-gather" and one["bytes"] > 2e7
    }
    assert dtypes == ({"u8"} if "nf4" in overrides else {"bf16"})
