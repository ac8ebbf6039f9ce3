"""Laws of Llama's kin: biases, norms of queries and keys, layers without rotation."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

import llama_jax as lj
from llama_jax import cli
from llama_jax.errors import ConfigError
from llama_jax.sharding import BIASES, MATRIX_SPECS, use_mesh
from llama_jax.train.config.model import ModelConfig
from llama_jax.train.optimizer import weight_decay_mask
from llama_jax.weights.derived import PooledHeads
from llama_jax.weights.names import KIN_LEAVES
from llama_jax.weights.tensors import ParamsTensors
from tests import tiny
from tests.random_models import random_model

# Everything that the kin may have at once, in layers of two kinds.
CONFIG = tiny.CONFIG.replace(
    num_hidden_layers=4,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    qk_norm=True,
    rope_layers=(True, False) * 2,
)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (4, 16)).astype(np.int32)

forward = jax.jit(partial(lj.forward, CONFIG))


@pytest.fixture(scope="module")
def params() -> Any:
    return random_model(3, CONFIG)[1]


@pytest.fixture(scope="module")
def logits(params: Any) -> np.ndarray:
    return np.asarray(forward(params, TOKENS))


def close(a: Any, b: Any, tolerance: float = 2e-5) -> None:
    b = np.asarray(b)
    assert np.abs(np.asarray(a) - b).max() <= tolerance * np.abs(b).max()


def test_every_field_matters(params: Any, logits: np.ndarray) -> None:
    for leaf in KIN_LEAVES:
        changed = jax.tree.map(lambda x: x, params)
        _, sublayer, name = leaf.path
        changed["layers"][sublayer][name] = 1.5 * params["layers"][sublayer][name] + 0.1
        if name == "bk":  # softmax does not see what is added to all scores, but rotary positions do
            changed["layers"]["attention"]["bk"] += 1.0
        assert np.abs(lj.forward(CONFIG, changed, TOKENS) - logits).max() > 1e-3, leaf.path
    rotated = lj.forward(CONFIG.replace(rope_layers=()), params, TOKENS)
    assert np.abs(rotated - logits).max() > 1e-3


def test_without_rotation_positions_do_not_matter(params: Any) -> None:
    config = CONFIG.replace(rope_layers=(False,) * 4)
    positions = np.broadcast_to(np.arange(16) + 40, TOKENS.shape)
    np.testing.assert_array_equal(
        lj.forward(config, params, TOKENS), lj.forward(config, params, TOKENS, positions)
    )


def test_zero_biases_and_norms_of_unit_vectors_are_a_llama(params: Any) -> None:
    plain = tiny.CONFIG.replace(num_hidden_layers=4)
    kin = CONFIG.replace(qk_norm=False, rope_layers=())
    layers, without = dict(params["layers"]), {**params, "layers": dict(params["layers"])}
    for sublayer in ("attention", "feed_forward"):
        leaves = {name: leaf for name, leaf in layers[sublayer].items() if "norm" not in name}
        layers[sublayer] = {
            name: np.zeros_like(leaf) if name in BIASES else leaf for name, leaf in leaves.items()
        }
        without["layers"][sublayer] = {name: leaf for name, leaf in leaves.items() if name not in BIASES}
    with_biases = {**params, "layers": layers}
    np.testing.assert_array_equal(lj.forward(kin, with_biases, TOKENS), lj.forward(plain, without, TOKENS))


def test_decoding_with_the_cache_is_decoding_without(params: Any, logits: np.ndarray) -> None:
    lengths = np.array([16, 9, 4, 12], np.int32)
    out = lj.generate(
        CONFIG, params, TOKENS, lengths, jax.random.key(0), lj.Sampling(temperature=0.0), max_new_tokens=6
    )
    for row, length in enumerate(lengths):
        ids = [*TOKENS[row, :length]]
        for token in np.asarray(out.tokens[row]):
            padded = np.zeros((1, 24), np.int32)
            padded[0, : len(ids)] = ids
            assert _last(params, padded, len(ids) - 1).argmax() == token
            ids.append(token)
    np.testing.assert_allclose(_last(params, TOKENS[:1], 15), logits[0, 15], rtol=1e-5, atol=1e-5)


def _last(params: Any, tokens: np.ndarray, last: int) -> np.ndarray:
    return np.asarray(forward(params, tokens)[0, last])


@pytest.mark.parametrize(("mesh", "remat"), [("", "none"), ("fsdp=2,context=2,tensor=2", "full")])
def test_gradients_of_the_trainer_are_those_of_the_plain_program(params: Any, mesh: str, remat: Any) -> None:
    def loss(params: Any, **options: Any) -> jax.Array:
        return lj.next_token_loss(CONFIG, params, TOKENS, **options).mean

    expected = jax.jit(jax.grad(loss))(params)
    with use_mesh(devices := lj.make_mesh(mesh) if mesh else None):
        weights = lj.shard_params(params, devices, CONFIG) if devices else params
        backend = "blockwise" if mesh else "xla"
        program = partial(loss, custom_vjp=True, remat=remat, attention_backend=backend)
        found = jax.jit(jax.grad(program))(weights)
        jax.tree.map(close, jax.tree.map(np.asarray, found), expected)


def test_biases_and_norms_have_no_weight_decay(params: Any) -> None:
    mask = weight_decay_mask(params)["layers"]
    decayed = {
        name for sublayer in ("attention", "feed_forward") for name, on in mask[sublayer].items() if on
    }
    assert decayed == set(MATRIX_SPECS)


def test_pooled_heads_pool_their_biases(params: Any) -> None:
    base = ParamsTensors(CONFIG, params)
    pooled = PooledHeads(base, 1)
    for leaf in KIN_LEAVES:
        before, after = base.read(leaf, 0), pooled.read(leaf, 0)
        if leaf.path[-1] in ("bk", "bv"):
            mean = before.reshape(CONFIG.num_key_value_heads, -1).mean(0)
            np.testing.assert_allclose(after, mean, rtol=1e-6)
        else:
            np.testing.assert_array_equal(after, before)


def test_what_no_family_has_is_kept_by_orbax_and_refused_by_others(params: Any, tmp_path: Any) -> None:
    path = lj.save(CONFIG, params, tmp_path / "a", format="orbax")
    config, back = lj.load_params(path)
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, back, params)
    for format, message in (
        ("hf", "no model of transformers has this combination"),
        ("gguf", "has no place for biases beside norms"),
        (
            "meta",
            "has only Llamas, and no place for qkv_bias, out_bias, mlp_bias, qk_norm, rope_layers",
        ),
        ("llama2c", "the format llama2c has only Llamas"),
    ):
        with pytest.raises(ConfigError, match=message):
            lj.save(CONFIG, params, tmp_path / format, format=format)  # type: ignore[arg-type]
        assert not (tmp_path / format).exists()


def test_a_run_builds_kin_from_its_table() -> None:
    built = ModelConfig(preset="tiny", qkv_bias=True, rope_layers=(True, False)).build()
    assert built == lj.presets.TINY.replace(qkv_bias=True, rope_layers=(True, False))
    assert ModelConfig(preset="qwen3_0_6b").build() == lj.presets.QWEN3_0_6B
    with pytest.raises(ConfigError, match="rope_layers has 3 values; the model has 2 layers"):
        ModelConfig(preset="tiny", rope_layers=(True, False, True)).build()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 0}, "sliding_window is 0; it must be a whole number of keys, at least 1"),
        ({"sliding_window": 2.5}, "sliding_window is 2.5"),
        ({"window_layers": (True, False) * 2}, "window_layers is set and sliding_window is not"),
        ({"sliding_window": 4, "window_layers": (True,)}, "window_layers has 1 values; the model has 4"),
        ({"rope_layers": (1, 0, 1, 0)}, "each value must be true or false"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok is 5 and num_experts 4"),
        ({"num_experts": 4}, "num_experts_per_tok is 0 and num_experts 4"),
        ({"num_experts": -1}, "num_experts is -1"),
        ({"num_experts": 4, "num_experts_per_tok": 2}, "mlp_bias is set, and experts have no biases"),
    ],
)
def test_invalid_kin_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        CONFIG.replace(**changes)
    assert "\n" not in str(caught.value)


def test_layers_all_alike_are_one_kind() -> None:
    alike = CONFIG.replace(rope_layers=(True,) * 4, sliding_window=8, window_layers=(True,) * 4)
    assert alike.rope_layers == alike.window_layers == () and alike.layer_period == 1
    assert (
        CONFIG.layer_period == 2 and CONFIG.replace(rope_layers=(True, True, True, False)).layer_period == 4
    )
    assert CONFIG.replace(sliding_window=8, window_layers=(False,) * 4).sliding_window is None


def test_inspect_shows_what_differs_between_layers(params: Any, tmp_path: Any, capsys: Any) -> None:
    config = CONFIG.replace(sliding_window=8, window_layers=(False, False, False, True))
    path = lj.save(config, params, tmp_path / "a", format="orbax")
    assert cli.main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "layer 0, layer 2" in shown  # rope_layers
    assert [line.split() for line in shown.splitlines() if "window_layers" in line] == [
        ["window_layers", "layer", "3"]
    ]
    assert cli.main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["rope_layers"] == [True, False, True, False]
