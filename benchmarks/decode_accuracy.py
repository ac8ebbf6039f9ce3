"""Decoding by arithmetic beside published measurements: a table of docs/planning_arithmetic.md.

`python -m benchmarks.decode_accuracy` prints it; `--write` writes it into the page.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from benchmarks import page_table
from llama_jax.model_sizes import presets
from llama_jax.plan.decode import DecodePlan, plan_decode
from llama_jax.plan.topology import Topology

PAGE = page_table.DOCS / "planning_arithmetic.md"
LLAMA31_70B = presets.LLAMA2_70B.replace(vocab_size=128_256)


@dataclasses.dataclass(frozen=True)
class Point:
    """A published measurement of decoding Llama 3.1 or 3.3 70B.

    Attributes:
      source: whose.
      topology: the slice.
      data, tensor: the mesh.
      weights: their dtype.
      batch: rows.
      context: tokens of the cache of a row.
      seconds: of a step.
      serving: whether a server was measured, whose steps wait for prefills and the host: not modelled.
    """

    source: str
    topology: str
    data: int
    tensor: int
    weights: str
    batch: int
    context: int
    seconds: float
    serving: bool = False

    @property
    def plan(self) -> DecodePlan:
        """The same by arithmetic."""
        mesh = {"data": self.data, "fsdp": 1, "context": 1, "tensor": self.tensor}
        topology = Topology.parse(self.topology)
        return plan_decode(
            LLAMA31_70B, topology, mesh, batch=self.batch, context=self.context, weights=self.weights
        )


# https://github.com/jax-ml/jax-llm-examples, llama3/README.md: batch -> tokens/s of a row, cache of 2048.
_TENSOR_8 = {8: 84.4, 16: 80.2, 32: 74.5, 64: 58.4, 128: 50.2}
_TENSOR_16 = {8: 159, 16: 135, 32: 108, 64: 68.7, 128: 39.3}


def _point(data: int, tensor: int, batch: int, rate: float) -> Point:
    return Point("jax-llm-examples", "v5e:4x4", data, tensor, "int8", batch, 2048, 1 / rate)


POINTS = (
    *(_point(2, 8, batch, rate) for batch, rate in _TENSOR_8.items()),
    *(_point(1, 16, batch, rate) for batch, rate in _TENSOR_16.items()),
    # https://github.com/sgl-project/sglang-jax (docs/cookbook/.../Llama3.3-70B.md): 16 requests
    # at once, on average of 506 tokens and 524 more, half of which are there at the middle step.
    Point("sglang-jax, serving", "v6e:4x4", 1, 16, "bfloat16", 16, 768, 16.33e-3, serving=True),
)


def markdown() -> str:
    """The table."""
    header = ["measured by", "slice", "tensor", "weights", "batch", "a step, arithmetic", "measured"]
    header.append("HBM bandwidth, arithmetic")
    lines = []
    for point in POINTS:
        plan = point.plan
        lines.append(
            [
                point.source,
                point.topology,
                str(point.tensor),
                point.weights,
                str(point.batch),
                f"{plan.step_seconds * 1e3:.1f} ms ({plan.step_seconds / point.seconds - 1:+.0%})",
                f"{point.seconds * 1e3:.1f} ms",
                f"{plan.bandwidth_share:.0%}",
            ]
        )
    return page_table.markdown(header, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode_accuracy", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the table into the page")
    table = markdown()
    if parser.parse_args(argv).write:
        page_table.write_into(PAGE, "benchmarks.decode_accuracy", table)
    print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
