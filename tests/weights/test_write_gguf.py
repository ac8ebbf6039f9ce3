"""Writing GGUF files: round trips, and agreement with the gguf package."""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax as lj
from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.rope import rotary_frequencies
from llama_jax.tokenizer import load_tokenizer
from llama_jax.tokenizer.export import export_vocabulary
from llama_jax.weights import load_params, open_source, read_gguf_metadata
from llama_jax.weights.names import entries, leaves
from llama_jax.weights.source import Source
from llama_jax.weights.tensors import ParamsTensors, StoredTensors, Tensors
from llama_jax.weights.write.gguf import plan_gguf
from llama_jax.weights.write.run import write
from llama_jax.weights.write.vocabulary import Vocabulary
from tests.random_models import random_model
from tests.tokenizer.test_sentencepiece_model import goldens
from tests.weights.test_load import assert_same, one_line
from tests.weights.writers import CONFIG, quantized, random_params, write_gguf

# Each kind of RoPE scaling; tied or not; groups of 1, 2 and 3 heads; 1 to 3 layers.
SEEDS = (0, 1, 4, 5, 8, 11)
NO_VOCABULARY = Vocabulary()


def write_and_open(
    tensors: Tensors,
    target: Path,
    dtype: str | None = None,
    vocabulary: Vocabulary = NO_VOCABULARY,
    **options: Any,
) -> Source:
    write(plan_gguf(tensors, dtype, vocabulary, **options), tensors, target)
    return open_source(target)


def assert_stores(source: Source, params: Any) -> None:
    """Every tensor equals the parameters, bit for bit."""
    stored, expected = StoredTensors(source), ParamsTensors(source.config, params)
    for entry in entries(source.config, "gguf"):
        ours, theirs = (tensors.read(entry.leaf, entry.layer) for tensors in (stored, expected))
        assert ours.dtype == theirs.dtype, entry.name
        np.testing.assert_array_equal(ours, theirs, entry.name)


def stored_config(config: LlamaConfig) -> LlamaConfig:
    """The configuration in the file: NTK scaling is stored as its effective theta, in f32."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "ntk":
        return config
    theta = config.rope_theta * scaling.factor ** (config.head_dim / (config.head_dim - 2))
    return config.replace(rope_scaling=None, rope_theta=float(str(np.float32(theta))))


@pytest.mark.parametrize("seed", SEEDS)
def test_round_trip_is_bit_exact(seed: int, tmp_path: Path) -> None:
    config, params = random_model(seed)
    params = jax.device_get(params)  # slices of device arrays would compile a program for each shape
    source = write_and_open(ParamsTensors(config, params), tmp_path / "a.gguf")
    assert source.config == stored_config(config)
    assert_stores(source, params)
    rotary = [
        rotary_frequencies(head_dim=c.head_dim, theta=c.rope_theta, scaling=c.rope_scaling)
        for c in (source.config, config)
    ]
    np.testing.assert_allclose(rotary[0][0], rotary[1][0], rtol=1e-6)
    assert rotary[0][1] == rotary[1][1]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [8, 4, 1])
@pytest.mark.parametrize("head_dim", [8, 16])
def test_head_counts_and_tied_embeddings(tied: bool, kv_heads: int, head_dim: int, tmp_path: Path) -> None:
    config = CONFIG.replace(tie_word_embeddings=tied, num_key_value_heads=kv_heads, head_dim=head_dim)
    params = random_params(config)
    source = write_and_open(ParamsTensors(config, params), tmp_path / "a.gguf")
    assert source.config == config
    assert_stores(source, params)
    assert ("output.weight" in source.tensors) != tied
    assert ("llama.attention.key_length" in source.metadata) == (head_dim != 8)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_the_file_equals_the_gguf_packages(kind: str, tmp_path: Path) -> None:
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "Q8_0": "q8_0"}
    # Values that need rounding, except in F32.
    params = jax.tree.map(lambda x: (x * np.float32(1.0371)).astype(np.float32), random_params())
    write_and_open(ParamsTensors(CONFIG, params), tmp_path / "ours.gguf", names[kind])
    theirs = gguf.GGUFReader(write_gguf(tmp_path / "theirs.gguf", CONFIG, params, kind=kind))
    ours = gguf.GGUFReader(tmp_path / "ours.gguf")
    expected = {tensor.name: tensor for tensor in theirs.tensors}
    assert {tensor.name for tensor in ours.tensors} == set(expected)
    for tensor in ours.tensors:
        other = expected[tensor.name]
        assert tensor.tensor_type == other.tensor_type
        assert tensor.shape.tolist() == other.shape.tolist()
        assert tensor.data_offset % 32 == 0
        np.testing.assert_array_equal(tensor.data.view(np.uint8), other.data.view(np.uint8))
    for key, field in theirs.fields.items():
        if key.startswith("llama."):
            assert ours.fields[key].types == field.types, key
            assert ours.fields[key].contents() == field.contents(), key


def test_q8_0_matches_gguf(tmp_path: Path) -> None:
    config = CONFIG.replace(hidden_size=96, intermediate_size=128)  # several chunks of one matrix
    params = random_params(config)
    source = write_and_open(ParamsTensors(config, params), tmp_path / "a.gguf", "q8_0")
    assert_same(load_params(source), quantized(params, "Q8_0"))
    assert source.metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0


def test_q8_0_of_a_matrix_larger_than_a_chunk(tmp_path: Path) -> None:
    config = CONFIG.replace(vocab_size=2100, hidden_size=128, num_hidden_layers=1)
    params = random_params(config)
    source = write_and_open(ParamsTensors(config, params), tmp_path / "a.gguf", "q8_0")
    assert_stores(source, quantized(params, "Q8_0"))


def test_rows_not_divisible_by_the_block_size_are_f16(tmp_path: Path) -> None:
    config = CONFIG.replace(hidden_size=64, intermediate_size=72)
    params = random_params(config)
    source = write_and_open(ParamsTensors(config, params), tmp_path / "a.gguf", "q8_0")
    kinds = {name.split(".")[-2]: info.dtype for name, info in source.tensors.items()}
    assert kinds["ffn_down"] == "F16"
    assert kinds["ffn_up"] == kinds["attn_q"] == kinds["token_embd"] == kinds["output"] == "Q8_0"
    assert kinds["ffn_norm"] == kinds["output_norm"] == "F32"
    down = load_params(source)["layers"]["feed_forward"]["w_down"]
    np.testing.assert_array_equal(down, params["layers"]["feed_forward"]["w_down"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_default_dtype_is_each_tensors_own(dtype: str, tmp_path: Path) -> None:
    params = random_params()
    params["layers"]["attention"] = jax.tree.map(
        lambda x: jnp.asarray(x, dtype), params["layers"]["attention"]
    )
    source = write_and_open(ParamsTensors(CONFIG, params), tmp_path / "a.gguf")
    kind = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    assert {info.dtype for name, info in source.tensors.items() if ".attn_q." in name} == {kind}
    assert source.tensors["token_embd.weight"].dtype == "F32"
    copy = write_and_open(StoredTensors(source), tmp_path / "b.gguf")
    assert Path(copy.path).read_bytes() == Path(source.path).read_bytes()
    # Norms are always F32.
    half = write_and_open(StoredTensors(source), tmp_path / "c.gguf", "bfloat16")
    assert {info.dtype for info in half.tensors.values() if len(info.shape) == 1} == {"F32"}


def test_a_value_too_large_for_f16_is_an_error(tmp_path: Path) -> None:
    params = random_params()
    params["embed"]["embedding"][3, 5] = 70_000
    with pytest.raises(CheckpointError, match="70000 is too large for float16; use bfloat16") as caught:
        write_and_open(ParamsTensors(CONFIG, params), tmp_path / "a.gguf", "float16")
    one_line(caught)


# RoPE scaling


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling("linear", 4.0),
        RopeScaling("linear", 2.7),
        RopeScaling("yarn", 4.0, 32),
        RopeScaling("yarn", 4.0, 32, attention_factor=2.0),
        RopeScaling("yarn", 1.0, 32, attention_factor=1.25),
        RopeScaling("yarn", 16.0, 64, attention_factor=0.8317766),
        RopeScaling("llama3", 8.0, 8192),
        RopeScaling("llama3", 32.0, 32, low_freq_factor=1.5, high_freq_factor=3.5),
        RopeScaling("llama3", 2.5, 1_000_000),
    ],
)
def test_rope_scaling_round_trip(scaling: RopeScaling, tmp_path: Path) -> None:
    config = CONFIG.replace(rope_scaling=scaling)
    source = write_and_open(ParamsTensors(config, random_params(config)), tmp_path / "a.gguf")
    attention = scaling.attention_factor
    if attention is not None:  # stored as f32
        assert source.config.rope_scaling is not None
        assert source.config.rope_scaling.attention_factor == pytest.approx(attention, rel=1e-7)
        scaling = dataclasses.replace(scaling, attention_factor=source.config.rope_scaling.attention_factor)
    assert source.config == config.replace(rope_scaling=scaling)
    assert_stores(source, random_params(config))


def test_a_short_decimal_attention_factor_is_exact(tmp_path: Path) -> None:
    for i, attention in enumerate((1.0, 2.0, 1.1386, 0.707107)):
        config = CONFIG.replace(rope_scaling=RopeScaling("yarn", 40.0, 32, attention_factor=attention))
        assert (
            write_and_open(ParamsTensors(config, random_params(config)), tmp_path / f"{i}.gguf").config
            == config
        )


def test_llama3_frequency_factors_match_llama_cpp(tmp_path: Path) -> None:
    # The formula of llama.cpp's converter, for Llama 3.1.
    config = CONFIG.replace(head_dim=128, rope_theta=5e5, rope_scaling=RopeScaling("llama3", 8.0, 8192))
    source = write_and_open(ParamsTensors(config, random_params(config)), tmp_path / "a.gguf")
    wavelengths = 2 * np.pi * 5e5 ** (np.arange(0, 128, 2) / 128)
    smooth = (8192 / wavelengths - 1) / 3
    expected = np.where(
        wavelengths < 8192 / 4, 1, np.where(wavelengths > 8192, 8, 1 / ((1 - smooth) / 8 + smooth))
    )
    assert source.tensors["rope_freqs.weight"].dtype == "F32"
    np.testing.assert_allclose(source.read("rope_freqs.weight"), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (
            RopeScaling("yarn", 4.0, 32, beta_fast=16.0),
            "rope_scaling.beta_fast is 16.0; llama.cpp runs YaRN with",
        ),
        (
            RopeScaling("yarn", 4.0, 32, beta_slow=2.0),
            "rope_scaling.beta_slow is 2.0; llama.cpp runs YaRN with",
        ),
        (
            RopeScaling("yarn", 4.0, 32, truncate=False),
            "rope_scaling.truncate is False; llama.cpp runs YaRN with",
        ),
    ],
)
def test_settings_that_llama_cpp_computes_differently_are_rejected(
    scaling: RopeScaling, message: str
) -> None:
    config = CONFIG.replace(rope_scaling=scaling)
    with pytest.raises(ConfigError) as caught:
        plan_gguf(ParamsTensors(config, random_params(config)), None, NO_VOCABULARY)
    assert message in one_line(caught)


@pytest.mark.parametrize("key", ["factor", "original_max_position_embeddings", "low_freq_factor"])
def test_scaling_fields_that_contradict_the_frequency_factors_are_ignored(key: str, tmp_path: Path) -> None:
    config = CONFIG.replace(head_dim=64, rope_scaling=RopeScaling("llama3", 8.0, 2048))
    tensors = ParamsTensors(config, random_params(config))
    source = write_and_open(tensors, tmp_path / "a.gguf")
    field = f"llama_jax.rope_scaling.{key}".encode()
    raw = (tmp_path / "a.gguf").read_bytes()
    at = raw.index(field) + len(field) + 4
    changed = raw[:at] + (b"\x07\0\0\0" if "max" in key else np.float32(1.75).tobytes()) + raw[at + 4 :]
    (tmp_path / "b.gguf").write_bytes(changed)
    assert open_source(tmp_path / "b.gguf").config == source.config  # inferred from the frequency factors


# The header


def test_metadata_and_tokenizer_round_trip(tmp_path: Path, shared_data: Path) -> None:
    llama2 = load_tokenizer(shared_data / "llama2" / "tokenizer.model")
    config = CONFIG.replace(vocab_size=llama2.vocab_size, hidden_size=8, head_dim=2)
    tensors = ParamsTensors(config, random_params(config))
    source = write_and_open(
        tensors, tmp_path / "a.gguf", vocabulary=export_vocabulary(llama2, "gguf"), name="naïve 🦙"
    )
    assert source.metadata["general.name"] == "naïve 🦙"
    assert source.metadata["general.architecture"] == next(iter(source.metadata.values())) == "llama"
    ours = load_tokenizer(tmp_path / "a.gguf")
    for text, ids in goldens(shared_data):
        assert ours.encode(text) == [1, *ids]
    theirs = gguf.GGUFReader(tmp_path / "a.gguf").fields
    assert theirs["tokenizer.ggml.tokens"].contents()[:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert theirs["tokenizer.ggml.token_type"].contents()[:4] == [2, 3, 3, 6]
    assert theirs["tokenizer.ggml.add_bos_token"].contents() is True


def test_missing_tokens_are_padded(tmp_path: Path, shared_data: Path) -> None:
    stories = load_tokenizer(shared_data / "stories260K" / "tok512.bin")
    vocabulary = export_vocabulary(stories, "gguf")
    config = CONFIG.replace(vocab_size=520)
    write_and_open(ParamsTensors(config, random_params(config)), tmp_path / "a.gguf", vocabulary=vocabulary)
    ours = load_tokenizer(tmp_path / "a.gguf")
    assert ours.vocab_size == 520
    text = "Once upon a time, [PAD515] there was"
    assert ours.encode(text) == stories.encode(text)
    config = CONFIG.replace(vocab_size=511)
    with pytest.raises(CheckpointError, match="the tokenizer has 512 tokens and the model 511") as caught:
        plan_gguf(ParamsTensors(config, random_params(config)), None, vocabulary)
    one_line(caught)


def test_without_a_vocabulary(tmp_path: Path) -> None:
    write_and_open(ParamsTensors(CONFIG, random_params()), tmp_path / "a.gguf")
    metadata = read_gguf_metadata(tmp_path / "a.gguf")
    assert metadata["tokenizer.ggml.model"] == "no_vocab"
    assert metadata["llama.vocab_size"] == CONFIG.vocab_size
    with pytest.raises(lj.errors.TokenizerError, match="has no vocabulary"):
        load_tokenizer(tmp_path / "a.gguf")


@dataclasses.dataclass(frozen=True)
class ShapesOnly:
    """A model's configuration without tensors."""

    config: LlamaConfig

    def dtype(self, leaf: Any, layer: int | None) -> np.dtype[Any]:
        return np.dtype(jnp.bfloat16)

    def read(self, leaf: Any, layer: int | None) -> np.ndarray:
        raise AssertionError("planning must not read tensors")


@pytest.mark.parametrize("dtype", [None, "q8_0"])
def test_planning_70b_reads_no_tensors(dtype: str | None) -> None:
    config = lj.presets.LLAMA2_70B
    plan = plan_gguf(ShapesOnly(config), dtype, NO_VOCABULARY)
    (size,) = plan.files.values()
    values, nbytes = (1, 2) if dtype is None else (32, 34)
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    exact = (config.num_params - norms) // values * nbytes + 4 * norms
    assert exact < size < exact + 100_000
    assert len(plan.regions) == len(leaves(config)[1:-2]) * 80 + 3


def test_memory_of_quantization() -> None:
    config = CONFIG.replace(vocab_size=32_000, hidden_size=256)
    tensors = ParamsTensors(config, random_params(config))
    region = plan_gguf(tensors, "q8_0", NO_VOCABULARY).regions[0]
    array = tensors.read(region.leaf, region.layer)
    tracemalloc.start()
    out = region.encode(array)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert out.nbytes == region.nbytes
    assert peak < out.nbytes + 8_000_000 < array.nbytes


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "q8_0"])
def test_smollm2_round_trip(dtype: str, smollm2: lj.Model, smollm2_path: Path, tmp_path: Path) -> None:
    """The whole model where values are rounded most, otherwise two layers; unrounded in `test_convert.py`."""
    config, params = smollm2.config, smollm2.params
    if dtype != "q8_0":
        config = config.replace(num_hidden_layers=2)
        params = {**params, "layers": jax.tree.map(lambda x: np.asarray(x)[:2], params["layers"])}
    vocabulary = export_vocabulary(smollm2.tokenizer, "gguf")
    source = write_and_open(ParamsTensors(config, params), tmp_path / "a.gguf", dtype, vocabulary)
    assert source.config == config
    loaded = lj.load(tmp_path / "a.gguf")
    errors = jax.tree.map(
        lambda a, b: float(np.abs(np.subtract(a, b)).max() / np.abs(b).max()), loaded.params, params
    )
    assert max(jax.tree.leaves(errors)) <= {"float16": 2**-11, "q8_0": 0.5 / 127 + 2**-10}[dtype]
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside with her friends."
    tokens = np.array([smollm2.tokenizer.encode(text)], np.int32)
    assert loaded.tokenizer.encode(text) == tokens[0].tolist()
    ours, theirs = (np.asarray(lj.forward(config, weights, tokens)) for weights in (loaded.params, params))
    np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))
