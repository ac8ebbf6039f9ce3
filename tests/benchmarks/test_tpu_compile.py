"""Compiling a config's step for a TPU slice without one: a tiny real compile."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = """\
[model]
vocab_size = 1024
hidden_size = 384
intermediate_size = 512
num_hidden_layers = 3
num_attention_heads = 3
head_dim = 128

[tokenizer]
vocab_size = 1024

[train]
global_batch_size = 8
seq_len = 256
remat = "save_projections"

[mesh]
fsdp = 4
topology = "v5p:2x2x1"
"""


def run(tmp_path, *arguments):
    config = tmp_path / "tiny.toml"
    config.write_text(TINY)
    script = str(ROOT / "benchmarks" / "tpu_compile.py")
    return subprocess.run(
        [sys.executable, script, str(config), *arguments],
        env={"PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )


@pytest.mark.pods
def test_a_tiny_step_is_compiled_and_reported_as_json(tmp_path):
    done = run(tmp_path, "--json", "--train.gradient_accumulation_steps", "2")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["topology"] == "v5p:2x2x1"
    assert report["tokens_per_step"] == 8 * 256
    assert report["donated_arrays"] == report["state_arrays"]
    assert report["f32_parameter_gathers"] == 0
    assert report["positions"] == 256
    assert report["logits_positions"] < 256  # no [B, T, V]
    assert 0 < report["mfu"] < 1
    assert report["estimated_cycles"] > 0
    assert report["peak_hbm_bytes"] > report["state_bytes"] > 0
    gathers = [
        collective
        for collective in report["collectives"]
        if collective["kind"] == "all-gather" and collective["dtype"] == "bf16"
    ]
    down = 512 * 384 * 2
    # w_gate, w_up and w_down: forwards and backwards, in each layer and microbatch.
    assert sum(gather["times"] for gather in gathers if gather["bytes"] == down) == 3 * 2 * 3 * 2


@pytest.mark.pods
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--topology", "v5p-16"],
            "mesh fsdp 4: it takes 4 of 8 devices",
        ),
        (
            ["--train.global_batch_size", "6"],
            "batch of 6 rows does not divide over mesh axes data x fsdp of size 4",
        ),
        (["--topology", "v9:2x2"], "topology v9:2x2 cannot be compiled for"),
        (["--train.remt", "full"], "did you mean train.remat"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, message):
    done = run(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
