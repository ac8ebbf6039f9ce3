"""Memory and speed of converting a synthetic Llama 2 7B: `python -m benchmarks.convert_7b [--json]`.

Creates a 13.5 GB bf16 checkpoint of random values in three files, converts it to each format in a fresh
process, and deletes everything. The same run measures the disk's speed by copying and syncing the same files.
Files are dropped from the page cache before they are read.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import llama_jax as lj
from benchmarks.load import peak_bytes
from llama_jax.text.convert import convert
from llama_jax.tokenizer.sentencepiece_model import CONTROL, NORMAL, SPACE, UNKNOWN, Piece, build_model
from llama_jax.weights.names import Leaf
from llama_jax.weights.write.hf import plan_hf
from llama_jax.weights.write.run import write
from llama_jax.weights.write.vocabulary import Vocabulary

# Arguments of each conversion, besides source and target.
CONVERSIONS: dict[str, dict[str, Any]] = {
    "hf": {},
    "meta": {"format": "meta"},
    "meta, 8 parts": {"format": "meta", "shards": 8},
    "gguf": {"format": "gguf"},
    "gguf q8_0": {"format": "gguf", "dtype": "q8_0"},
    "orbax": {"format": "orbax"},
    "hf, 8 key/value heads": {"kv_heads": 8},
}


class Noise:
    """Random bf16 values of the magnitude of weights, the same for every tensor."""

    stacked = False

    def __init__(self, config: lj.LlamaConfig) -> None:
        self.config = config
        # Random sign and mantissa, with exponents for magnitudes from 0.008 to 0.03.
        bits = np.random.default_rng(0).integers(
            0, 1 << 16, config.vocab_size * config.hidden_size, np.uint16
        )
        self.noise = (bits & 0x80FF | 0x3C00).view(jnp.bfloat16)

    def dtype(self, leaf: Leaf, layer: int | None) -> np.dtype[Any]:
        return self.noise.dtype

    def read(self, leaf: Leaf, layer: int | None) -> np.ndarray:
        shape = leaf.stored_shape(self.config, "hf")
        return self.noise[: int(np.prod(shape))].reshape(shape)


def write_checkpoint(folder: Path, config: lj.LlamaConfig) -> None:
    """Writes the checkpoint, with a vocabulary of the right size."""
    special = [Piece("<unk>", 0.0, UNKNOWN), Piece("<s>", 0.0, CONTROL), Piece("</s>", 0.0, CONTROL)]
    words = [Piece(f"{SPACE}{number}", -float(number), NORMAL) for number in range(config.vocab_size - 3)]
    model = build_model([*special, *words], "the benchmark's vocabulary").serialized_model_proto()
    noise = Noise(config)
    vocabulary = Vocabulary(files={"tokenizer.model": model}, bos_id=1, eos_ids=(2,))
    write(plan_hf(noise, None, vocabulary), noise, folder)


def files_of(path: Path) -> Iterator[Path]:
    yield from [path] if path.is_file() else (inner for inner in path.rglob("*") if inner.is_file())


def drop_from_page_cache(path: Path) -> None:
    """Drops files from the page cache, as before a first conversion."""
    for file in files_of(path):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_of(path: Path) -> int:
    return sum(file.stat().st_size for file in files_of(path))


def copy(source: Path, target: Path) -> float:
    """Seconds to copy a checkpoint and sync it to disk."""
    drop_from_page_cache(source)
    start = time.perf_counter()
    shutil.copytree(source, target)
    for file in files_of(target):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def convert_here(source: Path, target: Path, name: str) -> None:
    """In a fresh process: converts, and prints seconds and memory."""
    start = time.perf_counter()
    convert(source, target, **CONVERSIONS[name])
    print(json.dumps({"seconds": time.perf_counter() - start, "peak_bytes": peak_bytes()}))


def measure(folder: Path, only: str, layers: int) -> dict[str, Any]:
    config = lj.presets.LLAMA2_7B.replace(num_hidden_layers=layers)
    source, target = folder / "source", folder / "target"
    write_checkpoint(source, config)
    size = bytes_of(source)
    seconds = copy(source, target)
    largest = config.vocab_size * config.hidden_size * 2
    report: dict[str, Any] = {
        "bytes": size,
        "largest_tensor_bytes": largest,
        "copy_bytes_per_second": size / seconds,
        "conversions": [],
    }
    for name in CONVERSIONS:
        if only not in name:
            continue
        drop_from_page_cache(source)
        command = [sys.executable, "-m", "benchmarks.convert_7b", "--here", name, str(source), str(target)]
        result = json.loads(subprocess.check_output(command, text=True))
        moved = (size + bytes_of(target)) / 2  # mean of bytes read and written
        report["conversions"].append(
            {
                "to": name,
                **result,
                "bytes_per_second": moved / result["seconds"],
                "of_copy": moved / result["seconds"] / report["copy_bytes_per_second"],
                "beside_largest_bytes": result["peak_bytes"] - largest,
            }
        )
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and speed of converting a synthetic Llama 2 7B.")
    parser.add_argument(
        "--folder", type=Path, help="folder for 27 GB of temporary files (default: the system's)"
    )
    parser.add_argument("--only", default="", help="only conversions whose name contains this")
    parser.add_argument("--layers", type=int, default=32, help="number of layers (default: 32)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--here", nargs=3, help=argparse.SUPPRESS)  # for the fresh processes
    args = parser.parse_args()
    if args.here:
        name, source, target = args.here
        convert_here(Path(source), Path(target), name)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        report = measure(Path(folder), args.only, args.layers)
    if args.json:
        print(json.dumps(report))
        return
    table = Table(title=f"{report['bytes'] / 1e9:.1f} GB in bf16, from Hugging Face's format")
    for column in (
        "to",
        "seconds",
        "MB/s",
        "relative to a copy",
        "peak memory",
        "peak minus the largest tensor",
    ):
        table.add_column(column, justify="left" if column == "to" else "right")
    for row in report["conversions"]:
        speed, part = f"{row['bytes_per_second'] / 1e6:.0f}", f"{row['of_copy']:.2f}"
        memory = f"{row['peak_bytes'] / 1e6:.0f} MB", f"{row['beside_largest_bytes'] / 1e6:.0f} MB"
        table.add_row(row["to"], f"{row['seconds']:.1f}", speed, part, *memory)
    Console().print(table, f"the disk copies {report['copy_bytes_per_second'] / 1e6:.0f} MB/s")


if __name__ == "__main__":
    main()
