"""Predicted beside published: the steps of public runs, compiled, read as `llama-jax plan` reads its own.

    python -m benchmarks.published FOLDER [--write]

FOLDER has what `benchmarks/maxtext_dump.py` wrote. A prediction is the compiler's time of computation with
attention kernels at the chip's share of peak, and what computation waits for. Nothing is fitted to these runs
but that share, which is of one run that is not among them (`llama_jax.plan.chips`).
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import page_table
from benchmarks.published_runs import PUBLISHED, Published
from llama_jax.config import LlamaConfig
from llama_jax.plan import parts
from llama_jax.plan.chips import CHIPS
from llama_jax.plan.flops import flops_per_token
from llama_jax.plan.parts import Shapes
from llama_jax.plan.program import read_program
from llama_jax.plan.topology import Topology

PAGE = page_table.DOCS / "planning_validation.md"
STORED = Path(__file__).with_suffix(".json")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A step of one chip, in seconds, bytes and shares of peak; attention is counted in full.

    Attributes:
      compute_seconds: of computation, attention kernels included.
      kernel_seconds: of attention kernels.
      exposed_seconds: for which computation waits for collectives.
      launch_seconds: of starting programs and loops.
      peak_bytes: of HBM.
      product_share: FLOP/s of matrix products over peak, by the compiler's cycles.
      mfu: predicted.
      by: versions that compiled it.
    """

    compute_seconds: float
    kernel_seconds: float
    exposed_seconds: float
    launch_seconds: float
    peak_bytes: float
    product_share: float
    mfu: float
    by: str


def predict(run: Published, text: str, about: dict[str, Any]) -> Prediction:
    """The prediction for a program.

    Args:
      run: what was published.
      text: the scheduled program.
      about: what `maxtext_dump` wrote beside it.
    """
    topology = Topology.parse(run.topology)
    chip = CHIPS[topology.kind]
    model = LlamaConfig(**about["model"], tie_word_embeddings=False)
    mesh = {name: size for name, size in about["mesh"].items() if size > 1}
    sides = len(topology.sides)
    places = [(place[0], *place[1 : 1 + sides], place[-1]) for place in about["places"]]
    program = read_program(text, mesh, places, topology, Shapes.of(model, mesh.get("tensor", 1)))
    by_part = parts.summed(program.operations, chip)
    compute = sum(part.seconds for part in by_part)
    exposed = sum(row.exposed_seconds for row in program.traffic)
    step = compute + exposed + program.launch_seconds
    products = [one for one in program.operations if one.flops and one.part != parts.ATTENTION]
    product_flops, product_seconds = (
        sum(getattr(one, field) * one.times for one in products) for field in ("flops", "seconds")
    )
    tokens = about["batch"] * about["length"]
    flops = flops_per_token(model, about["length"], causal=False) * tokens
    return Prediction(
        compute_seconds=compute,
        kernel_seconds=sum(part.seconds for part in by_part if part.name == parts.ATTENTION),
        exposed_seconds=exposed,
        launch_seconds=program.launch_seconds,
        peak_bytes=about["peak_bytes"] * chip.devices,
        product_share=product_flops / (product_seconds or 1.0) / (chip.peak_flops / chip.devices),
        mfu=flops / (step * topology.chips * chip.peak_flops),
        by=f"MaxText {about['maxtext']}",
    )


def table(predictions: dict[str, dict[str, Any]]) -> str:
    """Predicted beside published."""
    header = [
        "run",
        "published",
        "predicted",
        "points",
        "computation",
        "products",
        "kernels",
        "waiting",
        "HBM",
    ]
    rows = []
    for name, fields in predictions.items():
        run, one = PUBLISHED[name], Prediction(**fields)
        rows.append(
            [
                run.title,
                f"{run.mfu:.1%}",
                f"{one.mfu:.1%}",
                f"{100 * (one.mfu - run.mfu):+.1f}",
                f"{one.compute_seconds:.2f} s",
                f"{one.product_share:.0%} of peak",
                f"{one.kernel_seconds:.2f} s",
                f"{one.exposed_seconds:.2f} s",
                f"{one.peak_bytes / 1e9:.1f} GB",
            ]
        )
    return page_table.markdown(header, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.published", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="of programs; without it, those kept are shown")
    parser.add_argument("--write", action="store_true", help="keep the numbers, and write the table")
    args = parser.parse_args(argv)
    found: dict[str, Any] = json.loads(STORED.read_text()) if STORED.exists() else {}
    for name, run in PUBLISHED.items():
        if args.folder is not None and (args.folder / f"{name}.json").exists():
            with gzip.open(args.folder / f"{name}.hlo.gz", "rt") as file:
                about = json.loads((args.folder / f"{name}.json").read_text())
                found[name] = dataclasses.asdict(predict(run, file.read(), about))
    found = {name: found[name] for name in PUBLISHED if name in found}
    text = table(found)
    if args.write:
        STORED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        page_table.write_into(PAGE, "benchmarks.published", text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
