"""Runs a coverage-guided fuzzer on one reader: `python -m tests.fuzz TARGET [--minutes M]`.

Needs `pip install atheris`. What it finds is put, one file a finding, in the folder it names; after the fix
the file goes to tests/fuzz/cases/TARGET-*, where a test reads it for ever.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["llama_jax.weights", "llama_jax.config", "gguf.quants"]):
    import llama_jax.config
    import llama_jax.weights
    import llama_jax.weights.meta  # noqa: F401

from tests.fuzz.readers import TARGETS, attempt, checkpoint, seed_of


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzzes one reader.")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    args = parser.parse_args()
    args.findings.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    path = checkpoint(args.target, folder)
    seeds = folder / "seeds"
    seeds.mkdir()
    (seeds / "valid").write_bytes(seed_of(args.target, path))
    count = [0, 0]

    def one(data: bytes) -> None:
        count[0] += 1
        count[1] += attempt(args.target, path, data)
        if count[0] % 20_000 == 0:
            print(f"{args.target}: {count[0]} inputs, {count[1]} read", file=sys.stderr, flush=True)

    options = [
        f"-max_total_time={round(args.minutes * 60)}",
        f"-artifact_prefix={args.findings}/{args.target}-",
        "-timeout=10",
        "-rss_limit_mb=4096",
        "-max_len=65536",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(seeds)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
