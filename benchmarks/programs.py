"""The fingerprinted programs, by name: small ones for the CPU, and the 7B training step for TPUs.

All inputs are abstract: a program is lowered and compiled, never run. Only this file imports what the
programs need from `llama_jax` and its trainer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

import llama_jax as lj
from llama_jax.plan.topology import Topology
from llama_jax.train.config.read import load_config
from llama_jax.train.config.run import RunConfig, TrainConfig
from llama_jax.train.optimizer import make_optimizer, make_schedule
from llama_jax.train.planning import model_of, with_rows_per_chip
from llama_jax.train.planning.lowering import lower_step
from llama_jax.train.step import build_step, make_step

CONFIGS = Path(__file__).parents[1] / "configs"
# K < N, so that queries share keys; all sizes differ, so that a transposition changes a shape.
MODEL = lj.LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
)
NEW_TOKENS = 32
SHORT = 48  # a prompt of one prefill chunk
LONG = 300  # a prompt of several chunks, of both sizes
TRAIN = TrainConfig(
    steps=10,
    global_batch_size=4,
    seq_len=64,
    dtype="float32",
    attention="blockwise",
    remat="full",
    loss_chunks=4,
)


@dataclasses.dataclass(frozen=True)
class Program:
    """A program to lower.

    Attributes: description: one line. lower: returns its `jax.stages.Lowered`. platform: the platform it is
      compiled for. quick: the stages that the quick tests compare: `lowered` (a second each), `optimised`
      (several seconds).
    """

    description: str
    lower: Callable[[], Any]
    platform: Literal["cpu", "tpu"] = "cpu"
    quick: tuple[str, ...] = ("lowered",)


@functools.cache
def _params_and_key(dtype: str) -> tuple[Any, Any]:
    return jax.eval_shape(lambda: (lj.unstack(lj.init(MODEL, jax.random.key(0), dtype)), jax.random.key(0)))


def _request(batch: int, dtype: str, length: int) -> tuple[Any, ...]:
    """Unstacked parameters, prompts, their lengths and a key: the arguments of prefill and generate."""
    params, key = _params_and_key(dtype)
    prompts = jax.ShapeDtypeStruct((batch, length), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.int32)
    return params, *prompts, key


def _generate(batch: int, dtype: str) -> Any:
    function = functools.partial(lj.generate, MODEL, max_new_tokens=NEW_TOKENS)
    return jax.jit(function).lower(*_request(batch, dtype, SHORT))


def _prefill(batch: int, dtype: str) -> Any:
    function = functools.partial(lj.prefill, MODEL, max_new_tokens=NEW_TOKENS)
    return jax.jit(function).lower(*_request(batch, dtype, LONG))


def _step(batch: int, dtype: str) -> Any:
    request = _request(batch, dtype, SHORT)
    state = jax.eval_shape(functools.partial(lj.prefill, MODEL, max_new_tokens=NEW_TOKENS), *request)
    return jax.jit(functools.partial(lj.decode_step, MODEL), donate_argnums=1).lower(request[0], state)


def _train(custom_vjp: bool) -> Any:
    """The trainer's step; or a step around `next_token_loss` with the library's defaults."""
    run = RunConfig(train=TRAIN)
    step, state, batch, frozen = build_step(run, MODEL, None, "cpu")
    if not custom_vjp:

        def objective(params: Any, batch: Any) -> Any:
            segments = batch["segment_ids"]
            return lj.next_token_loss(
                MODEL,
                params,
                batch["tokens"],
                segments > 0,
                batch["positions"],
                segments,
            )

        schedule = make_schedule(run.optimizer, run.train.steps)
        plain = make_step(objective, make_optimizer(run.optimizer, schedule), schedule)
        step = jax.jit(plain, donate_argnums=0)
    return step.lower(state, batch, frozen)


def _pod(config: str, slice_name: str) -> Any:
    topology = Topology.parse(slice_name)
    run = load_config(str(CONFIGS / f"{config}.toml"), [])
    run = with_rows_per_chip(run, topology)
    return lower_step(run, model_of(run), topology).lowered


def _programs() -> dict[str, Program]:
    found = {}
    quick = {(1, "float32"): ("lowered", "optimised"), (8, "bfloat16"): ("lowered",)}
    for batch in (1, 8):
        for dtype in ("float32", "bfloat16"):
            found[f"generate_b{batch}_{dtype}"] = Program(
                f"generate: batch {batch}, {dtype}, {SHORT} prompt tokens, {NEW_TOKENS} new ones",
                functools.partial(_generate, batch, dtype),
                quick=quick.get((batch, dtype), ()),
            )
    for batch, dtype in ((1, "float32"), (8, "bfloat16")):
        found[f"prefill_b{batch}_{dtype}"] = Program(
            f"prefill: batch {batch}, {dtype}, {LONG} prompt tokens, room for {NEW_TOKENS} more",
            functools.partial(_prefill, batch, dtype),
            quick=("lowered",) if batch == 8 else (),
        )
    found["step_b8_float32"] = Program(
        "one decoding step, its state donated: batch 8, float32", functools.partial(_step, 8, "float32")
    )
    found["train_custom_vjp"] = Program(
        "a training step as the trainer makes it: custom backward pass, blockwise attention, full remat, f32",
        functools.partial(_train, True),
    )
    found["train_autodiff"] = Program(
        "a training step differentiated by JAX: plain attention, no remat, f32",
        functools.partial(_train, False),
    )
    found["train_llama2_7b_v5p_2x2x1"] = Program(
        "the training step of configs/llama2_7b.toml, compiled for v5p:2x2x1",
        functools.partial(_pod, "llama2_7b", "v5p:2x2x1"),
        platform="tpu",
    )
    return found


PROGRAMS = _programs()
