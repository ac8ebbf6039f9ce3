"""Fingerprints of compiled programs: detects whether a refactoring changed one.

`python -m benchmarks.program_fingerprint [--renew] [NAME ...]` compiles the programs of `programs.py` (by
default all that can be compiled here) and lists the differences from the fingerprints stored in
`tests/golden/programs/`; `--renew` stores the new ones instead. tests/test_programs.py makes the same
comparison.

A fingerprint is stored per version of JAX, and of libtpu for TPUs, since every release lowers and fuses a
little differently. `lowered` is compared on every machine; `optimised`, XLA's output, only on processors with
the same features as the one it was stored on.
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
# LLVM's optimization level does not change the HLO, and takes two thirds of the time.
QUICK_XLA = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# The TPU compiler's own limit, in place of that of `ops.compiler_flags`: a third of the time.
QUICK_LIBTPU = "--xla_tpu_scoped_vmem_limit_kib=-1"
# CPU features that XLA:CPU may use, as in /proc/cpuinfo, the most capable first.
_FEATURES = ("amx_bf16", "avx512_bf16", "avx512_vnni", "avx512f", "avx2", "sve", "bf16")

Stages = dict[str, dict[str, dict[str, int]]]


def features(of: str) -> str:
    """The compile target's feature level: this processor's, or `tpu`."""
    if of == "tpu":
        return "tpu"
    try:
        words = set(Path("/proc/cpuinfo").read_text().partition("\n\n")[0].split())
    except OSError:  # not Linux
        words = set()
    return " ".join([platform.machine(), next((word for word in _FEATURES if word in words), "plain")])


def versions(of: str) -> dict[str, str]:
    """Versions of the packages that may change a program."""
    names = ["flax", "jax", "jaxlib", "optax", *(["libtpu"] if of == "tpu" else [])]
    return {name: importlib.metadata.version(name) for name in names}


def environment(of: str) -> str:
    """The key of a fingerprint: the versions of JAX and of the compiler."""
    known = versions(of)
    return f"jax {known['jax']}, {'libtpu ' + known['libtpu'] if of == 'tpu' else of}"


def stored(name: str) -> dict[str, Any]:
    """The stored fingerprints of a program, possibly none."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {"fingerprints": {}}


def renewal(name: str) -> str:
    """The command that stores a program's fingerprint again."""
    return f"python -m benchmarks.program_fingerprint --renew {name}"


def keep(name: str, what: str, of: str, stages: Stages) -> None:
    """Stores a program's fingerprint for the installed JAX, and keeps those for other versions.

    `optimised` of other processors is kept only if `lowered` is unchanged.
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
    """Why a stage cannot be compared here, with the command that fixes it; None if it can."""
    kept = stored(name)["fingerprints"]
    here = kept.get(environment(of))
    if here is None:
        have = "; ".join(kept) or "nothing"
        return f"no fingerprint is stored for {name} on {environment(of)} ({have}): {renewal(name)}"
    if stage == "optimised" and features(of) not in here["optimised"]:
        have = "; ".join(here["optimised"])
        return f"no fingerprint is stored for {name}'s HLO on {features(of)} ({have}): {renewal(name)}"
    return None


def changes(name: str, of: str, stage: str, table: Mapping[str, Mapping[str, int]]) -> str:
    """The differences from the stored fingerprint, with the command to renew it; empty if equal."""
    from benchmarks.fingerprints import differences

    here = stored(name)["fingerprints"][environment(of)]
    expected = here["lowered"] if stage == "lowered" else here["optimised"][features(of)]
    rows = differences(expected, table)
    if not rows:
        return ""
    lines = [f"{stage} {name} has changed since {here['date']} ({environment(of)}):"]
    lines += [f"  {row}" for row in rows]
    now = versions(of)
    moved = [f"{k} {v} -> {now[k]}" for k, v in here["versions"].items() if now.get(k, v) != v]
    if moved:
        lines.append(f"possibly because of {', '.join(moved)}")
    return "\n".join([*lines, f"If intended: {renewal(name)}"])


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.program_fingerprint", description=__doc__)
    parser.add_argument(
        "names", metavar="NAME", nargs="*", help="programs; all that can be compiled here if none"
    )
    parser.add_argument("--renew", action="store_true", help="keep the fingerprints instead of comparing")
    parser.add_argument(
        "--json", action="store_true", help="print the fingerprints as one JSON object, nothing else"
    )
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 1 where a program differs, 2 for an unknown name."""
    args = _arguments(argv)
    for name in [name for name in os.environ if name.startswith(("JAX_", "XLA_", "LIBTPU_"))]:
        del os.environ[name]  # a flag or a cache of the caller's would be fingerprinted with the program
    from llama_jax.train.planning.compiling import ENVIRONMENT

    os.environ.update(ENVIRONMENT, XLA_FLAGS=QUICK_XLA, LIBTPU_INIT_ARGS=QUICK_LIBTPU)
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
            keep(name, program.description, program.platform, stages)
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
