"""Compiling a config's step for a TPU slice without one: slice names, errors, and a tiny real compile."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import tpu_compile
from benchmarks.tpu_topology import Topology
from llama_jax.config import presets
from llama_jax.errors import ConfigError, LlamaJaxError
from llama_jax.train.config.run import DataConfig, ModelConfig, RunConfig, TokenizerConfig, TrainConfig

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


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("v5p:4x4x4", "v5p:4x4x4"),
        ("v5p-8", "v5p:2x2x1"),
        ("v5p-32", "v5p:2x2x4"),
        ("v5p-128", "v5p:4x4x4"),  # 128 cores, two per chip
        ("v5p-1024", "v5p:8x8x8"),
        ("v5litepod-8", "v5e:2x4"),
        ("v6e-256", "v6e:16x16"),
        ("tpu7x:2x2x1", "tpu7x:2x2x1"),
    ],
)
def test_a_slice_by_sides_or_by_name(text, name):
    assert Topology.parse(text).name == name


@pytest.mark.parametrize("text", ["v5p", "v5p:", "v5p:4x0x4", "v5p-3", "v5p-24", "v9-8", "v5p-0"])
def test_any_other_topology_is_an_error(text):
    with pytest.raises(ConfigError, match=f"topology '{text}' is not KIND:SIDES, as in v5p:4x4x4"):
        Topology.parse(text)


def test_only_cubes_of_v5p_have_wrapped_links():
    assert Topology.parse("v5p:4x4x8").wraps
    assert not Topology.parse("v5p:2x2x1").wraps
    assert not Topology.parse("v6e:16x16").wraps


def test_too_little_memory_reports_how_much_and_what_to_try():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 101.37G of 95.74G hbm. "
        "Exceeded hbm capacity by 5.63G.\n\nTotal hbm usage >= 101.63G:\n"
    )
    assert tpu_compile._explain(message, RunConfig()) == (
        "the step needs 101.37G of HBM per chip, which has 95.74G: 5.63G too much; try "
        "--train.gradient_accumulation_steps 2, --train.remat full, or a larger slice"
    )
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required "
        "for HLO temporaries (216.89G) exceeds available HBM (95.73G). HLO module: jit_step."
    )
    assert tpu_compile._explain(message, RunConfig()).startswith(
        "the step needs 216.89G of HBM per chip in addition to its state, and a chip has 95.73G; try "
        "--train.gradient_accumulation_steps"
    )


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (ModelConfig(preset="tiny"), "llama2_7b", "model.init_from is not set: set model.preset"),
        (ModelConfig(init_from="gone"), None, "'gone' is neither a path nor a known model"),
        (ModelConfig(init_from="gone"), "lama2_70b", r"'lama2_70b'.*did you mean.*llama2_70b"),
    ],
)
def test_a_shape_is_only_for_pretrained_weights(model, shape, message):
    with pytest.raises(LlamaJaxError, match=message):
        tpu_compile.model_of(RunConfig(model=model), shape)


def test_the_model_has_the_head_of_the_objective():
    run = RunConfig(
        model=ModelConfig(init_from="gone"),
        tokenizer=TokenizerConfig(vocab_size=32_000),
        train=TrainConfig(objective="classify"),
        data=DataConfig(labels=("a", "b")),
    )
    assert tpu_compile.model_of(run, "LLAMA2_7B") == presets.LLAMA2_7B.replace(labels=("a", "b"))


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


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


@needs_libtpu
@pytest.mark.slow
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


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--topology", "v5p-16"],
            "mesh data 1 x fsdp 4 x context 1 x tensor 1 needs 4 devices and there are 8",
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
