"""LlamaConfig: published sizes, and errors for invalid values."""

from __future__ import annotations

import dataclasses
import math

import jax
import pytest

import llama_jax as lj
from llama_jax.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("LLAMA_7B", 6_738_415_616),
        ("LLAMA_13B", 13_015_864_320),
        ("LLAMA_30B", 32_528_943_616),
        ("LLAMA_65B", 65_285_660_672),
        ("LLAMA2_7B", 6_738_415_616),
        ("LLAMA2_13B", 13_015_864_320),
        ("LLAMA2_34B", 33_743_970_304),  # Code Llama's, less the 16 tokens that it adds
        ("LLAMA2_70B", 68_976_648_192),
        ("LLAMA3_8B", 8_030_261_248),
        ("LLAMA3_70B", 70_553_706_496),
        ("LLAMA3_1_405B", 405_853_388_800),
        ("LLAMA3_2_1B", 1_235_814_400),
        ("LLAMA3_2_3B", 3_212_749_824),
        ("MISTRAL_7B_V0_1", 7_241_732_096),
        ("MISTRAL_7B_V0_3", 7_248_023_552),
        ("MIXTRAL_8X7B", 46_702_792_704),
        ("MIXTRAL_8X22B", 140_620_634_112),
        ("QWEN2_5_0_5B", 494_032_768),
        ("QWEN2_5_1_5B", 1_543_714_304),
        ("QWEN2_5_3B", 3_085_938_688),
        ("QWEN2_5_7B", 7_615_616_512),
        ("QWEN2_5_14B", 14_770_033_664),
        ("QWEN2_5_32B", 32_763_876_352),
        ("QWEN2_5_72B", 72_706_203_648),
        ("QWEN3_0_6B", 596_049_920),
        ("QWEN3_1_7B", 1_720_574_976),
        ("QWEN3_4B", 4_022_468_096),
        ("QWEN3_8B", 8_190_735_360),
        ("QWEN3_14B", 14_768_307_200),
        ("QWEN3_32B", 32_762_123_264),
        ("SMOLLM2_135M", 134_515_008),
        ("SMOLLM2_360M", 361_821_120),
        ("SMOLLM2_1_7B", 1_711_376_384),
        ("SMOLLM3_3B", 3_075_098_624),
    ],
)
def test_published_parameter_counts(name, count):
    config = getattr(lj.presets, name)
    assert config.num_params == count


@pytest.mark.parametrize("name", ["LLAMA2_70B", "QWEN2_5_3B", "QWEN3_8B", "SMOLLM3_3B"])
def test_parameters_are_as_many_as_are_counted(name):
    config = getattr(lj.presets, name)
    count = config.num_params
    shapes = jax.eval_shape(lambda key: lj.init(config, key), jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count


def test_only_llama_2_70b_has_grouped_queries():
    assert lj.presets.LLAMA2_70B.num_key_value_heads == 8
    assert lj.presets.LLAMA2_13B.num_key_value_heads == lj.presets.LLAMA2_13B.num_attention_heads


def test_is_frozen_hashable_and_validated_by_replace():
    config = lj.presets.TINY
    assert hash(config) == hash(config.replace()) and config == config.replace()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 3
    with pytest.raises(ConfigError, match="vocab_size is 0"):
        config.replace(vocab_size=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": -4}, "hidden_size is -4"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
        ({"vocab_size": True}, "vocab_size is True"),
        (
            {"num_attention_heads": 3, "num_key_value_heads": 2, "head_dim": 8},
            "3 is not a multiple of num_key_value_heads 2",
        ),
        ({"hidden_size": 65, "head_dim": None}, "hidden_size 65 is not a multiple of num_attention_heads 8"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
        ({"rope_theta": math.inf}, "rope_theta is inf"),
        ({"rope_theta": math.nan}, "rope_theta is nan"),
        ({"rope_theta": 1.0}, "rope_theta is 1.0"),
        ({"head_dim": 2, "rope_scaling": lj.RopeScaling("ntk", 2.0)}, "head_dim is 2"),
        ({"sliding_window": 0}, "sliding_window is 0; it must be a whole number of keys, at least 1"),
        ({"sliding_window": True}, "sliding_window is True"),
        ({"sliding_window": 8.0}, "sliding_window is 8.0"),
        (
            {"sliding_window": 8, "window_layers": (True,)},
            "window_layers has 1 values; the model has 2 layers",
        ),
        ({"sliding_window": 8, "window_layers": (1, 0)}, "each value must be true or false"),
        ({"window_layers": (True, False)}, "window_layers is set and sliding_window is not"),
    ],
)
def test_invalid_values_are_errors(changes, message):
    with pytest.raises(ConfigError) as error:
        lj.presets.TINY.replace(**changes)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_layers_that_are_all_alike_are_one_configuration():
    tiny = lj.presets.TINY.replace(num_hidden_layers=4)
    windows = tiny.replace(sliding_window=8)
    assert tiny.replace(sliding_window=8, window_layers=(True,) * 4) == windows != tiny
    assert tiny.replace(sliding_window=8, window_layers=(False,) * 4) == tiny
    mixed = windows.replace(window_layers=(True, False) * 2)
    assert [kind.window for kind in mixed.layer_kinds] == [8, None, 8, None]
    assert (tiny.layer_period, windows.layer_period, mixed.layer_period) == (1, 1, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "cubic", "factor": 2.0}, "rope_scaling.kind is 'cubic'"),
        ({"kind": "linear", "factor": 0.5}, "rope_scaling.factor is 0.5"),
        ({"kind": "linear", "factor": math.nan}, "rope_scaling.factor is nan"),
        ({"kind": "yarn", "factor": 2.0}, "original_max_position_embeddings is None"),
        (
            {"kind": "llama3", "factor": 2.0, "original_max_position_embeddings": 8, "high_freq_factor": 1.0},
            "high_freq_factor > low_freq_factor",
        ),
        (
            {"kind": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "beta_slow": 64.0},
            "beta_fast > beta_slow",
        ),
        (
            {"kind": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "beta_fast": math.inf},
            "beta_fast is inf",
        ),
        (
            {
                "kind": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 8,
                "attention_factor": math.nan,
            },
            "attention_factor is nan",
        ),
        ({"kind": "ntk", "factor": 1e300}, "rope_scaling.factor is 1e+300"),
    ],
)
def test_invalid_rope_scaling_is_an_error(arguments, message):
    with pytest.raises(ConfigError) as error:
        lj.RopeScaling(**arguments)
    assert message in str(error.value) and "\n" not in str(error.value)
