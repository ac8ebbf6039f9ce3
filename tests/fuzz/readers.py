"""Fuzzing targets: each writes the fuzzer's bytes into a checkpoint on disk and reads all of it.

A target is a valid checkpoint in which the fuzzer's bytes replace one file. Reading it must either succeed
or raise one of llama_jax's own errors, with a one-line message.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import shutil
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file

import llama_jax as lj
from llama_jax import adapters
from llama_jax.adapters import bottleneck, lora, prefix
from llama_jax.errors import LlamaJaxError
from llama_jax.weights import open_source
from llama_jax.weights.adapters import load_adapter, load_head
from llama_jax.weights.derived import Head
from llama_jax.weights.names import STACKED
from llama_jax.weights.tensors import ParamsTensors, StoredTensors
from llama_jax.weights.write.adapters import save_adapter
from llama_jax.weights.write.gguf import plan_gguf
from llama_jax.weights.write.hf import plan_hf
from llama_jax.weights.write.llama2c import plan_llama2c
from llama_jax.weights.write.meta import plan_meta
from llama_jax.weights.write.orbax import plan_orbax
from llama_jax.weights.write.run import write
from llama_jax.weights.write.torch_zip import Layout, TensorSpec
from llama_jax.weights.write.vocabulary import Vocabulary
from tests.fuzz import training_data, vocabularies
from tests.golden.quantized import FOLDER as QUANTIZED
from tests.random_models import random_model
from tests.weights.writers import split_gguf

MAX_BYTES = 1 << 22  # larger tensors are not read: a header alone may claim any size

CONFIG = lj.LlamaConfig(
    vocab_size=16,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    max_position_embeddings=16,
    rms_norm_eps=1e-5,
)


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader, and the file that the fuzzer generates.

    Attributes:
      write: writes a valid checkpoint to a path.
      file: the file to replace, relative to the path; "" is the path itself.
      wrap: converts the fuzzer's bytes to the file, so that it need not guess a container's checksums.
      seed: converts a valid file to the fuzzer's bytes; the inverse of `wrap`.
      read: reads everything; None is `read_all`.
    """

    write: Callable[[Path], None]
    file: str
    wrap: Callable[[bytes], bytes] = bytes
    seed: Callable[[bytes], bytes] = bytes
    read: Callable[[Path], None] | None = None


def _write(path: Path, plan: Callable[..., object], *args: object, **options: object) -> None:
    tensors = ParamsTensors(*random_model(0, CONFIG))
    write(plan(tensors, *args, **options), tensors, path)


def _hf(path: Path, shard_bytes: int = 1 << 30) -> None:
    _write(path, plan_hf, None, Vocabulary(), shard_bytes=shard_bytes)


@functools.cache
def _zip_entries() -> dict[str, bytes]:
    """The entries of a valid torch zip, by name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        _write(path, plan_meta, None, Vocabulary())
        with zipfile.ZipFile(path / "consolidated.00.pth") as archive:
            return {name: archive.read(name) for name in archive.namelist()}


def _wrap_pickle(data: bytes) -> bytes:
    """A torch zip whose pickle is `data`."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, entry in _zip_entries().items():
            archive.writestr(name, data if name.endswith("data.pkl") else entry)
    return out.getvalue()


def _pickle_of(data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        return archive.read(name)


def _pickled(path: Path, stem: str, write: Callable[[Path], None]) -> None:
    """Replaces `stem`.safetensors of what `write` writes by torch's file of the same tensors, `stem`.bin."""
    write(path)
    state = load_file(path / f"{stem}.safetensors")
    (path / f"{stem}.safetensors").unlink()
    layout = Layout([TensorSpec(name, array.shape, "F32") for name, array in state.items()])
    content = bytearray(layout.size)
    arrays = [array.tobytes() for array in state.values()]
    tail = layout.finish([zlib.crc32(data) for data in arrays])
    for at, data in (*layout.fixed, *zip(layout.offsets, arrays, strict=True), *tail):
        content[at : at + len(data)] = data
    (path / f"{'pytorch_model' if stem == 'model' else stem}.bin").write_bytes(content)


def _split_gguf(path: Path) -> None:
    """A GGUF model in parts, of which the first holds the metadata."""
    whole = path.with_name("whole")
    _write(whole, plan_gguf, None, Vocabulary())
    split_gguf(whole, path, 6)
    whole.unlink()


def _adapter(path: Path, settings: adapters.Settings) -> None:
    """An adapter with a head."""
    adapter = adapters.init(settings, CONFIG, random_model(0, CONFIG)[1], jax.random.key(0))
    head = Head(np.zeros((2, CONFIG.hidden_size), np.float32), ("a", "b"))
    save_adapter(path, settings, adapter, CONFIG, head=head)


def _read_adapter(path: Path) -> None:
    settings, adapter = load_adapter(path)
    assert load_head(path) is not None or settings
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(adapter))


_LORA, _PREFIX, _BOTTLENECK = (
    functools.partial(_adapter, settings=settings)
    for settings in (lora.Lora(2, target_modules=("wq", "w_up")), prefix.Prefix(2), bottleneck.Bottleneck(2))
)
TARGETS = (
    {
        "lora-config": Target(_LORA, "adapter_config.json", read=_read_adapter),
        "lora-tensors": Target(_LORA, "adapter_model.safetensors", read=_read_adapter),
        "prefix-config": Target(_PREFIX, "adapter_config.json", read=_read_adapter),
        "prefix-tensors": Target(_PREFIX, "adapter_model.safetensors", read=_read_adapter),
        "bottleneck-config": Target(_BOTTLENECK, "adapter_config.json", read=_read_adapter),
        "bottleneck-tensors": Target(_BOTTLENECK, "adapter.safetensors", read=_read_adapter),
        "bottleneck-head": Target(_BOTTLENECK, "head_config.json", read=_read_adapter),
        "safetensors": Target(_hf, "model.safetensors"),
        "hf-config": Target(_hf, "config.json"),
        "hf-index": Target(functools.partial(_hf, shard_bytes=1000), "model.safetensors.index.json"),
        **{
            f"hf-{name}": Target(
                functools.partial(
                    shutil.copytree, QUANTIZED / name, ignore=shutil.ignore_patterns("expected*")
                ),
                "model.safetensors",
            )
            for name in ("nf4-nested", "gptq-4", "compressed-int4-zeros")
        },
        "hf-pickle": Target(functools.partial(_pickled, stem="model", write=_hf), "pytorch_model.bin"),
        "lora-pickle": Target(
            functools.partial(_pickled, stem="adapter_model", write=_LORA),
            "adapter_model.bin",
            read=_read_adapter,
        ),
        "gguf-part": Target(_split_gguf, "m-00002-of-00002.gguf"),
        "gguf": Target(lambda path: _write(path, plan_gguf, None, Vocabulary()), ""),
        "llama2c": Target(lambda path: _write(path, plan_llama2c, Vocabulary()), "model.bin"),
        "meta-zip": Target(lambda path: _write(path, plan_meta, None, Vocabulary()), "consolidated.00.pth"),
        "meta-pickle": Target(
            lambda path: _write(path, plan_meta, None, Vocabulary()),
            "consolidated.00.pth",
            _wrap_pickle,
            _pickle_of,
        ),
        "meta-params": Target(lambda path: _write(path, plan_meta, None, Vocabulary()), "params.json"),
        "orbax-metadata": Target(
            lambda path: _write(path, plan_orbax, None, Vocabulary()), "params/_METADATA"
        ),
        "orbax-manifest": Target(
            lambda path: _write(path, plan_orbax, None, Vocabulary()), "params/manifest.ocdbt"
        ),
    }
    | {
        name: Target(write, file, read=vocabularies.read)
        for name, (write, file) in vocabularies.WRITERS.items()
    }
    | {
        name: Target(write, file, read=functools.partial(training_data.read, files=files))
        for name, (write, file, files) in training_data.TARGETS.items()
    }
)


def write_checkpoint(name: str, folder: Path) -> Path:
    """Writes a valid checkpoint of a target to `folder`."""
    path = folder / "model"
    if path.exists():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    TARGETS[name].write(path)
    return path


def seed_of(name: str, path: Path) -> bytes:
    """Returns the fuzzer's bytes of a valid checkpoint."""
    return TARGETS[name].seed((path / TARGETS[name].file).read_bytes())


def try_read(name: str, path: Path, data: bytes) -> bool:
    """Writes the fuzzer's bytes into a checkpoint and reads it; returns whether it was readable.

    Raises:
      AssertionError: for a multi-line error message. Any other exception is a finding, too.
    """
    (path / TARGETS[name].file).write_bytes(TARGETS[name].wrap(data))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (TARGETS[name].read or read_all)(path)
    except LlamaJaxError as error:
        assert "\n" not in str(error), error  # noqa: PT017
        return False
    return True


def read_all(path: Path) -> None:
    """Opens a checkpoint, reads every tensor, and validates them against the configuration."""
    source = open_source(path)
    for name, info in source.tensors.items():
        if math.prod(info.shape) * 4 <= MAX_BYTES and source.format not in STACKED:
            array = source.read(name)
            assert array.shape == info.shape
            assert array.dtype.kind == "f" or array.dtype.name == "bfloat16"
    tensors = StoredTensors(source)
    if source.config == CONFIG and source.format in STACKED:
        from llama_jax.weights import load_params

        np.asarray(load_params(source)["final_norm"]["scale"])
    del tensors
