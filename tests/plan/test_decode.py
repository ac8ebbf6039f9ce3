"""The arithmetic of decoding: laws, exact bytes, and published measurements beside it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import llama_jax as lj
from benchmarks.decode_accuracy import LLAMA31_70B, POINTS
from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError
from llama_jax.kv_cache import init_cache
from llama_jax.plan.decode import DecodePlan, cache_bytes_per_token, plan_decode
from llama_jax.plan.topology import Topology

TINY = LlamaConfig(
    vocab_size=96, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip


def mesh(**sizes: int) -> dict[str, int]:
    return {"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | sizes


def plan(batch: int = 8, context: int = 2048, **changes: object) -> DecodePlan:
    sizes, weights = mesh(data=2, tensor=8), {"weights": "int8"}
    return plan_decode(
        LLAMA31_70B, Topology.parse("v5e:4x4"), sizes, batch=batch, context=context, **(weights | changes)
    )


def nbytes(tree: object) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("weights", "bits"), [("bfloat16", None), ("int8", 8), ("int4", 4)])
def test_weights_have_the_bytes_that_the_library_gives_them(weights, bits):
    def make():
        params = lj.init(TINY, jax.random.key(0), jnp.bfloat16)
        return params if bits is None else lj.quantize(params, bits)

    one = plan_decode(TINY, Topology.parse("v5e:1x1"), mesh(), batch=1, context=8, weights=weights)
    assert one.weight_bytes == nbytes(jax.eval_shape(make))


@pytest.mark.parametrize("cache", ["bfloat16", "int8", "float8_e4m3fn"])
def test_the_cache_has_the_bytes_that_the_library_gives_it(cache):
    shapes = jax.eval_shape(lambda: init_cache(TINY, 3, 16, cache))
    assert 3 * 16 * cache_bytes_per_token(TINY, cache) == nbytes(shapes)
    windows = TINY.replace(sliding_window=40, window_layers=(True, *(False,) * (TINY.num_hidden_layers - 1)))
    shapes = jax.eval_shape(lambda: init_cache(windows, 3, 1000, cache))
    one = plan_decode(windows, Topology.parse("v5e:1x1"), mesh(), batch=3, context=1000, cache=cache)
    assert one.cache_bytes == pytest.approx(nbytes(shapes))


def test_a_step_is_bound_by_bandwidth_and_never_faster_than_it():
    for batch in (1, 8, 64):
        one = plan(batch)
        assert 0 < one.bandwidth_share < 1
        assert one.step_seconds > (one.weight_seconds + one.cache_seconds)
    assert plan(8).bound == "hbm"
    assert plan(64).tokens_per_second > plan(8).tokens_per_second
    assert plan(8, 8192).step_seconds > plan(8, 2048).step_seconds
    assert plan(8, weights="bfloat16").weight_seconds == pytest.approx(2 * plan(8).weight_seconds, rel=1e-3)


def test_the_largest_batch_fits_and_the_next_does_not():
    largest = plan().largest_batch
    assert largest > 0
    assert largest % 2 == 0
    assert plan(largest).fits
    assert not plan(largest + 2).fits
    assert plan(cache="int8").largest_batch > largest
    too_large = plan_decode(LLAMA31_70B, Topology.parse("v5e:1x1"), mesh(), batch=1, context=8)
    assert too_large.largest_batch == 0
    assert not too_large.fits


def test_weights_sharded_over_fsdp_are_gathered_in_every_step():
    apart = plan_decode(
        LLAMA31_70B, Topology.parse("v5e:4x4"), mesh(fsdp=16), batch=16, context=2048, weights="int8"
    )
    assert apart.exposed_seconds > 10 * plan(16).exposed_seconds


@pytest.mark.parametrize("point", [p for p in POINTS if not p.serving], ids=lambda p: f"{p.tensor}-{p.batch}")
def test_published_steps_are_within_a_fourth(point):
    assert point.plan.step_seconds == pytest.approx(point.seconds, rel=0.25)


def test_no_server_is_faster_than_the_arithmetic():
    for point in POINTS:
        if point.serving:
            assert point.plan.step_seconds < point.seconds


def test_bad_input_is_one_line():
    with pytest.raises(ConfigError, match="is not 16 chips of v5e:4x4"):
        plan_decode(TINY, Topology.parse("v5e:4x4"), mesh(), batch=1, context=8)
    with pytest.raises(ConfigError, match="use one of float32, bfloat16"):
        plan(weights="int3")
    with pytest.raises(ConfigError, match="1 <= prompt <= context"):
        plan(prompt=4096)
    assert dataclasses.is_dataclass(DecodePlan)
