"""Hugging Face directories: config.json, the safetensors index, and safetensors files."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llama_jax.config import RopeScaling
from llama_jax.errors import CheckpointError
from llama_jax.weights import load_params, open_source
from llama_jax.weights.hf import read_config
from llama_jax.weights.safetensors import read_safetensors_header
from llama_jax.weights.source import decode_floats, read_bytes
from tests.weights.test_load import assert_same, one_line, problem
from tests.weights.writers import CONFIG, hf_config, random_params, write_hf


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_dtypes(dtype: Any, shards: int, tmp_path: Path) -> None:
    params = random_params()
    assert_same(
        load_params(open_source(write_hf(tmp_path, CONFIG, params, dtype=dtype, shards=shards))), params
    )


def test_header_matches_the_safetensors_library(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes: list[tuple[int, ...]] = [(), (0,), (3,), (2, 5), (2, 0, 4), (2, 3, 4)]
    tensors = {f"t{i}": rng.normal(size=shape).astype(np.float32) for i, shape in enumerate(shapes)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    ours = read_safetensors_header(tmp_path / "a.safetensors")
    theirs = load_file(tmp_path / "a.safetensors")
    assert set(ours) == set(theirs)
    for name, info in ours.items():
        np.testing.assert_array_equal(decode_floats(name, info, read_bytes(name, info)), theirs[name])


# config.json


def config_of(folder: Path, **changes: Any) -> Any:
    fields = hf_config(CONFIG) | changes
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in fields.items() if value is not ...})
    )
    return read_config(folder / "config.json")


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        (None, None),
        ({"rope_type": "default"}, None),
        ({"type": "linear", "factor": 2}, RopeScaling("linear", 2.0)),  # the older key
        ({"rope_type": "linear", "factor": 2.0}, RopeScaling("linear", 2.0)),
        ({"type": "dynamic", "factor": 2.0}, None),  # no effect within the trained context
        (LLAMA3, RopeScaling("llama3", 8.0, 64, low_freq_factor=1.0, high_freq_factor=4.0)),
        (YARN, RopeScaling("yarn", 4.0, 32)),
        (
            YARN | {"factor": None, "truncate": False},
            RopeScaling("yarn", 4.0, 32, truncate=False),
        ),  # 128 / 32
        (YARN | {"original_max_position_embeddings": None}, RopeScaling("yarn", 4.0, 128)),
        (
            YARN | {"beta_fast": 16, "beta_slow": 2},
            RopeScaling("yarn", 4.0, 32, beta_fast=16.0, beta_slow=2.0),
        ),
        (YARN | {"attention_factor": 1.5, "mscale": 2}, RopeScaling("yarn", 4.0, 32, attention_factor=1.5)),
        (
            YARN | {"mscale": 2.0, "mscale_all_dim": 1.0},
            RopeScaling("yarn", 4.0, 32, attention_factor=(0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1)),
        ),
    ],
)
def test_rope_scaling(
    key: str, fields: dict[str, Any] | None, scaling: RopeScaling | None, tmp_path: Path
) -> None:
    assert config_of(tmp_path, **{key: fields}) == CONFIG.replace(rope_scaling=scaling)


def test_rope_theta_in_rope_parameters(tmp_path: Path) -> None:
    parameters = {"rope_type": "default", "rope_theta": 12_345.0}
    assert config_of(tmp_path, rope_theta=..., rope_parameters=parameters).rope_theta == 12_345.0
    assert config_of(tmp_path, rope_parameters=LLAMA3).rope_theta == CONFIG.rope_theta


def test_outer_original_context_takes_precedence(tmp_path: Path) -> None:
    config = config_of(tmp_path, rope_scaling=YARN, original_max_position_embeddings=16)
    assert config.rope_scaling.original_max_position_embeddings == 16


def test_defaults_of_absent_fields(tmp_path: Path) -> None:
    absent = ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta")
    config = config_of(tmp_path, hidden_act=..., tie_word_embeddings=..., **dict.fromkeys(absent, ...))
    assert config == CONFIG.replace(
        num_key_value_heads=8, head_dim=8, max_position_embeddings=2048, rms_norm_eps=1e-6, rope_theta=1e4
    )
    assert config_of(tmp_path, **dict.fromkeys(absent, None)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gemma2"},
            "model_type is 'gemma2'; only llama, mistral, mixtral, qwen2",
        ),
        ({"model_type": ...}, "model_type is missing"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only silu or swish is supported"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"vocab_size": "many"}, "vocab_size is 'many'; it must be a whole number"),
        ({"vocab_size": True}, "vocab_size is 'True'; it must be a whole number"),
        ({"vocab_size": 10**4000}, "it must be a whole number below 2^31"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1; it must be a whole number, at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": 6}, "num_attention_heads 6 is not a multiple of num_key_value_heads 4"),
        ({"head_dim": 7}, "head_dim is 7; rotary embedding needs an even number"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny'; it must be a finite number"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is 'nan'; it must be a finite number"),
        ({"rope_theta": 10**400}, "it must be a finite number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; it must be true or false"),
        ({"rope_scaling": [1]}, "rope_scaling is '[1]'; it must be an object"),
        (
            {"rope_scaling": {"rope_type": "longrope"}},
            "rope_type is 'longrope'; only default, linear, dynamic, yarn and llama3",
        ),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "only default, linear, dynamic, yarn and llama3"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor is 0.5"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 0.5}}, "rope_scaling.high_freq_factor is 0.5"),
        (
            {"rope_scaling": YARN | {"original_max_position_embeddings": 0}},
            "original_max_position_embeddings is 0",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is not 1",
        ),
    ],
)
def test_unsupported_fields_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        config_of(tmp_path, **changes)
    assert message in one_line(caught)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"model_type": "llama"', "not valid JSON"),
        (b"\xff\xfe\xff", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b"[]", "holds a JSON list where an object is expected"),
        (b'{"model_type": "llama", "model_type": "gpt2"}', "'model_type' appears twice"),
    ],
)
def test_malformed_config_json(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(tmp_path)
    one_line(caught)


# The safetensors index


def edit_index(folder: Path, edit: Any) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "file", ["../model-00001-of-00002.safetensors", "/etc/passwd", "a\\b.safetensors", 3, "x.bin"]
)
def test_index_paths_outside_the_directory_are_refused(file: Any, tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "model", CONFIG, random_params(), shards=2)
    edit_index(folder, lambda index: index["weight_map"].update({"model.norm.weight": file}))
    with pytest.raises(CheckpointError, match="files in the same directory are read") as caught:
        open_source(folder)
    assert "'model.norm.weight'" in one_line(caught)


def test_missing_files_of_the_index_are_named(tmp_path: Path) -> None:
    folder = write_hf(tmp_path, CONFIG, random_params(), shards=3)
    for number in (1, 3):
        (folder / f"model-{number:05d}-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        open_source(folder)
    missing = "model-00001-of-00003.safetensors, model-00003-of-00003.safetensors"
    assert f"{missing}; download them too" in one_line(caught)


ROTARY_TABLES = {
    f"model.layers.{layer}.self_attn.rotary_emb.{name}": np.ones(4, np.float32)
    for layer in range(CONFIG.num_hidden_layers)
    for name in ("inv_freq", "cos_cached", "sin_cached")
}


def test_the_files_decide_which_tensors_there_are(tmp_path: Path) -> None:
    """An index may name rotary tables that no file has, and omit tensors that one has; as in transformers."""
    params = random_params()
    folder = write_hf(tmp_path, CONFIG, params, shards=2)
    first = "model-00001-of-00002.safetensors"
    save_file(load_file(folder / first) | ROTARY_TABLES, folder / first)

    def edit(index: dict[str, Any]) -> None:
        index["weight_map"]["model.rotary_emb.inv_freq"] = first
        del index["weight_map"]["model.norm.weight"]

    edit_index(folder, edit)
    assert_same(load_params(open_source(folder)), params)


def test_the_last_file_with_a_tensor_is_taken(tmp_path: Path) -> None:
    params = random_params()
    folder = write_hf(tmp_path, CONFIG, params, shards=2)
    file = folder / "model-00001-of-00002.safetensors"
    save_file(load_file(file) | {"model.norm.weight": np.zeros(64, np.float32)}, file)
    assert_same(load_params(open_source(folder)), params)


def test_what_no_file_has_is_missing(tmp_path: Path) -> None:
    folder = write_hf(tmp_path, CONFIG, random_params(), shards=2)
    file = folder / "model-00002-of-00002.safetensors"
    save_file({name: x for name, x in load_file(file).items() if name != "model.norm.weight"}, file)
    with pytest.raises(CheckpointError, match=r"missing tensors: model\.norm\.weight"):
        load_params(open_source(folder))


def test_rotary_tables_are_ignored(tmp_path: Path) -> None:
    params = random_params()
    folder = write_hf(tmp_path, CONFIG, params)
    save_file(load_file(folder / "model.safetensors") | ROTARY_TABLES, folder / "model.safetensors")
    assert_same(load_params(open_source(folder)), params)


def test_names_of_a_bare_model(tmp_path: Path) -> None:
    """`LlamaModel.save_pretrained` writes no prefix; a tied model has all it needs."""
    config = CONFIG.replace(tie_word_embeddings=True)
    params = random_params(config)
    folder = write_hf(tmp_path, config, params)
    state = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): x for name, x in state.items()}, folder / "model.safetensors")
    assert_same(load_params(open_source(folder)), params)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_stored_head_of_its_own_is_used_though_the_configuration_ties_it(
    dtype: Any, tmp_path: Path
) -> None:
    """transformers ties the matrices only if the files have one, or two that are equal."""
    params = random_params()
    folder = write_hf(tmp_path, CONFIG, params, dtype=dtype)
    config_of(folder, tie_word_embeddings=True)
    source = open_source(folder)
    assert not source.config.tie_word_embeddings
    assert_same(load_params(source), params)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    save_file(state, folder / "model.safetensors")
    assert open_source(folder).config.tie_word_embeddings
    assert "lm_head" not in load_params(open_source(folder))


def test_a_tied_model_whose_one_matrix_is_stored_as_the_head(tmp_path: Path) -> None:
    config = CONFIG.replace(tie_word_embeddings=True)
    params = random_params(config)
    folder = write_hf(tmp_path, config, params)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, folder / "model.safetensors")
    assert_same(load_params(open_source(folder)), params)


def test_a_directory_without_weights(tmp_path: Path) -> None:
    folder = write_hf(tmp_path, CONFIG, random_params())
    (folder / "model.safetensors").rename(folder / "model-of-mine.safetensors")
    with pytest.raises(CheckpointError, match=r"has none of model\.safetensors or model\.") as caught:
        open_source(folder)
    one_line(caught)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(CheckpointError, match="weight_map is missing or not an object"):
        open_source(folder)


# Hostile safetensors files


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated or malformed: its header claims 0 bytes but the file has 0"),
    "no header": (b"\x10\0\0\0\0\0\0\0", "its header claims 16 bytes but the file has 8"),
    "header of 2^60 bytes": (safetensors({}, length=1 << 60), f"its header claims {1 << 60} bytes"),
    "not JSON": (safetensors(b"{nonsense"), "not valid JSON"),
    "deep JSON": (safetensors(b'{"a":' * 100_000), "not valid JSON"),
    "not an object": (safetensors([]), "holds a JSON list"),
    "duplicate name": (
        safetensors(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', bytes(4)),
        "'a' appears twice",
    ),
    "entry not an object": (safetensors({"a": 3}), "'a' is not described by dtype, shape and data_offsets"),
    "entry incomplete": (safetensors({"a": {"dtype": "F32"}}), "'a' is not described by"),
    "unknown dtype": (
        safetensors({"a": entry([1], 0, 1, "F4")}, bytes(1)),
        "'a' has dtype 'F4', which cannot be read",
    ),
    "dtype not a string": (safetensors({"a": entry([1], 0, 1, {})}, bytes(1)), "'a' has dtype '{}'"),
    "negative size": (safetensors({"a": entry([-1], 0, 4)}, bytes(4)), "'a' has '[-1]' where whole numbers"),
    "size not an integer": (
        safetensors({"a": entry([True, 1.0], 0, 4)}, bytes(4)),
        "where whole numbers should be",
    ),
    "overflowing size": (
        safetensors({"a": entry([1 << 62, 1 << 62], 0, 4)}, bytes(4)),
        "but its data_offsets are",
    ),
    "too big a size": (safetensors({"a": entry([1 << 64], 0, 4)}, bytes(4)), "where whole numbers should be"),
    "shape not a list": (safetensors({"a": entry(3, 0, 4)}, bytes(4)), "where whole numbers should be"),
    "three offsets": (
        safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, bytes(8)),
        "'a' has 3 data_offsets, not 2",
    ),
    "wrong byte count": (
        safetensors({"a": entry([2], 0, 4)}, bytes(4)),
        "'a' is F32 [2], 8 bytes, but its data_offsets",
    ),
    "offsets backwards": (safetensors({"a": entry([1], 4, 0)}, bytes(4)), "but its data_offsets are [4, 0]"),
    "offset past end": (
        safetensors({"a": entry([1], 1 << 40, (1 << 40) + 4)}, bytes(4)),
        "its tensors end at byte",
    ),
    "data cut": (
        safetensors({"a": entry([2], 0, 8)}, bytes(7)),
        "its tensors end at byte 77 but the file has 76",
    ),
    "trailing data": (safetensors({"a": entry([2], 0, 8)}, bytes(9)), "its tensors end at byte"),
    "overlap": (
        safetensors({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
        "tensors 'a' and 'b' overlap",
    ),
    "name with line break": (safetensors({"a\nb": 3}), r"tensor 'a\nb' is not described"),
    "very long name": (safetensors({"a" * 10**6: 3}), "aaa...' is not described"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_raise_one_line_errors_in_bounded_memory(case: str, tmp_path: Path) -> None:
    data, message = HOSTILE[case]
    write_hf(tmp_path, CONFIG, random_params())
    (tmp_path / "model.safetensors").write_bytes(data)
    tracemalloc.start()
    with pytest.raises(CheckpointError) as caught:
        open_source(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message in one_line(caught)
    assert "model.safetensors" in str(caught.value)
    assert peak < 16 << 20


def test_too_long_headers_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_jax.weights.json_fields.MAX_JSON_BYTES", 1000)
    folder = write_hf(tmp_path, CONFIG, random_params())
    with pytest.raises(CheckpointError, match=r"a header of \d+ bytes; at most 1000 are read"):
        open_source(folder)
    (folder / "config.json").write_text(" " * 1001)
    with pytest.raises(CheckpointError, match="a JSON file of 1001 bytes; at most 1000 are read"):
        open_source(folder)


def test_truncated_or_damaged_files_raise_one_line_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError) as caught:
            read_safetensors_header(path)
        one_line(caught)
    problems = set()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        problems.add(problem(lambda: read_safetensors_header(path)))
    assert "" in problems
    assert len(problems) > 20
    assert not any("\n" in message for message in problems)


def test_yarn_with_an_original_context_of_zero(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "original_max_position_embeddings": 0}
    folder = write_hf(tmp_path, CONFIG, random_params(), rope_scaling=scaling)
    with pytest.raises(CheckpointError, match="original_max_position_embeddings is 0") as caught:
        open_source(folder)
    one_line(caught)
