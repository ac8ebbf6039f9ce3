"""Runs the mutants: `python -m tests.mutants [NAME ...] [--jobs N] [--table FILE]`.

Each mutant is applied to a copy of the checkout, in which its tests then run until one fails. It is caught if
that test passes in an unchanged copy. Exit status 1 if a mutant survives.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.mutants.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
COPIED = ("llama_jax", "train", "tests", "benchmarks", "notebooks", "configs", "pyproject.toml", "README.md")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one mutant.

    Attributes:
      mutant: the mutant.
      caught_by: the first test that failed; empty if all passed, or if it fails without the fault too.
      seconds: how long its tests ran.
      output: the end of pytest's output.
    """

    mutant: Mutant
    caught_by: str
    seconds: float
    output: str


def copy_checkout(target: Path) -> None:
    """Copies what tests need, the link `llama_jax/train` as a link."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, target / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(source, target / name)


def run_tests(checkout: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Runs pytest in a checkout; returns its exit status and output."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    data = os.environ.get("LLAMA_JAX_TEST_DATA", str(ROOT.parent / "shared" / "data"))
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "LLAMA_JAX_TEST_DATA": data}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def try_mutant(mutant: Mutant, unchanged: Path) -> Outcome:
    """Runs the tests of a copy with the fault, then the one that failed in the unchanged copy."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder)
        copy_checkout(checkout)
        mutant.apply(checkout)
        status, output = run_tests(checkout, mutant.tests)
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    caught = failed[1] if status and failed else ""
    if caught:
        status, without = run_tests(unchanged, [caught])
        if status:
            caught, output = "", f"{caught} fails without the fault too:\n{without}"
    return Outcome(mutant, caught, time.perf_counter() - start, output[-2000:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants to run; all by default")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time (default: 2)")
    parser.add_argument("--table", type=Path, help="write a Markdown table of the outcomes here")
    args = parser.parse_intermixed_args()
    chosen = [mutant for mutant in MUTANTS if not args.names or mutant.name in args.names]
    if missing := set(args.names) - {mutant.name for mutant in MUTANTS}:
        print(f"error: there is no mutant {', '.join(sorted(missing))}", file=sys.stderr)
        return 2
    outcomes = []
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        copy_checkout(Path(folder))
        for outcome in pool.map(functools.partial(try_mutant, unchanged=Path(folder)), chosen):
            verdict = f"caught by {outcome.caught_by}" if outcome.caught_by else "SURVIVED"
            print(f"{outcome.mutant.name:<36}{outcome.seconds:5.0f} s  {verdict}", flush=True)
            if not outcome.caught_by:
                print(outcome.output)
            outcomes.append(outcome)
    survived = [outcome for outcome in outcomes if not outcome.caught_by]
    print(f"{len(outcomes) - len(survived)} of {len(outcomes)} mutants caught")
    if args.table:
        rows = [
            f"| {o.mutant.name} | `{o.mutant.path}` | {o.mutant.fault} | `{o.caught_by or 'survived'}` |"
            for o in outcomes
        ]
        args.table.write_text(
            "\n".join(["| mutant | file | fault | caught by |", "|---|---|---|---|", *rows, ""])
        )
    return int(bool(survived))


if __name__ == "__main__":
    sys.exit(main())
