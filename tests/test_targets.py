"""The target decides: a program's form follows the platform that it is lowered for, not the machine's."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax._src import xla_bridge

import llama_jax as lj
from benchmarks.programs import MODEL as SMALL
from llama_jax.train.config.run import RunConfig, TrainConfig
from llama_jax.train.step import build_step
from tests import cuda

ROOT = Path(__file__).parents[1]
SHAPE = {"global_batch_size": 2, "seq_len": 256, "dtype": "bfloat16", "remat": "save_projections"}


MODEL = SMALL.replace(num_hidden_layers=2)
SHALLOW = SMALL.replace(num_hidden_layers=1)


def arguments(batch: int, length: int, model: lj.LlamaConfig = MODEL) -> tuple[Any, ...]:
    """Unstacked bf16 parameters, prompts, their lengths and a key, all abstract."""
    params = jax.eval_shape(lambda: lj.unstack(lj.init(model, jax.random.key(0), jnp.bfloat16)))
    prompts = jax.ShapeDtypeStruct((batch, length), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.int32)
    return params, *prompts, jax.eval_shape(lambda: jax.random.key(0))


def train_step(platform: str) -> str:
    """The trainer's step as it is lowered for a platform, with the attention that `auto` means there."""
    train = TrainConfig(**SHAPE, attention="cudnn" if platform == "cuda" else "auto")  # type: ignore[arg-type]
    with cuda.cudnn():
        step, *abstract = build_step(RunConfig(train=train), MODEL, None, platform)
        return step.trace(*abstract).lower(lowering_platforms=(platform,)).as_text()


def generate(platform: str) -> str:
    """`generate` as it is lowered for a platform."""
    function = jax.jit(functools.partial(lj.generate, SHALLOW, max_new_tokens=8))
    return function.trace(*arguments(2, 40, SHALLOW)).lower(lowering_platforms=(platform,)).as_text()


@functools.cache
def as_the_machine_is(program: Callable[[str], str], platform: str) -> str:
    """A program lowered with the machine's own default backend."""
    return program(platform)


def test_a_cpu_host_lowers_for_a_target_what_the_target_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to the programs of a host whose default backend is the TPU, and others than the CPU's."""
    cases = ((train_step, "tpu"), (train_step, "cuda"), (generate, "tpu"))
    jax.clear_caches()  # kernels name what they call by what has been traced before
    here = {case: as_the_machine_is(*case) for case in cases}
    for program, target in cases:
        assert here[program, target] != as_the_machine_is(program, "cpu")
    for module in (jax, xla_bridge):
        monkeypatch.setattr(module, "default_backend", lambda: "tpu")
    jax.clear_caches()
    assert jax.default_backend() == "tpu"
    for program, target in cases:
        assert program(target) == here[program, target]


def test_each_target_has_its_own_attention() -> None:
    lowered = functools.partial(as_the_machine_is, train_step)
    assert "tpu_custom_call" in lowered("tpu")
    assert cuda.attention_calls(lowered("cuda")) == (1, 1)
    on_cpu = lowered("cpu")
    assert "tpu_custom_call" not in on_cpu and cuda.attention_calls(on_cpu) == (0, 0)


def test_no_choice_is_made_by_the_default_backend() -> None:
    paths = [path for path in (ROOT / "llama_jax").rglob("*.py") if "train" not in path.parts]
    for path in [*paths, *(ROOT / "train").rglob("*.py")]:
        names = {
            node.attr if isinstance(node, ast.Attribute) else node.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute | ast.alias)
        }
        found = names & {"default_backend", "get_backend", "xla_bridge"}
        assert not found, f"{path.relative_to(ROOT)} uses {found}: use jax.lax.platform_dependent"


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_decoding_on_gpus_writes_the_cache_in_place(batch: int) -> None:
    """A step makes values of the cache's shape by writing one slot, and in no other way; it is donated."""
    params, *request = arguments(batch, 40)
    state = jax.eval_shape(functools.partial(lj.prefill, MODEL, max_new_tokens=88), params, *request)
    step = jax.jit(functools.partial(lj.decode_step, MODEL), donate_argnums=1)
    text = step.trace(params, state).lower(lowering_platforms=("cuda",)).as_text()
    cache = "x".join(map(str, state.cache.k[0].shape))
    made = [line for line in text.splitlines() if re.search(rf" tensor<{cache}x\w+>$", line)]
    made = [line.strip() for line in made if " return " not in line and "stablehlo.return" not in line]
    # The end of a scatter; a single row's is inside of the branch of its platform.
    assert all(line.startswith("}) : (") for line in made), made
    assert len(made) == 2 * MODEL.num_hidden_layers * (2 if batch == 1 else 1)
    assert text.count('"stablehlo.scatter"') >= 2 * MODEL.num_hidden_layers
    assert text.count("tf.aliasing_output") >= 2 * MODEL.num_hidden_layers


def test_the_step_of_a_mesh_calls_cudnn_on_each_device() -> None:
    """Rows, heads and gradients are sharded; the kernels see one device's rows and heads."""
    train = TrainConfig(**SHAPE | {"global_batch_size": 4}, attention="cudnn")  # type: ignore[arg-type]
    mesh = lj.make_mesh("data=2,fsdp=2,tensor=2")
    with cuda.cudnn(), jax.set_mesh(mesh):
        step, *abstract = build_step(RunConfig(train=train), MODEL, mesh, "gpu")
        text = step.trace(*abstract).lower(lowering_platforms=("cuda",)).as_text()
    assert cuda.attention_calls(text) == (1, 1)
    assert (1, 256, MODEL.num_attention_heads // 2, MODEL.head_dim) in cuda.shapes(text)
