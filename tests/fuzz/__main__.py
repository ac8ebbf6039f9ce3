"""Runs a coverage-guided fuzzer on one reader: `python -m tests.fuzz TARGET [--minutes M]`.

Needs `pip install atheris`. Each finding is written as one file to the `--findings` directory. After the fix,
add the file as tests/fuzz/cases/TARGET-*: it becomes a regression test.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=[
        "llama_jax.weights",
        "llama_jax.config",
        "llama_jax.tokenizer",
        "llama_jax.train.data",
        "gguf.quants",
    ]
):
    import llama_jax.config
    import llama_jax.tokenizer
    import llama_jax.train.data.source
    import llama_jax.weights
    import llama_jax.weights.meta  # noqa: F401

from tests.fuzz.readers import TARGETS, seed_of, try_read, write_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzzes one reader.")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    args = parser.parse_args()
    args.findings.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    path = write_checkpoint(args.target, folder)
    seeds = folder / "seeds"
    seeds.mkdir()
    (seeds / "valid").write_bytes(seed_of(args.target, path))
    counts = [0, 0]

    def run_input(data: bytes) -> None:
        counts[0] += 1
        counts[1] += try_read(args.target, path, data)
        if counts[0] % 20_000 == 0:
            print(f"{args.target}: {counts[0]} inputs, {counts[1]} readable", file=sys.stderr, flush=True)

    options = [
        f"-max_total_time={round(args.minutes * 60)}",
        f"-artifact_prefix={args.findings}/{args.target}-",
        "-timeout=10",
        "-rss_limit_mb=4096",
        "-max_len=65536",
        "-len_control=0",  # short inputs first would be refused, all of them, for a format with a footer
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(seeds)], run_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
