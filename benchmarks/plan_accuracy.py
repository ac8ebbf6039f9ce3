"""Compares plans by arithmetic with compiled ones, over the shipped configurations.

`python -m benchmarks.plan_accuracy` prints a table of docs/planning_arithmetic.md from the compiled numbers
in `tests/plan/compiled.json`. `--compile` compiles first what is missing there (minutes each; needs libtpu);
`--write` writes the table into the page.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import page_table
from llama_jax.errors import LlamaJaxError
from llama_jax.plan.estimate import estimate
from llama_jax.plan.result import StepPlan
from llama_jax.plan.topology import Topology

ROOT = Path(__file__).parents[1]
STORED = ROOT / "tests" / "plan" / "compiled.json"
PAGE = page_table.DOCS / "planning_arithmetic.md"
_AS_COMPILED = ("scoped_vmem_kib", "attention_backward")  # fields of `StepInputs` in `compiled.json`
# (column, key in `compiled.json`, units of it in one shown, digits, unit)
_COMPARED = (
    ("HBM", "peak_bytes", 1e9, 1, "GB"),
    ("computation", "compute_seconds", 1, 2, "s"),
    ("step", "step_seconds", 1, 2, "s"),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A step to plan both ways: a shipped configuration, the slice, and settings."""

    title: str
    config: str
    topology: str
    settings: tuple[str, ...] = ()
    shape: str | None = None

    @property
    def key(self) -> str:
        """What it is stored under."""
        return " ".join((self.config, self.topology, *self.settings))


_FULL, _PROJECTIONS = ("--train.remat", "full"), ("--train.remat", "save_projections")
# As the head of configs/ppo_llama2_70b.toml says.
_ALL_WEIGHTS = (
    *("--adapter.type", "none", "--mesh.topology", "v5p:4x4x4"),
    *("--train.gradient_accumulation_steps", "1", *_FULL),
)
CASES = (
    Case("7B", "llama2_7b", "v5p:2x2x1"),
    Case("7B, save_projections", "llama2_7b", "v5p:2x2x1", _PROJECTIONS),
    Case("7B, full", "llama2_7b", "v5p:2x2x1", _FULL),
    Case("7B, full", "llama2_7b", "v6e:16x16", _FULL),
    Case("7B, full", "llama2_7b", "v5e:16x16", _FULL),
    Case("13B", "llama2_13b", "v5p:2x2x2"),
    Case("70B", "llama2_70b", "v5p:4x4x4"),
    Case("70B, save_projections", "llama2_70b", "v5p:4x4x4", _PROJECTIONS),
    Case(
        "70B, tensor 4, save_projections",
        "llama2_70b",
        "v5p:4x4x4",
        ("--mesh.fsdp", "16", "--mesh.tensor", "4", *_PROJECTIONS),
    ),
    Case("70B, full", "llama2_70b", "v6e:16x16", _FULL),
    Case("70B by LoRA", "sft_llama2_70b", "v5p:2x2x4", (), "llama2_70b"),
    Case("70B by PPO, with LoRA", "ppo_llama2_70b", "v5p:2x4x4", (), "llama2_70b"),
    Case("70B by PPO, all weights", "ppo_llama2_70b", "v5p:4x4x4", _ALL_WEIGHTS, "llama2_70b"),
    Case("70B by QLoRA", "sft_llama2_70b", "v5p:2x2x2", ("--adapter.base", "nf4"), "llama2_70b"),
)


def run_of(case: Case) -> tuple[Any, Any, Topology]:
    """The run, its model and the slice of a case, with as many sequences a chip as the configuration has."""
    from llama_jax.train.config.read import load_config
    from llama_jax.train.planning import model_of, with_rows_per_chip

    run = load_config(ROOT / "configs" / f"{case.config}.toml", case.settings)
    topology = Topology.parse(case.topology)
    return with_rows_per_chip(run, topology), model_of(run, case.shape), topology


def arithmetic(case: Case, compiled: Mapping[str, Any]) -> StepPlan:
    """The plan by arithmetic, of the kernels and with the compiler's limit that it was compiled with."""
    from llama_jax.train.planning.inputs import step_inputs

    given = {name: compiled[name] for name in _AS_COMPILED}
    return estimate(dataclasses.replace(step_inputs(*run_of(case)), **given))


def compile_case(case: Case) -> dict[str, Any]:
    """The compiled numbers of a case, as they are stored."""
    from llama_jax.train.planning.compiling import plan_compiled
    from llama_jax.train.planning.inputs import step_inputs

    plan = plan_compiled(*run_of(case))
    moved: dict[str, float] = {}
    for one in plan.traffic:
        moved[one.kind] = moved.get(one.kind, 0) + one.bytes
    return {
        "peak_bytes": plan.memory.peak,
        "compute_seconds": round(plan.compute_seconds, 3),
        "step_seconds": round(plan.step_seconds, 3),
        "moved": moved,
        "scoped_vmem_kib": step_inputs(*run_of(case)).scoped_vmem_kib,
        "attention_backward": 0,
        "by": "llama-jax plan",
        "date": datetime.date.today().isoformat(),
        **{name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
    }


def stored() -> dict[str, dict[str, Any]]:
    """The compiled numbers by `Case.key`."""
    numbers: dict[str, dict[str, Any]] = json.loads(STORED.read_text()) if STORED.exists() else {}
    return numbers


def compare(plan: StepPlan, compiled: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """(arithmetic, compiled) of what was compiled: `peak_bytes`, `compute_seconds`, `step_seconds`."""
    ours = {
        "peak_bytes": plan.memory.peak,
        "compute_seconds": plan.compute_seconds,
        "step_seconds": plan.step_seconds,
    }
    return {name: (value, compiled[name]) for name, value in ours.items() if name in compiled}


def markdown() -> str:
    """The table, of every case that has compiled numbers."""
    columns = [f"{name}, {kind}" for name, *_ in _COMPARED for kind in ("arithmetic", "compiled")]
    header = ["step", "slice", *columns]
    lines, found = [], stored()
    for case in CASES:
        if case.key not in found:
            continue
        compiled = found[case.key]
        both = compare(arithmetic(case, compiled), compiled)
        row = [case.title, case.topology]
        for _, name, scale, digits, unit in _COMPARED:
            if name in both:
                ours, theirs = both[name]
                row += [
                    f"{ours / scale:.{digits}f} {unit} ({ours / theirs - 1:+.1%})",
                    f"{theirs / scale:.{digits}f} {unit}",
                ]
            else:
                row += ["", ""]
        lines.append(row)
    return page_table.markdown(header, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_accuracy", description=__doc__)
    parser.add_argument("--compile", action="store_true", help="compile the cases that have no numbers yet")
    parser.add_argument("--write", action="store_true", help="write the table into the page")
    args = parser.parse_args(argv)
    if args.compile:
        for case in CASES:
            numbers = stored()
            if case.key in numbers:
                continue
            try:
                numbers[case.key] = compile_case(case)
            except LlamaJaxError as error:
                print(f"error: {case.key}: {error}", file=sys.stderr)
                continue
            STORED.write_text(json.dumps(numbers, indent=1) + "\n")
            print(case.key, numbers[case.key], file=sys.stderr)
    table = markdown()
    if args.write:
        page_table.write_into(PAGE, "benchmarks.plan_accuracy", table)
    print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
