"""Fingerprints of the compiled programs: has a refactoring changed one?

`python -m benchmarks.program_fingerprint [--renew] [NAME ...]` compiles the programs of `programs.py`, all
that can be compiled here where none is named, and lists what differs from the fingerprints kept in
`tests/golden/programs/`; `--renew` keeps the new ones instead. tests/test_programs.py compares likewise.

One is kept for each version of JAX, and of libtpu for TPUs: every release lowers and fuses a little
otherwise. `lowered` is compared on every machine; `optimised`, which is XLA's work, where the processor has
the features that it had when it was kept.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "golden" / "programs"
# LLVM's effort changes no HLO, and is two thirds of the time.
QUICK_XLA = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# What XLA:CPU may look at, the most capable first; /proc/cpuinfo's words.
_FEATURES = ("amx_bf16", "avx512_bf16", "avx512_vnni", "avx512f", "avx2", "sve", "bf16")

Stages = dict[str, dict[str, dict[str, int]]]


def features(of: str) -> str:
    """The level of what compiles for a platform: this processor's, or `tpu`."""
    if of == "tpu":
        return "tpu"
    try:
        words = set(Path("/proc/cpuinfo").read_text().partition("\n\n")[0].split())
    except OSError:  # no Linux
        words = set()
    return " ".join([platform.machine(), next((word for word in _FEATURES if word in words), "plain")])


def versions(of: str) -> dict[str, str]:
    """The packages whose version may change a program."""
    names = ["flax", "jax", "jaxlib", "optax", *(["libtpu"] if of == "tpu" else [])]
    return {name: importlib.metadata.version(name) for name in names}


def environment(of: str) -> str:
    """What a fingerprint is kept for: the version of JAX and of the compiler."""
    known = versions(of)
    return f"jax {known['jax']}, {'libtpu ' + known['libtpu'] if of == 'tpu' else of}"


def stored(name: str) -> dict[str, Any]:
    """What is kept of a program; without any, an empty one."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {"fingerprints": {}}


def renewal(name: str) -> str:
    """The command that keeps a program's fingerprint anew."""
    return f"python -m benchmarks.program_fingerprint --renew {name}"


def keep(name: str, what: str, of: str, stages: Stages) -> None:
    """Writes a program's fingerprint for the running JAX, beside those for others.

    Other processors' `optimised` stays only while the program that is handed to XLA is the same.
    """
    kept = stored(name)["fingerprints"]
    old = kept.get(environment(of), {})
    others = old.get("optimised", {}) if old.get("lowered") == stages["lowered"] else {}
    kept[environment(of)] = {
        "date": datetime.date.today().isoformat(),
        "versions": versions(of),
        "lowered": stages["lowered"],
        "optimised": others | {features(of): stages["optimised"]},
    }
    FOLDER.mkdir(exist_ok=True)
    text = json.dumps({"program": what, "fingerprints": kept}, indent=1, sort_keys=True)
    (FOLDER / f"{name}.json").write_text(text + "\n")


def absent(name: str, of: str, stage: str) -> str | None:
    """Why a stage of a program cannot be compared here, with what would change that; None where it can."""
    kept = stored(name)["fingerprints"]
    here = kept.get(environment(of))
    if here is None:
        have = "; ".join(kept) or "nothing"
        return f"no fingerprint is kept of {name} for {environment(of)} ({have}): {renewal(name)}"
    if stage == "optimised" and features(of) not in here["optimised"]:
        have = "; ".join(here["optimised"])
        return f"no fingerprint is kept of {name}'s HLO for {features(of)} ({have}): {renewal(name)}"
    return None


def changes(name: str, of: str, stage: str, table: Mapping[str, Mapping[str, int]]) -> str:
    """What differs from the kept fingerprint, and what to do about it; empty where nothing does."""
    from benchmarks.fingerprints import differences

    here = stored(name)["fingerprints"][environment(of)]
    expected = here["lowered"] if stage == "lowered" else here["optimised"][features(of)]
    rows = differences(expected, table)
    if not rows:
        return ""
    lines = [f"{stage} {name} is another program than on {here['date']} ({environment(of)}):"]
    lines += [f"  {row}" for row in rows]
    now = versions(of)
    moved = [f"{k} {v} -> {now[k]}" for k, v in here["versions"].items() if now.get(k, v) != v]
    if moved:
        lines.append(f"which may come of {', '.join(moved)}")
    return "\n".join([*lines, f"If it is meant to be: {renewal(name)}"])


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.program_fingerprint", description=__doc__)
    parser.add_argument(
        "names", metavar="NAME", nargs="*", help="programs; all that can be compiled here if none"
    )
    parser.add_argument("--renew", action="store_true", help="keep the fingerprints instead of comparing")
    parser.add_argument(
        "--json", action="store_true", help="print the fingerprints as one JSON object, nothing else"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 1 where a program differs, 2 for an unknown name."""
    args = _arguments(argv)
    for name in [name for name in os.environ if name.startswith(("JAX_", "XLA_", "LIBTPU_"))]:
        del os.environ[name]  # a flag or a cache of the caller's would be fingerprinted with the program
    from benchmarks.tpu_compile import ENVIRONMENT

    os.environ.update(ENVIRONMENT, XLA_FLAGS=QUICK_XLA)
    from benchmarks import fingerprints
    from benchmarks.programs import PROGRAMS

    if unknown := set(args.names) - set(PROGRAMS):
        print(
            f"error: no program {', '.join(sorted(unknown))}; there are {', '.join(PROGRAMS)}",
            file=sys.stderr,
        )
        return 2
    found, different = {}, False
    for name in args.names or PROGRAMS:
        program = PROGRAMS[name]
        if program.platform == "tpu" and not args.names and importlib.util.find_spec("libtpu") is None:
            print(f"{name}: left out, libtpu is not installed", file=sys.stderr)
            continue
        start = time.perf_counter()
        lowered = program.lower()
        stages = {
            "lowered": fingerprints.of_lowered(lowered),
            "optimised": fingerprints.of_compiled(lowered.compile()),
        }
        seconds = time.perf_counter() - start
        found[name] = stages
        if args.renew:
            keep(name, program.what, program.platform, stages)
        if args.json:
            continue
        said = []
        for stage, table in stages.items():
            if why := absent(name, program.platform, stage):
                said.append(why)
            elif text := changes(name, program.platform, stage, table):
                said.append(text)
                different = True
        outcome = "\n".join(said) or ("kept" if args.renew else "the same")
        print(f"[{seconds:.1f} s] {name}: {outcome}", flush=True)
    if args.json:
        print(json.dumps(found))
    return int(different)


if __name__ == "__main__":
    raise SystemExit(main())
