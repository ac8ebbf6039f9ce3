"""Random small models for property tests."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import llama_jax as lj
from llama_jax.weights.names import leaves

# One configuration for the tests that need no other, so that they share compiled programs. All sizes differ,
# and no cache or mask of it has the size of a weight.
SMALL = lj.LlamaConfig(
    vocab_size=72,
    hidden_size=40,
    intermediate_size=56,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    rope_scaling=lj.RopeScaling("llama3", 8.0, original_max_position_embeddings=32),
)

# A small mixture of experts.
MIXTURE = lj.LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    num_experts=4,
    num_experts_per_tok=2,
)


def random_config(seed: int) -> lj.LlamaConfig:
    """A small configuration: any grouping of heads, tied or not, any rope scaling."""
    rng = np.random.default_rng(seed)
    kv_heads = int(rng.choice([1, 2, 4]))
    group = int(rng.choice([1, 2, 3]))
    scaling = rng.choice(
        np.array(
            [
                None,
                lj.RopeScaling("linear", 2.0),
                lj.RopeScaling("ntk", 4.0),
                lj.RopeScaling("yarn", 4.0, original_max_position_embeddings=32),
                lj.RopeScaling("llama3", 8.0, original_max_position_embeddings=32),
            ],
            dtype=object,
        )
    )
    return lj.LlamaConfig(
        vocab_size=int(rng.integers(50, 300)),
        hidden_size=int(rng.choice([32, 48, 64])),
        intermediate_size=int(rng.choice([64, 96])),
        num_hidden_layers=int(rng.integers(1, 4)),
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=int(rng.choice([8, 16])),
        max_position_embeddings=256,
        rms_norm_eps=float(rng.choice([1e-5, 1e-6])),
        rope_theta=float(rng.choice([1e4, 1e5, 5e5])),
        rope_scaling=scaling,
        tie_word_embeddings=bool(rng.integers(2)),
    )


def normal(seed: int, shapes: Any, deviation: float, means: dict[str, float]) -> Any:
    """Leaves of the given shapes, drawn with numpy, which compiles nothing; `means` by the leaf's name."""
    rng = np.random.default_rng(seed)

    def leaf(path: tuple, shape: jax.ShapeDtypeStruct) -> jax.Array:
        mean = means.get(path[-1].key, 0.0)
        return jnp.asarray(mean + deviation * rng.standard_normal(shape.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


@functools.cache
def random_model(seed: int, config: lj.LlamaConfig | None = None) -> tuple[lj.LlamaConfig, dict]:
    """A configuration and random parameters, with deviation 0.2 so that logits are far apart."""
    config = random_config(seed) if config is None else config
    return config, normal(seed, shapes_of(config), 0.2, {"scale": 1.0})


def shapes_of(config: lj.LlamaConfig) -> dict[str, Any]:
    """The shapes of `lj.init`'s parameters, without a trace of it."""
    tree: dict[str, Any] = {}
    for leaf in leaves(config):
        *outer, last = leaf.path
        inner = tree
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = jax.ShapeDtypeStruct(leaf.stored_shape(config, "orbax"), jnp.float32)
    return tree


def random_prompts(seed: int, config: lj.LlamaConfig, lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts [B, max(lengths)] padded on the right with ids outside the vocabulary, and their lengths."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.vocab_size, (len(lengths), max(lengths)))
    padding = np.arange(max(lengths)) >= np.array(lengths)[:, None]
    return np.where(padding, config.vocab_size + 7, tokens).astype(np.int32), np.array(lengths, np.int32)
