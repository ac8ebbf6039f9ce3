"""Meta's checkpoints: 1, 2 and 8 shards written by torch, and shards that do not match."""

from __future__ import annotations

import json
import re
import shutil
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_jax.errors import CheckpointError
from llama_jax.weights import load_params
from llama_jax.weights.meta import MetaSource, is_meta, open_meta
from llama_jax.weights.source import FLOAT_DTYPES
from llama_jax.weights.write.torch_zip import Layout, TensorSpec
from tests.golden import meta
from tests.weights.test_load import assert_same, one_line
from tests.weights.writers import random_params


def write_parts(folder: Path, parts: list[dict[str, np.ndarray]], params: dict[str, Any]) -> Path:
    """A Meta directory in f32."""
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    for number, part in enumerate(parts):
        write_part(folder / f"consolidated.{number:02}.pth", part)
    return folder


def write_part(path: Path, part: dict[str, np.ndarray]) -> None:
    arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in part.items()}
    layout = Layout([TensorSpec(name, array.shape, "F32") for name, array in arrays.items()])
    checksums = [zlib.crc32(array.tobytes()) for array in arrays.values()]
    with path.open("wb") as file:
        for array, offset in zip(arrays.values(), layout.offsets, strict=True):
            file.seek(offset)
            file.write(array.tobytes())
        for offset, data in [*layout.fixed, *layout.finish(checksums)]:
            file.seek(offset)
            file.write(data)


def message(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_params(open_meta(path, "test"))
    assert str(path) in str(caught.value)
    return one_line(caught)


@pytest.fixture
def golden(tmp_path: Path) -> Callable[[int], Path]:
    """Copies of the golden checkpoints that a test may modify."""
    return lambda parts: Path(shutil.copytree(meta.folder(parts), tmp_path / f"meta-{parts}"))


# Shards written by torch.


@pytest.mark.parametrize("parts", meta.CONFIGS)
def test_shards_written_by_torch(parts: int) -> None:
    source = open_meta(meta.folder(parts), "test")
    config = meta.CONFIGS[parts]
    assert source.config == config and source.metadata == {"parts": parts}
    dtype = {"float16": "F16", "bfloat16": "BF16"}[meta.DTYPES[parts]]
    assert {info.dtype for info in source.tensors.values()} == {dtype}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(load_params(source), random_params(config))
    assert source.tensors["layers.0.attention.wo.weight"].shape == (32, 32)
    assert source.read("layers.0.attention.wo.weight").dtype == FLOAT_DTYPES[dtype]


@pytest.mark.parametrize("parts", meta.CONFIGS)
def test_any_shard_opens_the_model(parts: int) -> None:
    folder = meta.folder(parts)
    last = folder / f"consolidated.{parts - 1:02}.pth"
    assert is_meta(folder) and is_meta(last)
    assert not is_meta(folder.parent) and not is_meta(folder / "params.json")
    source = open_meta(last, "test")
    assert source.path == last
    assert_same(load_params(source), random_params(meta.CONFIGS[parts]))


@pytest.mark.parametrize("llama3", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_embedding_sharded_by_columns_or_rows(parts: int, llama3: bool, tmp_path: Path) -> None:
    config = meta.LLAMA2.replace(num_hidden_layers=3, vocab_size=24)
    params = random_params(config)
    pieces = meta.split(config, params, parts, llama3=llama3)
    folder = write_parts(tmp_path / "m", pieces, meta.PARAMS[1] | {"n_layers": 3})
    source = open_meta(folder, "test")
    assert source.config == config
    assert_same(load_params(source), params)


def test_replicated_kv_heads_are_read_once(tmp_path: Path) -> None:
    """Llama 3.1 405B's checkpoint in 16 shards stores each of its 8 key and value heads twice."""
    config = meta.LLAMA2.replace(num_key_value_heads=2)
    params = random_params(config)
    pieces = meta.split(config, params, 2)
    halves = meta.split(config, params, 4)
    for number, part in enumerate(halves):
        for name in ("wk", "wv"):
            key = f"layers.0.attention.{name}.weight"
            part[key] = pieces[number // 2][key]
    folder = write_parts(tmp_path / "m", halves, meta.PARAMS[1] | {"n_kv_heads": 2})
    assert_same(load_params(open_meta(folder, "test")), params)
    # With n_kv_heads = 4 the replicas are separate heads.
    (folder / "params.json").write_text(json.dumps(meta.PARAMS[1] | {"n_kv_heads": 4}))
    four = load_params(open_meta(folder, "test"))["layers"]["attention"]["wk"]
    np.testing.assert_array_equal(four, np.repeat(params["layers"]["attention"]["wk"], 2, axis=2))


@pytest.mark.parametrize("llama3", [False, True])
def test_peak_memory_is_a_tensor_and_a_shard(llama3: bool, tmp_path: Path) -> None:
    config = meta.LLAMA2.replace(vocab_size=1 << 16)
    folder = write_parts(
        tmp_path / "m", meta.split(config, random_params(config), 8, llama3=llama3), meta.PARAMS[1]
    )
    source = open_meta(folder, "test")
    tracemalloc.start()
    array = source.read("tok_embeddings.weight")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert array.nbytes == 1 << 23
    assert peak < 1.2 * array.nbytes


# Shards that do not match.


def test_missing_shards(golden: Callable[[int], Path]) -> None:
    folder = golden(8)
    (folder / "consolidated.07.pth").unlink()
    assert "has 7 of the 8 shards of the model; download all" in message(folder)
    (folder / "consolidated.03.pth").unlink()
    assert "missing shards: consolidated.03.pth; download" in message(folder)
    two = golden(2)
    (two / "consolidated.01.pth").unlink()
    assert "has 1 of the 2 shards" in message(two)
    assert not is_meta(two / "x")


def test_shards_of_different_models(golden: Callable[[int], Path]) -> None:
    folder = golden(8)
    shutil.copy(meta.folder(2) / "consolidated.00.pth", folder / "consolidated.03.pth")
    assert re.search(r"03\.pth: differs from the first shard in '.* and \d more", message(folder))
    other = folder / "consolidated.03.pth"
    part = meta.split(meta.LLAMA3, random_params(meta.LLAMA3), 8, llama3=True)[3]
    write_part(other, part)  # f32, the other shards are bf16
    assert "03.pth: differs from the first shard in" in message(folder)
    del part["norm.weight"]
    write_part(other, part)
    assert "'norm.weight'" in message(folder)


def test_differing_replicas_are_read_with_a_warning(tmp_path: Path) -> None:
    pieces = meta.split(meta.LLAMA2, random_params(meta.LLAMA2), 2)
    pieces[1] = pieces[1] | {"norm.weight": pieces[1]["norm.weight"] + 1}
    folder = write_parts(tmp_path / "m", pieces, meta.PARAMS[2])
    with pytest.warns(UserWarning, match=r"01\.pth: its replicated tensors differ .* again$") as caught:
        params = load_params(open_meta(folder, "test"))
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    np.testing.assert_array_equal(params["final_norm"]["scale"], pieces[0]["norm.weight"])


def test_incomplete_directories(golden: Callable[[int], Path], tmp_path: Path) -> None:
    folder = golden(2)
    (folder / "params.json").unlink()
    assert "there is no params.json beside it" in message(folder)
    part = meta.split(meta.LLAMA2, random_params(meta.LLAMA2), 1)[0]
    for lost in ("output.weight", "layers.0.attention.wq.weight"):
        left = {name: array for name, array in part.items() if name != lost}
        assert f"there is no matrix '{lost}'" in message(write_parts(tmp_path / lost, [left], meta.PARAMS[1]))
    left = {name: array for name, array in part.items() if "w2" not in name}
    assert "missing tensors: layers.0.feed_forward.w2" in message(
        write_parts(tmp_path / "w2", [left], meta.PARAMS[1])
    )
    more = part | {"layers.0.attention.bias": np.zeros(3)}
    assert "unexpected tensors: 'layers.0.attention.bias'" in message(
        write_parts(tmp_path / "bias", [more], meta.PARAMS[1])
    )
    with pytest.raises(CheckpointError, match="there is no tensor 'x'"):
        open_meta(meta.folder(1), "test").read("x")


def test_truncation_after_opening(golden: Callable[[int], Path]) -> None:
    folder = golden(2)
    source = open_meta(folder, "test")
    (folder / "consolidated.01.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match="the file changed while it was read"):
        source.read("output.weight")


def test_hostile_shards(golden: Callable[[int], Path]) -> None:
    folder = golden(1)
    path = folder / "consolidated.00.pth"
    path.write_bytes(b"\x80\x02cos\nsystem\n.")
    assert f"{path}: a PyTorch file older than" in message(folder)
    path.unlink()
    path.symlink_to(folder)
    assert "not a regular file" in message(folder)


# The tokenizer's directory, and llama_jax.json.


def test_tokenizer_dir(golden: Callable[[int], Path]) -> None:
    folder = golden(1)
    assert open_meta(folder, "test").tokenizer_dir == folder
    (folder.parent / "tokenizer.model").touch()
    assert open_meta(folder, "test").tokenizer_dir == folder.parent
    (folder / "tokenizer.json").touch()
    assert open_meta(folder, "test").tokenizer_dir == folder
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    assert open_meta(folder, "test").tokenizer_dir == folder


def tied_directory(
    folder: Path, parts: int, output: np.ndarray | None = None
) -> tuple[MetaSource, dict[str, Any]]:
    config = meta.LLAMA2.replace(tie_word_embeddings=True)
    params = random_params(config)
    kernel = params["embed"]["embedding"].T if output is None else output
    pieces = meta.split(config, params | {"lm_head": {"kernel": kernel}}, parts)
    write_parts(folder, pieces, meta.PARAMS[1])
    (folder / "llama_jax.json").write_text('{"tie_word_embeddings": true}')
    return open_meta(folder, "test"), params


@pytest.mark.parametrize("parts", [1, 4])
def test_tied_output_of_its_own_is_used_though_our_note_ties_it(
    parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_jax.weights.meta._CHUNK_ROWS", 3)
    source, params = tied_directory(tmp_path / "m", parts)
    assert source.config.tie_word_embeddings
    assert_same(load_params(source), params)
    (tmp_path / "m" / "llama_jax.json").unlink()
    untied = load_params(open_meta(tmp_path / "m", "test"))
    np.testing.assert_array_equal(untied["lm_head"]["kernel"].T, params["embed"]["embedding"])
    other = params["embed"]["embedding"].T.copy()
    other[-1, -1] += 1
    source, _ = tied_directory(tmp_path / "other", parts, other)
    assert not source.config.tie_word_embeddings
    np.testing.assert_array_equal(load_params(source)["lm_head"]["kernel"], other)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"tie_word_embeddings": 1}', "tie_word_embeddings is '1'"),
        ('{"max_position_embeddings": 0}', "max_position_embeddings is '0'"),
        ("{", "not valid JSON"),
    ],
)
def test_invalid_extra_file(text: str, expected: str, golden: Callable[[int], Path]) -> None:
    folder = golden(1)
    (folder / "llama_jax.json").write_text(text)
    problem = message(folder)
    assert expected in problem and "llama_jax.json" in problem
