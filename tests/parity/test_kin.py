"""Live comparison of Llama's kin with transformers: eight random configurations of each family."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import llama_jax as lj

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.parity.kin import (
    Loaded,
    close,
    compare_decoding,
    compare_files,
    compare_training,
    make,
    tokens_of,
)

pytestmark = pytest.mark.parity

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
# For each kind: its class in transformers, its settings, and what our configuration of it says.
KIN: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama with biases": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True},
        {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
    ),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}, {"qkv_bias": True, "tie_word_embeddings": True}),
    "qwen2.5 with yarn": ("Qwen2", {"rope_parameters": YARN}, {"qkv_bias": True}),
    "qwen3": ("Qwen3", {"head_dim": 24}, {"qk_norm": True, "head_dim": 24}),
    "qwen3 with biases": (
        "Qwen3",
        {"head_dim": 16, "attention_bias": True},
        {"qk_norm": True, "out_bias": True},
    ),
    "smollm3": ("SmolLM3", {}, {"rope_layers": (True, True, True, False)}),
    "smollm3, alternating": (
        "SmolLM3",
        {"no_rope_layer_interval": 2, "mlp_bias": True},
        {"rope_layers": (True, False, True, False), "mlp_bias": True},
    ),
}
SEEDS = range(8)
FAMILIES = ("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "SmolLM3")


@pytest.fixture(scope="module", params=list(KIN))
def kin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    name, settings, expected = KIN[request.param]
    loaded = make(name, settings, tmp_path_factory.mktemp("kin"))
    for field, value in expected.items():
        assert getattr(loaded.config, field) == value
    return loaded


def test_a_model_is_written_as_its_family(kin: Loaded, tmp_path: Path) -> None:
    path = lj.save(kin.config, kin.params, tmp_path / "ours")
    written = json.loads((path / "config.json").read_text())
    assert written["architectures"] == [type(kin.model).__name__]


@pytest.mark.parametrize("format", ["gguf", "orbax"])
def test_other_formats_give_the_same_parameters_back(kin: Loaded, format: Any, tmp_path: Path) -> None:
    _, _, config, params = kin
    biases_beside = config.qkv_bias or config.mlp_bias
    if format == "gguf" and biases_beside and (config.qk_norm or config.rope_layers):
        with pytest.raises(lj.LlamaJaxError, match="has no place for"):
            lj.save(config, params, tmp_path / "out", format=format)
        return
    path = lj.save(config, params, tmp_path / "out", format=format)
    found, back = lj.load_params(path)
    assert found == config
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_unstacked_layers_and_a_mesh_give_the_same(kin: Loaded) -> None:
    _, _, config, params = kin
    tokens = tokens_of(4)
    forward = jax.jit(partial(lj.forward, config))
    expected = forward(params, tokens)
    close(forward(lj.unstack(params), tokens), np.asarray(expected))
    mesh = lj.make_mesh("fsdp=4,tensor=2")
    with jax.set_mesh(mesh):
        close(np.asarray(forward(lj.shard_params(params, mesh, config), tokens)), np.asarray(expected))


def random_settings(name: str, seed: int) -> dict[str, Any]:
    """The settings of a random small model of a class of transformers.

    Sizes are drawn of few, so that models share the programs that read and write their arrays. To generate,
    every layer is compiled: all but the last have two, which may be of two kinds, and the last those twice.
    """
    rng = np.random.default_rng([seed, len(name)])
    heads, layers = int(rng.choice([2, 4, 6])), 4 if seed == SEEDS[-1] else 2
    rope = {"rope_type": "default", "rope_theta": float(rng.choice([1e4, 1e6]))}
    settings = {
        "hidden_size": 12 * heads,
        "intermediate_size": int(rng.choice([40, 72])),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": int(rng.choice([1, 2, heads])),
        "rms_norm_eps": float(rng.choice([1e-6, 1e-5])),
        "tie_word_embeddings": bool(rng.integers(2)),
        "rope_parameters": YARN if rng.integers(4) == 0 else rope,
    }
    if name == "Qwen3":
        settings |= {"head_dim": int(rng.choice([8, 20])), "attention_bias": bool(rng.integers(2))}
    if name == "SmolLM3":  # a layer that rotates: without one, the gradient of keys' biases is zero
        settings["no_rope_layers"] = [[1, 0], [0, 1], [1, 1]][rng.integers(3)] * (layers // 2)
    if name in ("Qwen2", "Qwen3"):
        kinds = np.array(["full_attention", "sliding_attention"])[rng.integers(0, 2, 2)].tolist()
        settings |= {"use_sliding_window": True, "sliding_window": 7, "layer_types": kinds * (layers // 2)}
    if name in ("Mistral", "Mixtral"):  # transformers' YaRN needs their head_dim
        settings |= {"sliding_window": int(rng.integers(4, 20)), "head_dim": 12}
    if name == "Mixtral":  # whose products torch computes for multiples of 16 bytes
        experts, chosen = int(rng.integers(2, 6)), int(rng.integers(1, 3))
        settings |= {"num_local_experts": experts, "num_experts_per_tok": chosen, "hidden_size": 16 * heads}
        settings["router_aux_loss_coef"] = 0.3
    if name in ("Llama", "SmolLM3"):
        settings |= {"attention_bias": bool(rng.integers(2)), "mlp_bias": bool(rng.integers(2))}
    return settings


@pytest.fixture(scope="module", params=[(name, seed) for name in FAMILIES for seed in SEEDS], ids=str)
def drawn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Loaded]:
    name, seed = request.param
    return seed, make(name, random_settings(name, seed), tmp_path_factory.mktemp(name))


def test_logits_loss_and_gradients(drawn: tuple[int, Loaded], tmp_path: Path) -> None:
    seed, loaded = drawn
    compare_training(loaded, tmp_path, custom_vjp=seed % 2 == 0)


def test_greedy_and_beams(drawn: tuple[int, Loaded]) -> None:
    compare_decoding(drawn[1])


def test_files_that_we_write_are_theirs(drawn: tuple[int, Loaded], tmp_path: Path) -> None:
    compare_files(drawn[1], tmp_path)
