"""From a start to the first batch, by the size of the corpus: `python -m benchmarks.data_start [--json]`.

`records`: a file of a million lines, listed many times (hard links), with an index that is written directly.
`bytes`: 50 GB that are one file, linked 100 times, indexed as a first start does, and then opened by four
processes at the same time. Each start is a process of its own. Its seconds begin after the imports; its
memory is its own (anonymous), beside pages of the index that the system may drop.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

LINES = 1_000_000  # of the file that is linked
MILLIONS = (10, 100)
CORPUS_BYTES, FILE_BYTES = 50 * 10**9, 500 * 10**6
PROCESSES = 4
SEQ_LEN, BATCH = 1024, 64


def write_lines(path: Path, count: int, length: int) -> None:
    """Writes different records of about `length` bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "the quick brown fox jumps over a lazy dog " * (length // 42 + 1)
    with path.open("w") as out:
        for start in range(0, count, 10_000):
            out.write(
                "".join(f'{{"text": "{i} {text[: length - 20]}"}}\n' for i in range(start, start + 10_000))
            )


def link(path: Path, times: int) -> None:
    """Lists a file so many times."""
    for i in range(1, times):
        os.link(path, path.with_name(f"{i:04}.jsonl"))


def write_index(folder: Path) -> float:
    """Writes the index of a folder of links to one file; returns its bytes per million records."""
    from llama_jax.train.config.data import SourceConfig
    from llama_jax.train.data.files import find_files, sampled_digest
    from llama_jax.train.data.index import VERSION, IndexWriter
    from llama_jax.train.data.stored_index import index_paths

    (files,) = find_files(SourceConfig(f"{folder}/*.jsonl"))
    content = np.frombuffer(Path(files[0].path).read_bytes(), np.uint8)
    ends = np.flatnonzero(content == 10) + 1
    lengths, sample = np.diff(ends, prepend=0), sampled_digest(files[0])
    _, (path, _) = index_paths(files, VERSION, "jsonl")
    path.parent.mkdir()
    with path.open("wb") as out:
        writer = IndexWriter(out, path.parent)
        for file in files:
            writer.add_file(
                [(lengths, np.zeros(len(lengths), bool))],
                size=file.size,
                mtime_ns=file.mtime_ns,
                read=file.size,
                digest=bytes(16),
                sample=sample,
                copy=bytes(16),
            )
        writer.close()
    return path.stat().st_size / (len(files) * len(lengths) / 1e6)


def start(files: str, folder: str) -> dict[str, Any]:
    """Opens data and takes the first batch, in this process."""
    from llama_jax.tokenizer import load_tokenizer
    from llama_jax.train.data import DataConfig, open_data

    tokenizer = load_tokenizer(Path(folder) / "tok.bin")
    before, begin = _memory(), time.perf_counter()
    data = open_data(DataConfig(files=files), tokenizer, seq_len=SEQ_LEN, batch_size=BATCH, seed=0)
    opened = time.perf_counter() - begin
    opened_memory = _memory()
    batches = data.train()
    next(batches)
    first = time.perf_counter() - begin
    result = {
        "records": data.records,
        "open_seconds": opened,
        "first_batch_seconds": first,
        "opening_mb": round((opened_memory["RssAnon"] - before["RssAnon"]) / 1e3, 1),
        "own_mb": round(_memory()["RssAnon"] / 1e3, 1),
        "peak_mb": round(_memory()["VmHWM"] / 1e3, 1),
    }
    batches.close()
    return result


def _memory() -> dict[str, int]:
    """The process's memory in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        name: int(value.split()[0])
        for name, _, value in (line.partition(":") for line in lines)
        if "kB" in value
    }


def starts(files: str, folder: Path, processes: int = 1) -> list[dict[str, Any]]:
    """Starts processes at the same time."""
    environment = {**os.environ, "LLAMA_JAX_CACHE": str(folder / "cache"), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "benchmarks.data_start", "--start", files, "--folder", str(folder)]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    done = [process.communicate() for process in running]
    if failed := [err for process, (_, err) in zip(running, done, strict=True) if process.returncode]:
        raise RuntimeError(failed[0])
    return [json.loads(out) for out, _ in done]


def by_records(folder: Path, millions: list[int]) -> list[dict[str, Any]]:
    rows = []
    for million in millions:
        corpus = folder / f"{million}M"
        write_lines(corpus / "0000.jsonl", LINES, 40)
        link(corpus / "0000.jsonl", million * 10**6 // LINES)
        per_million = write_index(corpus)
        for split in ("made", "kept"):  # the list of validation records, once on each host
            (row,) = starts(f"{corpus}/*.jsonl", folder)
            rows.append({"split": split, **row, "index_bytes_per_million_records": per_million})
            print(rows[-1], file=sys.stderr, flush=True)
        shutil.rmtree(corpus)
    return rows


def by_bytes(folder: Path, total: int) -> dict[str, Any]:
    corpus = folder / "bytes"
    write_lines(corpus / "0000.jsonl", FILE_BYTES // 1000, 1000)
    link(corpus / "0000.jsonl", total // FILE_BYTES)
    nbytes = sum(path.stat().st_size for path in corpus.glob("*.jsonl"))
    (first,) = starts(f"{corpus}/*.jsonl", folder)
    later = starts(f"{corpus}/*.jsonl", folder, PROCESSES)
    shutil.rmtree(corpus)
    return {
        "bytes": nbytes,
        "first": first,
        "first_mb_per_second": nbytes / 1e6 / first["open_seconds"],
        "later": later,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--millions", type=int, nargs="*", default=list(MILLIONS), help="records, in millions"
    )
    parser.add_argument("--bytes", type=int, default=CORPUS_BYTES, help="of the corpus; 0 leaves it out")
    parser.add_argument("--folder", help="where to write; a temporary folder by default")
    parser.add_argument("--start", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start:
        print(json.dumps(start(args.start, args.folder)))
        return
    from tests.tiny import PIECES, write_vocabulary

    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        write_vocabulary(folder / "tok.bin", PIECES)
        report = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": subprocess.run(
                ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
            ).stdout.strip(),
            "machine": {"cpus": len(os.sched_getaffinity(0)), "platform": platform.platform()},
            "load_average": os.getloadavg(),
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "grain", "numpy")},
            "config": {"seq_len": SEQ_LEN, "batch_size": BATCH, "file": "JSON Lines, hard links"},
            "records": by_records(folder, args.millions),
            "bytes": by_bytes(folder, args.bytes) if args.bytes else None,
        }
    if args.json:
        print(json.dumps(report, indent=1))
        return
    print("| records | split | open, s | first batch, s | MB for opening | MB in all | index: MB a million |")
    print("|---|---|---|---|---|---|---|")
    for row in report["records"]:  # type: ignore[attr-defined]
        print(
            f"| {row['records'] / 1e6:.0f}M | {row['split']} | {row['open_seconds']:.2f} | "
            f"{row['first_batch_seconds']:.2f} | {row['opening_mb']} | {row['own_mb']} | "
            f"{row['index_bytes_per_million_records'] / 1e6:.2f} |"
        )
    if args.bytes:
        found: Any = report["bytes"]
        later = ", ".join(f"{row['open_seconds']:.2f}" for row in found["later"])
        print(
            f"\n{found['bytes'] / 1e9:.0f} GB: indexed at {found['first_mb_per_second']:.0f} MB/s; then "
            f"opened by {PROCESSES} processes in {later} s"
        )


if __name__ == "__main__":
    main()
