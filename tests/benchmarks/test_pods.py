"""The training steps of configs/, compiled by the TPU compiler for the slices they name: `make pods`.

Limits are 3% above what was measured (libtpu 0.0.52, JAX 0.12.0.1; docs/speed.md). With 4 sequences of 4096
per chip MaxText 0.2.5's compiled steps take for 7B on four chips 77.0 GB and 4.31e9 cycles, for 70B on 64
chips 95.6 GB and 3.89e10.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The compiler's own limit in place of that of `compiler_flags`, with which it takes three times as long, and
# the step a tenth less: no law below depends on it. 7B on four chips is in test_programs.
QUICK = "--xla_tpu_scoped_vmem_limit_kib=-1"


@pytest.mark.pods
def test_the_70b_step_fits_and_is_fast():
    command = [sys.executable, "-m", "benchmarks.tpu_compile", "configs/llama2_70b.toml", "--json"]
    report = compiled([*command, "--topology", "v5p:4x4x4"])
    assert report["peak_hbm_bytes"] < 92.5e9
    assert report["estimated_cycles"] <= 3.39e10
    assert report["tokens_per_step"] == 4 * 4096 * report["chips"]
    # No all-gather of f32 weights, the state is donated, and logits [B, T, V] never exist as a whole.
    assert report["f32_parameter_gathers"] == 0
    assert report["donated_arrays"] == report["state_arrays"]
    assert 0 < report["logits_positions"] < report["positions"]
    assert report["collective_seconds"] < report["seconds"] / 2
    # Asynchronous, with products beside them, and rings however many chips there are: only the gradients of
    # norms, 64 kB a layer, are all-reduced.
    assert report["asynchronous_share"] > 0.95
    assert all(one["bytes"] < 1e6 for one in report["collectives"] if one["kind"] == "all-reduce")


@pytest.mark.pods
def test_70b_on_two_slices_sends_each_gradient_once():
    """4 bytes times the parameters on a chip; a sum in each microbatch, as shards, would be 4 times that."""
    command = [sys.executable, "-m", "benchmarks.tpu_compile", "configs/llama2_70b.toml", "--json"]
    slices = ["--topology", "v5p-128", "--mesh.slices", "2", "--mesh.data", "2"]
    report = compiled([*command, *slices, "--train.global_batch_size", "512"])
    assert report["chips"] == 128
    assert 4 * 68.9e9 / 64 < report["dcn_bytes"] < 5e9


def compiled(command, flags=QUICK):
    environ = {**os.environ, "LIBTPU_INIT_ARGS": flags}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    print({key: value for key, value in report.items() if key != "collectives"})
    return report


@pytest.mark.pods
def test_70b_is_finetuned_on_eight_chips():
    """By QLoRA: the state is little more than the weights, and 4-bit codes and scales travel."""
    command = [sys.executable, "-m", "benchmarks.tpu_compile", "configs/sft_llama2_70b.toml", "--json"]
    report = compiled([*command, "--shape", "llama2_70b", "--adapter.base", "nf4", "--topology", "v5p:2x2x2"])
    assert report["peak_hbm_bytes"] < 72e9
    assert report["estimated_cycles"] <= 3.5e10
    assert report["tokens_per_step"] == 4 * 4096 * report["chips"]
    base_bytes = 69e9 * 0.57 / report["chips"]
    assert base_bytes < report["state_bytes"] < 1.2 * base_bytes  # with the adapter and its moments
    assert report["donated_arrays"] == report["state_arrays"]
    dtypes = {
        one["dtype"] for one in report["collectives"] if one["kind"] == "all-gather" and one["bytes"] > 2e7
    }
    assert dtypes == {"u8"}
