"""Meta's params.json: published models, invalid fields, and round trips of any feed-forward width."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_jax as lj
from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.weights.meta_params import config_from_params, feed_forward_size, params_from_config
from tests.golden import meta
from tests.weights.test_meta import message

LLAMA2_7B = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05}
LLAMA2_70B = {
    "dim": 8192,
    "multiple_of": 4096,
    "ffn_dim_multiplier": 1.3,
    "n_heads": 64,
    "n_kv_heads": 8,
    "n_layers": 80,
    "norm_eps": 1e-05,
    "vocab_size": -1,
}
LLAMA3_8B = LLAMA2_7B | {
    "n_kv_heads": 8,
    "multiple_of": 1024,
    "ffn_dim_multiplier": 1.3,
    "rope_theta": 500000.0,
}
ROPE_FACTOR_8 = RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)


@pytest.mark.parametrize(
    ("params", "sizes", "expected"),
    [
        (LLAMA2_7B | {"vocab_size": -1}, (32_000, 11_008), lj.presets.LLAMA2_7B),
        (
            LLAMA2_7B | {"dim": 5120, "n_heads": 40, "n_layers": 40, "vocab_size": -1},
            (32_000, 13_824),
            lj.presets.LLAMA2_13B,
        ),
        (
            LLAMA2_70B,
            (32_000, 28_672),
            lj.presets.LLAMA2_70B,
        ),
        (
            LLAMA2_7B | {"rope_theta": 1_000_000, "n_kv_heads": None},  # Code Llama
            (32_016, 11_008),
            lj.presets.LLAMA2_7B.replace(vocab_size=32_016, rope_theta=1e6, max_position_embeddings=16_384),
        ),
        (
            LLAMA3_8B | {"vocab_size": 128_256},
            (128_256, 14_336),
            LlamaConfig(128_256, 4096, 14_336, 32, 32, 8, max_position_embeddings=8192, rope_theta=5e5),
        ),
        (
            LLAMA3_8B | {"vocab_size": 128_256, "use_scaled_rope": True},
            (128_256, 14_336),
            LlamaConfig(
                128_256, 4096, 14_336, 32, 32, 8, max_position_embeddings=131_072, rope_theta=5e5
            ).replace(rope_scaling=ROPE_FACTOR_8),
        ),
        (
            LLAMA2_7B | {"max_seq_len": 100},
            (32_000, 11_008),
            lj.presets.LLAMA2_7B.replace(max_position_embeddings=100),
        ),
    ],
    ids=["Llama 2 7B", "13B", "70B", "Code Llama", "Llama 3", "Llama 3.1", "context"],
)
def test_published_models(params: dict[str, Any], sizes: tuple[int, int], expected: LlamaConfig) -> None:
    assert config_from_params(Path(), params, {}, *sizes) == expected


def test_llama_3_2_has_a_rope_factor_of_32() -> None:
    params = {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256} | {
        "ffn_dim_multiplier": 1.5,
        "multiple_of": 256,
        "norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
    }
    config = config_from_params(Path(), params, {}, 128_256, 8192)
    assert config.rope_scaling is not None and config.rope_scaling.factor == 32
    written, extra = params_from_config(config)
    assert config_from_params(Path(), written, extra, 128_256, 8192) == config


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dim": None}, "dim is missing"),
        ({"dim": "32"}, "dim is '32'; it must be a whole number"),
        ({"dim": True}, "dim is 'True'"),
        ({"dim": 1 << 40}, "dim is '1099511627776'"),
        ({"dim": 64}, "has 1 of the 2 shards"),
        ({"n_heads": 0}, "n_heads is '0'"),
        ({"n_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        ({"n_kv_heads": 3}, "num_key_value_heads 3"),
        ({"n_kv_heads": -1}, "n_kv_heads is '-1'"),
        ({"n_layers": 2}, "missing tensors: layers.1"),
        ({"n_layers": 1 << 30}, "has 1073741824 layers but there are only"),
        ({"vocab_size": 17}, "wrong shapes: "),
        ({"vocab_size": 0}, "vocab_size is '0'"),
        ({"multiple_of": 64}, "requires a feed-forward width of 64 but the tensors have 16"),
        ({"multiple_of": 0}, "multiple_of is '0'"),
        ({"ffn_dim_multiplier": 1e29}, "requires a feed-forward width"),
        ({"ffn_dim_multiplier": 1e300}, "ffn_dim_multiplier is '1e"),
        ({"ffn_dim_multiplier": "big"}, "ffn_dim_multiplier is 'big'"),
        ({"norm_eps": None}, "norm_eps is missing"),
        ({"norm_eps": float("nan")}, "norm_eps is 'nan'"),
        ({"norm_eps": -1}, "norm_eps is '-1'"),
        ({"rope_theta": 0.5}, "rope_theta is 0.5"),
        ({"rope_theta": [1]}, "rope_theta is '"),
        ({"use_scaled_rope": 1}, "use_scaled_rope is '1'"),
        ({"sliding_window": 4096}, "has 'sliding_window', which llama_jax does not support"),
        ({"quantization_args": {"scheme": "x"}, "lora_args": {}}, "'lora_args', 'quantization_args'"),
    ],
)
def test_invalid_params_are_refused(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(meta.folder(1), tmp_path / "m"))
    (folder / "params.json").write_text(json.dumps(meta.PARAMS[1] | changes))
    assert re.search(expected, message(folder))


def test_malformed_params_json(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(meta.folder(1), tmp_path / "m"))
    for text in ("", "[]", "{" * 9999, '{"dim": 1, "dim": 2}', "\xff"):
        (folder / "params.json").write_text(text, encoding="latin-1")
        assert str(folder / "params.json") in message(folder)


def test_feed_forward_rule_exists_for_any_width() -> None:
    rng = np.random.default_rng(0)
    for _ in range(2000):
        heads = int(rng.integers(1, 65))
        config = LlamaConfig(
            hidden_size=heads * 2 * int(rng.integers(1, 100)),
            intermediate_size=int(2 ** rng.uniform(0, 17)),
            num_attention_heads=heads,
        )
        params, _ = params_from_config(config)
        rule = (params["multiple_of"], params.get("ffn_dim_multiplier", 1.0))
        assert feed_forward_size(config.hidden_size, *rule) == config.intermediate_size
