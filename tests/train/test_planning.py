"""Plans of compiled steps: the compiler's errors, the process that compiles, the cache."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama_jax.errors import ConfigError, InputError, LlamaJaxError
from llama_jax.model_sizes import presets
from llama_jax.plan.estimate import estimate
from llama_jax.plan.result import Memory, Part, StepPlan, Traffic
from llama_jax.plan.topology import Topology
from llama_jax.train.config.rope_scaling import RopeScalingConfig
from llama_jax.train.config.run import DataConfig, ModelConfig, RunConfig, TokenizerConfig, TrainConfig
from llama_jax.train.planning import CompilerMissing, OutOfMemory, cache, compiling, model_of, plan_compiled
from llama_jax.train.planning.inputs import step_inputs
from llama_jax.train.planning.reading import refusal

ROOT = Path(__file__).parents[2]


def test_too_little_memory_reports_how_much_and_what_to_try():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 101.37G of 95.74G hbm. "
        "Exceeded hbm capacity by 5.63G.\n\nTotal hbm usage >= 101.63G:\n"
    )
    assert str(refusal(message, RunConfig())) == (
        "the step needs 101.37G of HBM per chip, which has 95.74G: 5.63G too much; try "
        "--train.gradient_accumulation_steps 2, --train.remat full, or a larger slice"
    )
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required "
        "for HLO temporaries (216.89G) exceeds available HBM (95.73G). HLO module: jit_step."
    )
    assert str(refusal(message, RunConfig())).startswith(
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
        model_of(RunConfig(model=model), shape)


def test_the_model_has_the_head_of_the_objective():
    run = RunConfig(
        model=ModelConfig(init_from="gone"),
        tokenizer=TokenizerConfig(vocab_size=32_000),
        train=TrainConfig(objective="classify"),
        data=DataConfig(labels=("a", "b")),
    )
    assert model_of(run, "LLAMA2_7B") == presets.LLAMA2_7B.replace(labels=("a", "b"))


def test_the_model_has_the_context_that_the_run_extends_it_to():
    scaling = RopeScalingConfig("yarn", factor=8.0)
    run = RunConfig(model=ModelConfig(init_from="gone", rope_scaling=scaling))
    assert model_of(run, "llama2_7b").max_position_embeddings == 32_768


RUN = RunConfig(model=ModelConfig(preset="tiny"), train=TrainConfig(global_batch_size=8, seq_len=256))
MODEL, V5P = presets.TINY, Topology.parse("v5p:2x2x1")
PLAN = StepPlan(
    source="compiled",
    topology="v5p:2x2x1",
    chips=4,
    mesh={"data": 1, "fsdp": 4, "context": 1, "tensor": 1},
    tokens_per_step=2048,
    steps=10,
    memory=Memory(1.0, 2.0, 1.0, 3.0, 0.5, 0.25, 7.75, 95e9),
    parts=(Part("attention kernels", 0.5, 1e9),),
    traffic=(Traffic("all-gather", "fsdp", "ici", 1e9, 0.25, 0.125),),
    launch_seconds=1e-3,
    peak_flops=459e12,
    model_flops=1e12,
    model_flops_full_attention=2e12,
    notes=("a note",),
    details={"donated_arrays": 3},
)


@pytest.fixture
def compilers(monkeypatch, tmp_path):
    """Answers of the process that compiles, which is none; counts the times that it is asked."""
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(cache.importlib.metadata, "version", lambda name: "1")
    asked = []

    def answer(request, flags, timeout, name):
        asked.append(flags)
        return {"plan": dataclasses.asdict(PLAN)}

    monkeypatch.setattr(compiling, "_compile", answer)
    return asked


def test_a_plan_is_compiled_once_and_again_where_anything_changes(compilers):
    assert plan_compiled(RUN, MODEL, V5P) == PLAN == plan_compiled(RUN, MODEL, V5P)
    assert len(compilers) == 1
    elsewhere = dataclasses.replace(RUN, train=dataclasses.replace(RUN.train, run_dir="elsewhere"))
    plan_compiled(elsewhere, MODEL, V5P)  # the same program
    assert len(compilers) == 1
    other = dataclasses.replace(RUN, train=dataclasses.replace(RUN.train, remat="save_dots"))
    plan_compiled(other, MODEL, V5P)
    plan_compiled(RUN, MODEL.replace(num_hidden_layers=7), V5P)
    plan_compiled(RUN, MODEL, Topology("v5p", (2, 2, 2)))
    plan_compiled(RUN, MODEL, V5P, compiler_flags={"xla_tpu_scoped_vmem_limit_kib": "98304"})
    plan_compiled(RUN, MODEL, V5P, use_cache=False)
    assert len(compilers) == 6


def test_a_damaged_answer_is_compiled_again(compilers, tmp_path):
    plan_compiled(RUN, MODEL, V5P)
    (path,) = (tmp_path / "plans").iterdir()
    whole = path.read_text()
    for damaged in ("", whole[: len(whole) // 2], "[]", "{}", '{"plan": {}}', whole.replace("peak", "pek")):
        path.write_text(damaged)
        assert plan_compiled(RUN, MODEL, V5P) == PLAN
        assert path.read_text() == whole
    assert [one.name for one in path.parent.iterdir()] == [path.name]  # no temporary files


def test_a_cache_that_cannot_be_written_is_no_error(compilers, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "file"))
    assert plan_compiled(RUN, MODEL, V5P) == PLAN


def test_out_of_memory_is_an_answer_that_is_kept(compilers, monkeypatch):
    error = {"type": "OutOfMemory", "message": "too much", "needed": 9.0, "capacity": 5.0}
    monkeypatch.setattr(compiling, "_compile", lambda *_: compilers.append(1) or {"error": error})
    for _ in range(2):
        with pytest.raises(OutOfMemory, match="too much") as raised:
            plan_compiled(RUN, MODEL, V5P)
        assert (raised.value.needed, raised.value.capacity) == (9.0, 5.0)
    assert len(compilers) == 1
    error = {"type": "ConfigError", "message": "does not divide"}
    monkeypatch.setattr(compiling, "_compile", lambda *_: compilers.append(1) or {"error": error})
    for _ in range(2):
        with pytest.raises(ConfigError, match="does not divide"):
            plan_compiled(RUN, MODEL, V5P, use_cache=False)
    assert len(compilers) == 3


def test_without_libtpu_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CompilerMissing, match="pip install libtpu"):
        plan_compiled(RUN, MODEL, V5P)


def test_flags_given_override_those_of_the_environment(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_a=1 --xla_b=2")
    found = compiling.environment({"xla_b": "3", "xla_c": "4"})["LIBTPU_INIT_ARGS"]
    assert found == "--xla_a=1 --xla_b=3 --xla_c=4"


@pytest.fixture
def worker(monkeypatch):
    """Replaces the process that compiles by a script, whose process is to end with the call."""
    started = []
    popen = subprocess.Popen

    def start(script):
        monkeypatch.setattr(compiling, "WORKER", [sys.executable, "-S", "-c", script])
        return lambda **kwargs: compiling._compile((), {}, kwargs.get("timeout", 60), "v5p:2x2x1")

    def record(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(compiling.subprocess, "Popen", record)
    yield start
    (process,) = started
    assert process.returncode is not None
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


SLEEP = """import sys, time; print('{"phase": "compiling the step"}', flush=True); time.sleep(60)"""


def test_a_compile_that_takes_too_long_is_ended_and_the_error_says_where_it_was(worker):
    with pytest.raises(InputError, match=r"v5p:2x2x1 was ended after 2 s, while compiling the step; allow"):
        worker(SLEEP)(timeout=2)


def test_a_compile_that_takes_too_much_memory_is_ended(worker, monkeypatch):
    monkeypatch.setattr(compiling, "MEMORY_SHARE", 1e-9)
    with pytest.raises(InputError, match=r"was ended at .* of this machine's memory"):
        worker(SLEEP)()


def test_ctrl_c_ends_the_compile_at_once(worker, monkeypatch):
    monkeypatch.setattr(compiling.select, "select", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        worker(SLEEP)()


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("x\\nERROR: Unknown command line flag 'xla_tpu_x'\\n", "refused its flags: .*'xla_tpu_x'"),
        ("check failed\\n", "ended while compiling for v5p:2x2x1: check failed"),
    ],
)
def test_a_compiler_that_ends_its_process_is_one_line(worker, stderr, message):
    with pytest.raises(InputError, match=message):
        worker(f"import sys; sys.stderr.write('''{stderr}'''); sys.exit(1)")()


def test_the_compiler_ends_with_its_caller():
    """Where the caller is killed, its end of stdin closes."""
    script = "import sys, threading, time; sys.path.insert(0, 'train/planning'); import worker; "
    script += "threading.Thread(target=worker._end_with_the_caller).start(); print('up', flush=True); "
    script += "time.sleep(60)"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == b"up\n"
        process.stdin.close()
        assert process.wait(20) == 1


SMALL = ModelConfig(
    vocab_size=2048,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=128,
)


@pytest.mark.pods
def test_a_real_step_moves_the_bytes_of_the_arithmetic_and_keeps_the_laws(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path))
    train = TrainConfig(global_batch_size=64, seq_len=512, remat="save_projections")
    run = RunConfig(model=SMALL, tokenizer=TokenizerConfig(vocab_size=2048), train=train)
    topology = Topology.parse("v5p:4x4x4")
    inputs = run, model_of(run), topology
    plan, estimated = plan_compiled(*inputs), estimate(step_inputs(*inputs))
    monkeypatch.setattr(compiling, "_compile", None)
    assert plan_compiled(*inputs) == plan  # from the cache
    for kind in ("all-gather", "reduce-scatter"):
        moved = [sum(t.bytes for t in each.traffic if t.kind == kind) for each in (plan, estimated)]
        assert moved[0] == pytest.approx(moved[1], rel=0.02), kind
    # Rings: nothing but the gradients of norms, and statistics, is all-reduced.
    assert sum(t.bytes for t in plan.traffic if t.kind == "all-reduce") < 1e5
    assert {t.axes for t in plan.traffic} == {"fsdp"}
    assert all(t.exposed_seconds >= 0 for t in plan.traffic)
    details = plan.details
    assert details["donated_arrays"] == details["state_arrays"]
    assert details["f32_parameter_gathers"] == 0
    assert 0 < details["logits_positions"] < details["positions"] == 512  # no [B, T, V]
    shapes = (plan.memory.parameters, plan.memory.optimizer)
    assert shapes == pytest.approx((estimated.memory.parameters, estimated.memory.optimizer), rel=0.01)
    assert plan.memory.activations == pytest.approx(estimated.memory.activations, rel=0.1)
    assert sum(shapes) < plan.memory.peak < plan.memory.capacity
    flops = [{part.name: part.flops for part in each.parts} for each in (plan, estimated)]
    # At this size, the rotary embedding's products are a noticeable part of the projections'.
    for name, tolerance in (("feed-forward products", 0.01), ("attention projections", 0.1)):
        assert flops[0][name] == pytest.approx(flops[1][name], rel=tolerance), name
