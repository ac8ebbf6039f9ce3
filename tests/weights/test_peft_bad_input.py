"""Unsupported, incomplete and missing adapters raise one-line errors."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.errors import CheckpointError
from llama_jax.weights.adapters import load_adapter
from tests.weights.adapters import FIELDS, tensors, write


def without(name):
    return {key: array for key, array in tensors().items() if name not in key}


LAYER = "base_model.model.model.layers.0"
EXTRA = np.zeros((4, 16), np.float32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; only PEFT's LORA, TRAINABLE_TOKENS and PREFIX_TUNING"),
        ({"peft_type": None}, "peft_type is 'None'"),
        ({"task_type": "TOKEN_CLS"}, "task_type is 'TOKEN_CLS'; only CAUSAL_LM and SEQ_CLS"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights is 'pissa_niter_4', which changes the base",
        ),
        ({"init_lora_weights": "loftq"}, "'loftq', which changes the base weights in a way that the adapter"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'; it must be a list of names"),
        (
            {"trainable_token_indices": {"q_proj": [1]}},
            "the trained tokens of 'q_proj' are '[1]'; they must be",
        ),
        ({"trainable_token_indices": []}, "the trained tokens of 'embed_tokens' are '[]'"),
        ({"use_invention": True}, "'use_invention' is 'True', which"),
        ({"use_dora": "yes"}, "use_dora is 'yes'; it must be true or false"),
        ({"r": 8}, ".lora_A.weight [4, 16] should be [8, 16]"),
        ({"r": "4"}, "r is '4'; it must be a whole number"),
        ({"r": 0}, "r is '0'; it must be a whole number"),
        ({"lora_alpha": 0}, "lora_alpha is '0'; it must be a finite number above 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha is 'nan'"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern has 'x'; it must be a number"),
        ({"alpha_pattern": {"q_proj": -1}}, "lora_alpha is '-1'"),
        ({"alpha_pattern": {"(?=a)": 1}}, "alpha_pattern has an expression that is not supported: it has a"),
        ({"rank_pattern": [1]}, "rank_pattern is '[1]'; it must be an object"),
        (
            {"use_dora": True},
            "missing tensors: base_model.model.model.layers.0.*.down_proj.lora_magnitude_vector",
        ),
    ],
    ids=str,
)
def test_unsupported_configs_are_refused(fields, message, tmp_path):
    folder = write(tmp_path / "a", **fields)
    with pytest.raises(CheckpointError) as error:
        load_adapter(folder)
    assert message in str(error.value)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("stored", "fields", "message"),
    [
        (dict, {}, "missing tensors: the file has none"),
        (
            lambda: without("layers.1.mlp.up_proj.lora_B"),
            {},
            "missing tensors: base_model.model.model.layers.1.*.up",
        ),
        (
            lambda: without("layers.0."),
            {},
            "missing tensors: base_model.model.model.layers.0.*.down_proj.lora_A",
        ),
        (
            lambda: without("v_proj"),
            {"target_modules": ["q_proj", "v_proj"]},
            "layers.0.*.v_proj.lora_A.weight",
        ),
        (
            lambda: tensors() | {f"{LAYER}.mlp.gate.lora_A.weight": EXTRA},
            {},
            "unexpected tensors: 'base_model",
        ),
        (
            lambda: tensors() | {"base_model.model.lm_head.lora_A.weight": EXTRA},
            {},
            "missing tensors: base_model.model.lm_head.lora_B.weight; use the files",
        ),
        (
            lambda: tensors() | {f"{LAYER}.self_attn.q_proj.lora_magnitude_vector": EXTRA[0]},
            {},
            "magnitude_vector'",
        ),
        (
            lambda: tensors() | {f"{LAYER}.mlp.q_proj.lora_A.weight": EXTRA},
            {},
            "unexpected tensors: 'base_model.model.model.layers.0.mlp.q_proj.lora_A.weight'",
        ),
        (
            lambda: tensors() | {"base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight": EXTRA},
            {},
            "layers.1.self_attn.q_proj.lora_B.weight [4, 16] should be [16, 4]",
        ),
        (
            lambda: tensors() | {f"{LAYER}.self_attn.q_proj.lora_A.weight": EXTRA[0]},
            {},
            "layers.0.self_attn.q_proj.lora_A.weight [16] should be [4, 0]",
        ),
    ],
)
def test_unsupported_tensors_are_refused(stored, fields, message, tmp_path):
    folder = write(tmp_path / "a", stored(), **fields)
    with pytest.raises(CheckpointError) as error:
        load_adapter(folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_paths_without_an_adapter(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"nowhere: does not exist; give a directory with adapter_config\.json"
    ):
        load_adapter(tmp_path / "nowhere")
    (tmp_path / "model").mkdir()
    with pytest.raises(CheckpointError, match=r"model: has no adapter; give a directory"):
        load_adapter(tmp_path / "model")
    folder = write(tmp_path / "a")
    with pytest.raises(CheckpointError, match="is a file; give the directory"):
        load_adapter(folder / "adapter_config.json")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin: not a torch\.save file"):
        load_adapter(folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: no such file"):
        load_adapter(folder)


def test_one_large_rank_does_not_fill_memory(tmp_path):
    stored = tensors(["mlp.up_proj"], rank=1, layers=200) | tensors(["mlp.up_proj"], rank=1000, layers=1)
    pattern = {"layers.0.mlp.up_proj": 1000}
    with pytest.raises(
        CheckpointError, match=r"191,840 bytes become 32,000,000 .* the largest rank, 1000; keep"
    ):
        load_adapter(write(tmp_path / "a", stored, r=1, rank_pattern=pattern))


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
ANY = VALUES | st.lists(VALUES, max_size=3) | st.dictionaries(st.text(max_size=5), VALUES, max_size=3)
KEYS = [
    *FIELDS,
    "use_rslora",
    "use_dora",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "init_lora_weights",
]


@settings(max_examples=150, deadline=None)
@given(fields=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), ANY, max_size=4))
def test_random_configs_raise_one_line_errors(fields, tmp_path_factory):
    folder = tmp_path_factory.mktemp("a") / "a"
    write(folder, tensors(["mlp.up_proj"], layers=1))
    (folder / "adapter_config.json").write_text(json.dumps(FIELDS | fields))
    try:
        settings, _ = load_adapter(folder)
        assert settings.rank == 4
    except CheckpointError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000  # noqa: PT017
