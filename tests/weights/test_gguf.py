"""GGUF: every quantization against the gguf package, the metadata, and hostile files."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.errors import CheckpointError
from llama_jax.rope import rotary_frequencies
from llama_jax.weights import load_params, open_source, read_gguf_metadata
from llama_jax.weights.gguf import decode
from llama_jax.weights.gguf_header import SUPPORTED_TYPES
from llama_jax.weights.source import TensorInfo
from tests.weights.test_load import assert_same, one_line, problem
from tests.weights.writers import CONFIG, quantized, random_params, write_gguf

SMALL = LlamaConfig(
    vocab_size=8,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=16,
)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantized_models_load_as_gguf_dequantizes_them(kind: str, tmp_path: Path) -> None:
    params = random_params()
    source = open_source(write_gguf(tmp_path / "a.gguf", CONFIG, params, kind=kind))
    assert source.tensors["blk.0.attn_q.weight"].dtype == kind
    assert_same(load_params(source), quantized(params, kind))


def test_every_type_that_gguf_dequantizes_is_supported() -> None:
    def dequantizes(kind: GGMLQuantizationType) -> bool:
        size = GGML_QUANT_SIZES[kind][1]
        try:
            gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            return False
        return True

    assert {kind.name for kind in GGMLQuantizationType if dequantizes(kind)} == {*SUPPORTED_TYPES}


@pytest.mark.parametrize("kind", SUPPORTED_TYPES)
@pytest.mark.parametrize("rows", [3, 700])
def test_random_blocks_decode_as_gguf_dequantizes_them(kind: str, rows: int, tmp_path: Path) -> None:
    number = GGMLQuantizationType[kind]
    values, size = GGML_QUANT_SIZES[number]
    shape = (rows, values * (512 // values))  # 700 rows are several chunks
    nbytes = rows * shape[1] // values * size
    # Bytes below 60 decode to finite, normal scales.
    raw = np.random.default_rng(0).integers(0, 60, nbytes, np.uint8)
    ours = decode("w", TensorInfo(shape, kind, nbytes, tmp_path, 0), raw)
    assert ours.shape == shape
    theirs = gguf.quants.dequantize(raw.reshape(rows, -1), number)
    np.testing.assert_array_equal(np.asarray(ours, np.float32), theirs)


def test_metadata_types(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_bool("a.bool", True)
    writer.add_int8("a.int8", -3)
    writer.add_uint64("a.uint64", 1 << 60)
    writer.add_float32("a.float32", 1e-5)
    writer.add_float64("a.float64", 0.1)
    writer.add_string("a.string", "naïve 🦙")
    writer.add_array("a.strings", ["", "a", "Ġthe", "🦙"])
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.bools", [True, False])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fields = read_gguf_metadata(tmp_path / "a.gguf")
    assert fields["general.architecture"] == "llama"
    assert fields["a.bool"] is True
    assert (fields["a.int8"], fields["a.uint64"], fields["a.float64"]) == (-3, 1 << 60, 0.1)
    assert fields["a.float32"] == 1e-5  # and not 9.999999747378752e-06
    assert fields["a.string"] == "naïve 🦙"
    assert fields["a.strings"] == ["", "a", "Ġthe", "🦙"]
    assert fields["a.ints"].tolist() == [1, -2, 3]
    assert fields["a.bools"].tolist() == [True, False]


def test_metadata_matches_the_gguf_package(smollm2_path: Path) -> None:
    ours = read_gguf_metadata(smollm2_path)
    theirs = {key: field for key, field in gguf.GGUFReader(smollm2_path).fields.items() if "GGUF." not in key}
    assert list(ours) == list(theirs)
    for key in (
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.merges",
        "tokenizer.chat_template",
        "llama.block_count",
    ):
        assert ours[key] == theirs[key].contents()


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        ({}, None),
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, None),
        ({"rope__scale_linear": 2.0}, RopeScaling("linear", 2.0)),
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}, RopeScaling("linear", 4.0)),
        (
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__factor": 4.0,
                "rope__scaling__original_context_length": 32,
            },
            RopeScaling("yarn", 4.0, 32),
        ),
        (
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__factor": 4.0,
                "rope__scaling__attn_factor": 2.0,
                "rope__scaling__yarn_beta_fast": 16.0,
            },
            RopeScaling("yarn", 4.0, 128, beta_fast=16.0, attention_factor=2 * (0.1 * np.log(4.0) + 1)),
        ),
    ],
)
def test_rope_scaling_fields(fields: dict[str, Any], scaling: RopeScaling | None, tmp_path: Path) -> None:
    source = open_source(write_gguf(tmp_path / "a.gguf", CONFIG, random_params(), **fields))
    assert source.config == CONFIG.replace(rope_scaling=scaling)


@pytest.mark.parametrize(
    ("head_dim", "theta", "scaling"),
    [
        (128, 500_000.0, RopeScaling("llama3", 8.0, 8192)),  # Llama 3.1
        (64, 500_000.0, RopeScaling("llama3", 32.0, 8192)),  # Llama 3.2
        (64, 10_000.0, RopeScaling("llama3", 3.0, 300, low_freq_factor=1.0, high_freq_factor=2.5)),
    ],
)
def test_llama3_scaling_is_recovered_from_its_divisors(
    head_dim: int, theta: float, scaling: RopeScaling, tmp_path: Path
) -> None:
    config = CONFIG.replace(head_dim=head_dim, rope_theta=theta)
    plain, _ = rotary_frequencies(head_dim=head_dim, theta=theta, scaling=None)
    scaled, _ = rotary_frequencies(head_dim=head_dim, theta=theta, scaling=scaling)
    divisors = {"rope_freqs.weight": (plain / scaled).astype(np.float32)}
    source = open_source(write_gguf(tmp_path / "a.gguf", config, random_params(config), extra=divisors))
    assert source.config == config.replace(rope_scaling=scaling)
    load_params(source)  # rope_freqs.weight is not an unexpected tensor
    doubled = {"rope_freqs.weight": 2 * divisors["rope_freqs.weight"]}
    with pytest.raises(CheckpointError, match="does not follow Llama 3's rope scaling") as caught:
        open_source(write_gguf(tmp_path / "b.gguf", config, random_params(config), extra=doubled))
    one_line(caught)


def test_defaults_of_absent_fields(tmp_path: Path) -> None:
    config = SMALL.replace(tie_word_embeddings=True)
    absent = (
        "attention__key_length",
        "attention__value_length",
        "attention__head_count_kv",
        "rope__freq_base",
    )
    path = write_gguf(tmp_path / "a.gguf", config, random_params(config), **dict.fromkeys(absent))
    assert open_source(path).config == config


# Unsupported models.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expert_count": 8}, "llama.expert_used_count is missing"),
        ({"attention__value_length": 8}, "llama.attention.value_length is 8; only 16 is supported"),
        ({"rope__dimension_count": 8}, "llama.rope.dimension_count is 8; only 16 is supported"),
        ({"block_count": None}, "llama.block_count is missing"),
        ({"block_count": "three"}, "llama.block_count is 'three'; it must be one int"),
        ({"attention__head_count_kv": [4, 2, 4]}, "llama.attention.head_count_kv is"),
        ({"attention__head_count": 0}, "num_attention_heads is 0"),
        ({"attention__head_count": 6}, "num_attention_heads 6 is not a multiple of num_key_value_heads 4"),
        ({"attention__layer_norm_rms_epsilon": float("nan")}, "rms_norm_eps is nan"),
        (
            {"rope__scaling__type": "longrope", "rope__scaling__factor": 2.0},
            "type 'longrope' is not supported",
        ),
        ({"rope__scaling__type": "yarn", "rope__scaling__factor": 0.5}, "rope_scaling.factor is 0.5"),
        (
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__factor": -1.0,
                "rope__scaling__attn_factor": 2.0,
            },
            "rope_scaling.factor is -1.0",
        ),
        ({"rope__freq_base": float("nan")}, "rope_theta is nan"),
    ],
)
def test_unsupported_fields_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", CONFIG, random_params(), **fields)
    with pytest.raises(CheckpointError) as caught:
        open_source(path)
    assert message in one_line(caught)
    assert str(path) in str(caught.value)


def test_equal_per_layer_values_are_one_value(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", CONFIG, random_params(), attention__head_count_kv=[4, 4, 4])
    assert open_source(path).config == CONFIG


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "gemma2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="'gemma2'; only llama, qwen2") as caught:
        open_source(tmp_path / "a.gguf")
    one_line(caught)


# Hostile files, built by hand.


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def field(key: bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: bytes, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def header(
    *, fields: tuple[bytes, ...] = (), tensors: tuple[bytes, ...] = (), data: bytes = b"", **counts: int
) -> bytes:
    start = struct.pack(
        "<4sIQQ",
        b"GGUF",
        counts.get("version", 3),
        counts.get("tensor_count", len(tensors)),
        counts.get("field_count", len(fields)),
    )
    start += b"".join(fields) + b"".join(tensors)
    return start + b"\0" * (-len(start) % 32) + data


HUGE = (1 << 64) - 1
HOSTILE: dict[str, tuple[bytes, str]] = {
    "only the magic": (b"GGUF", "truncated or malformed: the version needs 4 bytes"),
    "version 1": (header(version=1), "GGUF version 1 is not supported"),
    "big-endian": (header(version=3 << 24), "GGUF version 3 (big-endian) is not supported"),
    "endless fields": (header(field_count=HUGE), f"claims {HUGE} metadata fields but only"),
    "endless tensors": (header(tensor_count=HUGE), f"claims {HUGE} tensors but only"),
    "many tensors": (header(tensor_count=10**6, data=bytes(10**5)), "claims 1000000 tensors but only"),
    "endless key": (
        header(fields=(struct.pack("<Q", 1 << 60) + bytes(40),)),
        "a metadata key is 1152921504606846976",
    ),
    "empty key": (header(fields=(field(b"", 4, bytes(4)),)), "a metadata key is empty"),
    "key twice": (header(fields=(field(b"a", 4, bytes(4)),) * 2), "'a' appears twice"),
    "key no UTF-8": (header(fields=(field(b"\xff\xfe", 4, bytes(4)),)), "a metadata key is not UTF-8"),
    "unknown type": (header(fields=(field(b"a", 13, bytes(4)),)), "'a' has the unknown type 13"),
    "endless string": (
        header(fields=(field(b"a", 8, struct.pack("<Q", 1 << 60)),)),
        "'a' needs 1152921504606846976",
    ),
    "string no UTF-8": (header(fields=(field(b"a", 8, string(b"\xc3\x28")),)), "'a' is not UTF-8"),
    "endless array": (
        header(fields=(field(b"a", 9, struct.pack("<IQ", 4, 1 << 62)),)),
        f"'a' needs {1 << 64} bytes",
    ),
    "endless strings": (
        header(fields=(field(b"a", 9, struct.pack("<IQ", 8, 1 << 61)),)),
        "claims 2305843009213693952",
    ),
    "nested array": (header(fields=(field(b"a", 9, struct.pack("<IQ", 9, 1)),)), "array of type 9"),
    "invalid alignment": (
        header(fields=(field(b"general.alignment", 4, struct.pack("<I", 24)),)),
        "general.alignment is '24'; it must be a power of 2",
    ),
    "no dimensions": (header(tensors=(tensor(b"w", ()),)), "'w' has 0 dimensions"),
    "many dimensions": (header(tensors=(tensor(b"w", (1,) * 5),)), "'w' has 5 dimensions"),
    "dimensions past memory": (
        header(tensors=(tensor(b"w", (1 << 63, 1 << 63)),)),
        f"ends at byte {(1 << 128) + 96}",
    ),
    "dimensions that wrap": (
        header(tensors=(tensor(b"w", (1 << 32, 1 << 32)),)),
        f"ends at byte {(1 << 66) + 96}",
    ),
    "zero dimension": (header(tensors=(tensor(b"w", (0, 4)),)), "'w' has shape (4, 0)"),
    "broken row": (
        header(tensors=(tensor(b"w", (33,), kind=8),)),
        "rows of Q8_0 must be positive multiples of 32",
    ),
    "unknown quantization": (header(tensors=(tensor(b"w", (32,), kind=999),)), "'w' has type number 999"),
    "unsupported quantization": (
        header(tensors=(tensor(b"w", (256,), kind=26),)),
        "'w' has type I32, which is not supported",
    ),
    "unaligned offset": (
        header(tensors=(tensor(b"w", (1,), offset=4),), data=bytes(64)),
        "at offset 4, not a multiple",
    ),
    "offset past end": (header(tensors=(tensor(b"w", (8,), offset=1 << 62),)), "'w' ends at byte"),
    "tensor twice": (header(tensors=(tensor(b"w", (8,)),) * 2, data=bytes(64)), "tensor 'w' appears twice"),
    "overlap": (
        header(tensors=(tensor(b"v", (16,)), tensor(b"w", (8,), offset=32)), data=bytes(64)),
        "tensors 'v' and 'w' overlap",
    ),
    "missing data": (header(tensors=(tensor(b"w", (8,)),), data=bytes(31)), "but the file has"),
    "long name with a line break": (header(tensors=(tensor(b"w\n" * 999, (0,)),)), "tensor 'w\\nw\\n"),
    "no model": (
        header(fields=(field(b"general.architecture", 8, string(b"llama")),)),
        "'token_embd.weight'",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_raise_one_line_errors_in_bounded_memory(case: str, tmp_path: Path) -> None:
    data, message = HOSTILE[case]
    (tmp_path / "a.gguf").write_bytes(data)
    tracemalloc.start()
    with pytest.raises(CheckpointError) as caught:
        open_source(tmp_path / "a.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message in one_line(caught)
    assert str(tmp_path) in str(caught.value)
    assert peak < 4 << 20


@pytest.fixture
def whole_file(tmp_path: Path) -> bytes:
    path = write_gguf(tmp_path / "whole.gguf", SMALL, random_params(SMALL))
    return path.read_bytes()


def test_truncated_files_raise_one_line_errors(whole_file: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    data = len(whole_file) - SMALL.num_params * 4
    for length in (*range(data + 64), len(whole_file) - 33, len(whole_file) - 1):
        path.write_bytes(whole_file[:length])
        with pytest.raises(CheckpointError) as caught:
            open_source(path)
        one_line(caught)


def test_damaged_header_bytes(whole_file: bytes, tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    rng = np.random.default_rng(0)
    problems = set()
    for at in range(len(whole_file) - SMALL.num_params * 4):
        damaged = bytearray(whole_file)
        damaged[at] = rng.choice([0, 0xFF, damaged[at] ^ 1, rng.integers(256)])
        path.write_bytes(damaged)
        problems.add(problem(lambda: open_source(path)))
    assert "" in problems  # damage in padding or in unconstrained values
    assert len(problems) > 100
    assert not any("\n" in message for message in problems)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("theta", [1.0001, 50_000.0, 1e30])
@pytest.mark.parametrize(
    "divisors",
    [
        [8, 8, 8, 2.8, 2.3, 1, 1, 1],
        [1.00004] * 8,
        [float("nan")] * 8,
        [float("inf"), 2, 2, 2, 1, 1, 1, 1],
        [-1, 0, 1, 2, 3, 4, 5, 6],
        [1, 1.5, 2, 2, 2, 2, 2, 9e5],
    ],
)
def test_unsupported_rope_divisors_are_refused(divisors: list[float], theta: float, tmp_path: Path) -> None:
    extra = {"rope_freqs.weight": np.array(divisors, np.float32)}
    path = write_gguf(tmp_path / "a.gguf", CONFIG, random_params(), extra=extra, rope__freq_base=theta)
    with pytest.raises(CheckpointError, match="does not follow Llama 3's rope scaling") as caught:
        open_source(path)
    one_line(caught)
