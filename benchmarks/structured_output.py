"""What grammars cost on SmolLM2: `python -m benchmarks.structured_output [--json]`.

Prints the time and memory to build some of them, and the time of a decoding step with one and without, at
batches of 1 and 8, step by step in turn: medians, and their ratio.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import llama_jax as lj
from llama_jax.decoding.generation import unstack_jit

STEPS = 64
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
        "address": {
            "type": "object",
            "properties": {
                "street": {"type": "string"},
                "city": {"type": "string"},
                "zip": {"type": "string"},
            },
            "required": ["street", "city"],
        },
    },
    "required": ["name", "age", "address"],
}
GRAMMARS: dict[str, dict[str, Any]] = {
    "choices yes, no": {"choices": ["yes", "no"]},
    "regex [0-9]{4}-[0-9]{2}-[0-9]{2}": {"regex": "[0-9]{4}-[0-9]{2}-[0-9]{2}"},
    "schema of a person, 5 properties": {"json_schema": PERSON},
    "any JSON, nested once": {"json_schema": {}},
    "a string of at most 500 characters": {"json_schema": {"type": "string", "maxLength": 500}},
}
# A text without an end within the steps: it needs a character that does not come.
ENDLESS = r"(?s:.)*\x00"


def built(tokenizer: Any) -> list[dict[str, Any]]:
    """Seconds and memory of each grammar; the vocabulary and the compiler's process are there before."""
    lj.grammar(tokenizer, choices=["warm"])
    rows = []
    for name, source in GRAMMARS.items():
        start = time.perf_counter()
        grammar = lj.grammar(tokenizer, **source)
        seconds = time.perf_counter() - start
        rows.append(
            {
                "grammar": name,
                "seconds": seconds,
                "states": grammar.states,
                "classes": int(np.max(grammar.classes)) + 1,
                "megabytes": grammar.nbytes / 1e6,
            }
        )
    return rows


def steps(model: lj.Model, batch: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step with a grammar and without, taken in turn, and their ratio."""
    ids = model.encode_prompt("The history of the world: ")
    request = model.config, unstack_jit(model.params), [ids] * batch, [len(ids)] * batch, jax.random.key(0)
    sampling, grammar = lj.Sampling(temperature=0.0), lj.grammar(model.tokenizer, regex=ENDLESS)
    times: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(rounds):
        streams = {
            "without": lj.stream(*request, sampling, max_new_tokens=STEPS),
            "with": lj.stream(*request, sampling, max_new_tokens=STEPS, eos_id=0, grammar=grammar),
        }
        for number in range(STEPS):
            for name in streams if number % 2 else reversed(streams):
                start = time.perf_counter()
                next(streams[name])
                if number:
                    times[name].append((time.perf_counter() - start) * 1e3)
    medians = {name: float(np.median(values)) for name, values in times.items()}
    return {"batch": batch, **medians, "ratio": medians["with"] / medians["without"]}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="of 64 steps each (default: 5)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    model = lj.load("smollm2-135m", dtype=args.dtype)
    result = {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "dtype": args.dtype,
        "built": built(model.tokenizer),
        "steps": [steps(model, batch, args.rounds) for batch in (1, 8)],
    }
    if args.json:
        print(json.dumps(result))
        return
    for title, rows in (("Building", result["built"]), ("A step, milliseconds", result["steps"])):
        table = Table(*map(str, rows[0]), title=title)
        for row in rows:
            table.add_row(
                *(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values())
            )
        Console().print(table)


if __name__ == "__main__":
    main()
