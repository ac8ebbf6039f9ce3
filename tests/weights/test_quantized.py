"""Quantized Hugging Face checkpoints have the values that the packages that wrote them compute."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_jax as lj
from llama_jax.errors import CheckpointError
from llama_jax.weights.dequantize import unpack_words
from llama_jax.weights.open import open_source
from llama_jax.weights.quantized import read_part
from llama_jax.weights.safetensors import read_safetensors_header
from llama_jax.weights.source import FLOAT_DTYPES, PART_DTYPES
from llama_jax.weights.tensors import StoredTensors
from tests.golden.quantized import FOLDER

NAMES = sorted(path.name for path in FOLDER.iterdir())
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_the_reference_packages(name: str) -> None:
    source = open_source(FOLDER / name)
    StoredTensors(source)  # the tensors are those of the configuration
    expected = json.loads((FOLDER / name / "expected.json").read_text())
    assert len(expected) == 7
    for tensor, digest in expected.items():
        array = source.read(tensor)
        assert array.dtype == np.float32 and array.flags.c_contiguous
        assert hashlib.sha256(array.tobytes()).hexdigest() == digest, tensor


def test_codes_of_every_width() -> None:
    random = np.random.default_rng(0)
    for bits in range(1, 9):
        codes = random.integers(0, 1 << bits, (3, 64), np.uint8)
        stream = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1  # bit 0 of a code first
        words = np.packbits(stream.reshape(3, -1), axis=1, bitorder="little").view("<i4")
        np.testing.assert_array_equal(unpack_words(words, bits, 64), codes)
        np.testing.assert_array_equal(unpack_words(words, bits, 61), codes[:, :61])


def test_a_quantized_model_is_loaded_run_and_converted(tmp_path: Path) -> None:
    config, params = lj.load_params(FOLDER / "nf4")
    wq = np.asarray(params["layers"]["attention"]["wq"][0])
    stored = open_source(FOLDER / "nf4").read(LAYER + ".weight")
    np.testing.assert_array_equal(wq.reshape(64, 64).astype(np.float32), stored.T)
    lj.save(config, params, tmp_path / "plain")
    np.testing.assert_array_equal(open_source(tmp_path / "plain").read(LAYER + ".weight"), stored)


def save(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """safetensors' own writer has no floats of 8 bits in numpy."""
    names = {dtype: name for name, dtype in {**FLOAT_DTYPES, **PART_DTYPES}.items()}
    header, data = {}, b""
    for key, array in tensors.items():
        span = [len(data), len(data) + array.nbytes]
        header[key] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": span}
        data += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def changed(tmp_path: Path, name: str, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """A copy of a golden whose tensors and quantization_config `change` has changed."""
    folder = Path(shutil.copytree(FOLDER / name, tmp_path / name))
    path, fields = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    tensors = {key: read_part(key, info) for key, info in read_safetensors_header(path).items()}
    change(tensors, fields["quantization_config"])
    save(path, tensors)
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def replaced(suffix: str, value: Callable[[np.ndarray], np.ndarray] | None) -> Callable[..., None]:
    def change(tensors: dict[str, Any], _: dict[str, Any]) -> None:
        array = tensors.pop(LAYER + suffix)
        if value is not None:
            tensors[LAYER + suffix] = value(array)

    return change


def state(**fields: Any) -> Callable[[np.ndarray], np.ndarray]:
    def value(array: np.ndarray) -> np.ndarray:
        text = json.dumps(json.loads(array.tobytes()) | fields)
        return np.frombuffer(text.encode(), np.uint8)

    return value


NF4_STATE = ".weight.quant_state.bitsandbytes__nf4"
BAD: dict[str, tuple[str, Callable[..., None], str]] = {
    "method": (
        "awq",
        lambda _, s: s.update(quant_method="quip"),
        "has the method 'quip'; bitsandbytes, gptq,",
    ),
    "no method": ("awq", lambda _, s: s.update(quant_method=None), "missing tensors"),
    "awq layout": ("awq", lambda _, s: s.update(version="gemv"), "the 4-bit gemm layout is read"),
    "gptq layout": ("gptq-4", lambda _, s: s.update(checkpoint_format="marlin"), "gptq and gptq_v2 are read"),
    "gptq bits": ("gptq-4", lambda _, s: s.update(bits=1), "has bits '1'; 2 to 8 are read"),
    "other bits": ("gptq-4", lambda _, s: s.update(bits=8), "wrong shapes"),
    "no scales": ("gptq-4", replaced(".scales", None), "a part of a quantized matrix, is missing"),
    "fewer zeros": ("gptq-4", replaced(".qzeros", lambda a: a[:, :1]), "do not fit each other"),
    "group": ("gptq-4", replaced(".g_idx", lambda a: a + 9), "g_idx has not the groups 0 to 1 of 64 inputs"),
    "negative group": ("gptq-4", replaced(".g_idx", lambda a: a - 1), "g_idx has not the groups"),
    "awq scales": ("awq", replaced(".scales", lambda a: a[:1].repeat(3, 0)), "do not fit each other"),
    "nf4 blocks": ("nf4", replaced(NF4_STATE, state(blocksize=0)), "is not that of a 4-bit matrix"),
    "nf4 shape": ("nf4", replaced(NF4_STATE, state(shape=[64, 65])), "wrong shapes"),
    "nf4 dtype": ("nf4", replaced(NF4_STATE, state(dtype="int8")), "is not that of a 4-bit matrix"),
    "nf4 offset": ("nf4-nested", replaced(NF4_STATE, state(nested_offset=None)), "is not that of a 4-bit"),
    "nf4 JSON": ("nf4", replaced(NF4_STATE, lambda a: a[:-1]), "config|JSON|not valid"),
    "nf4 absmax": ("nf4", replaced(".weight.absmax", lambda a: a[:3]), "do not fit each other"),
    "fp8 scales": ("fp8", replaced(".weight_scale_inv", lambda a: np.ones((3, 3), "f4")), "do not divide"),
    "fp8 without": ("fp8", replaced(".weight_scale_inv", None), "a part of a quantized matrix, is missing"),
    "packed bits": ("compressed-int4", lambda _, s: s.update(config_groups={}), "schemes of no bits"),
    "packed shape": (
        "compressed-int4",
        replaced(".weight_shape", lambda a: np.array([64, 1 << 40])),
        "has the weight_shape",
    ),
    "packed dtype": (
        "compressed-int4",
        replaced(".weight_packed", lambda a: a.view("u1")),
        "packed I32 words",
    ),
}


def read(folder: Path) -> np.ndarray:
    source = open_source(folder)
    StoredTensors(source)
    return source.read(LAYER + ".weight")


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_one_line(case: str, tmp_path: Path) -> None:
    name, change, said = BAD[case]
    folder = changed(tmp_path, name, change)
    with pytest.raises(CheckpointError, match=said) as caught:
        read(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_a_scale_of_a_whole_tensor_and_none(tmp_path: Path) -> None:
    codes = open_source(FOLDER / "fp8")
    whole = changed(tmp_path, "fp8", replaced(".weight_scale_inv", lambda _: np.float32(2)))
    assert codes.tensors[LAYER + ".weight"].dtype == "FP8"
    values = open_source(whole).read(LAYER + ".weight") / 2
    path = FOLDER / "fp8" / "model.safetensors"
    raw = read_part("raw", read_safetensors_header(path)[LAYER + ".weight"])
    np.testing.assert_array_equal(values, raw.astype(np.float32))


def test_integers_that_a_llama_does_not_have_are_ignored(tmp_path: Path) -> None:
    def add(tensors: dict[str, Any], _: dict[str, Any]) -> None:
        tensors["model.position_ids"] = np.arange(64)

    with pytest.warns(UserWarning, match="ignored, as by transformers: 'model.position_ids'"):
        StoredTensors(open_source(changed(tmp_path, "nf4", add)))


def test_integers_where_floats_belong(tmp_path: Path) -> None:
    def change(tensors: dict[str, Any], _: dict[str, Any]) -> None:
        tensors["model.norm.weight"] = np.ones(64, np.int32)

    with pytest.raises(CheckpointError, match=r"'model.norm.weight' has dtype 'I32', which no parameter has"):
        lj.load_params(changed(tmp_path, "nf4", change))
