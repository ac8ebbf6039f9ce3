"""`llama-jax inspect`: what a checkpoint contains and how much memory it needs; reads only its headers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llama_jax.cli import output
from llama_jax.cli.arguments import ModelParser
from llama_jax.config import LlamaConfig
from llama_jax.console import loading, terminal
from llama_jax.console.parser import parse_positive_int

if TYPE_CHECKING:
    from llama_jax.weights import Source
    from llama_jax.weights.runs import Step

EXAMPLES = """
llama-jax inspect smollm2-135m
llama-jax inspect smollm2-135m --batch 8 --length 2048
llama-jax inspect path/to/model --json
llama-jax inspect runs/tiny
"""

ITEM_SIZES = {"float32": 4, "bfloat16": 2}


def run(argv: Sequence[str]) -> None:
    """Runs the command."""
    summary = (
        "Show what a checkpoint or a training run contains and how much memory it needs; reads headers only."
    )
    parser = ModelParser("llama-jax inspect", summary, EXAMPLES)
    parser.add_model()
    option = parser.add_argument
    option("--batch", type=parse_positive_int, default=1, metavar="B", help="batch size (default: 1)")
    option("--length", type=parse_positive_int, metavar="S", help="cache length (default: context length)")
    parser.add_json()
    args = parser.parse(argv)

    from llama_jax.eval.goodput import ACTIVITIES, describe, read_goodput
    from llama_jax.eval.throughput import kv_cache_bytes
    from llama_jax.weights import open_source
    from llama_jax.weights.runs import is_run, list_steps

    path = loading.resolve(args.model)
    with terminal.warnings_as_notes():
        source = open_source(path)
    steps = list_steps(source.path) if source.format == "orbax" and is_run(source.path) else []
    goodput = read_goodput(source.path) if steps else None
    config = source.config
    length = args.length or config.max_position_embeddings
    groups = group_tensors(source)
    parts = parameters_by_part(config)
    weights = {name: config.num_params * size for name, size in ITEM_SIZES.items()}
    cache = {name: kv_cache_bytes(config, args.batch, length, size) for name, size in ITEM_SIZES.items()}
    in_file = sum(info.nbytes for info in source.tensors.values())

    if args.json:
        output.print_json(
            {
                "path": str(source.path),
                "format": source.format,
                "why": source.detected_by,
                "config": dataclasses.asdict(config),
                "parameters": config.num_params,
                "parameters_by_part": parts,
                "tensors": groups,
                "bytes_in_file": in_file,
                "weight_bytes": weights,
                "kv_cache": {"batch": args.batch, "length": length, "bytes": cache},
                **({"training": _training(source, steps)} if source.format == "orbax" else {}),
                **({"goodput": {**dataclasses.asdict(goodput), "shares": goodput.shares}} if goodput else {}),
            }
        )
        return
    size = terminal.human_bytes
    output.print_line(f"{source.path}\n{source.format}: {source.detected_by}\n")
    rows = [[name, _format(value)] for name, value in dataclasses.asdict(config).items() if value != ()]
    output.print_table(rows, ("config", ""))
    if steps:
        output.print_table(*_steps_table(steps), right=(0, 1))
    if goodput:
        output.print_line(describe(goodput))
        rows = [
            [name, f"{goodput.seconds[name]:,.0f} s", f"{share:.1%}", ACTIVITIES[name]]
            for name, share in goodput.shares.items()
        ]
        output.print_table(rows, ("wall time", "", "", ""), right=(1, 2))
    rows = []
    for group in groups:
        shape = "x".join(map(str, group["shape"]))
        rows.append([group["name"], str(group["count"]), shape, group["dtype"], size(group["bytes"])])
    output.print_table(rows, ("tensor", "count", "shape", "dtype", "on disk"), right=(1, 4))
    rows = [[part, f"{count:,}", f"{count / config.num_params:.1%}"] for part, count in parts.items()]
    rows.append(["total", f"{config.num_params:,}", ""])
    if config.num_experts:
        active = config.num_active_params
        rows.append(["of which a token uses", f"{active:,}", f"{active / config.num_params:.1%}"])
    output.print_table(rows, ("parameters", "", ""), right=(1, 2))
    rows = [["weights", size(in_file), *map(size, weights.values())]]
    rows.append([f"key/value cache, batch {args.batch}, {length} positions", "", *map(size, cache.values())])
    output.print_table(rows, ("memory", "on disk", *ITEM_SIZES), right=(1, 2, 3))


def _training(source: Source, steps: Sequence[Step]) -> dict[str, Any]:
    """Returns the training metadata of a checkpoint, and of the other steps of its run."""
    return {
        **{name: source.metadata.get(name) for name in ("step", "metrics", "run")},
        "steps": [
            {
                "step": step.step,
                "bytes": step.nbytes,
                "saved": step.metadata and step.metadata.time.isoformat(),
                "metrics": step.metadata and step.metadata.metrics,
                "kept": step.kept_by,
                "problem": step.problem,
            }
            for step in steps
        ],
    }


def _steps_table(steps: Sequence[Step]) -> tuple[list[list[str]], tuple[str, ...]]:
    """Returns the rows and the header of a table of a run's steps."""
    rows = []
    for step in steps:
        record, kept = step.metadata, ", ".join(step.kept_by) or "until the next save"
        metrics = (
            ", ".join(f"{name} {_format(value)}" for name, value in record.metrics.items()) if record else ""
        )
        saved = f"{record.time.astimezone():%Y-%m-%d %H:%M}" if record else ""
        rows.append([str(step.step), terminal.human_bytes(step.nbytes), saved, metrics, step.problem or kept])
    return rows, ("step", "on disk", "saved", "metrics", "kept")


def group_tensors(source: Source) -> list[dict[str, Any]]:
    """Groups tensors by name (layer number as `*`), shape and dtype, in the file's order."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, info in source.tensors.items():
        pattern = re.sub(r"(?<=\.)\d+(?=\.)|(?<=\[)\d+(?=\])", "*", name)  # layers.0.wq; llama2.c's wq[0]
        key = (pattern, info.shape, info.dtype)
        group = groups.setdefault(
            key, {"name": pattern, "count": 0, "shape": list(info.shape), "dtype": info.dtype, "bytes": 0}
        )
        group["count"] += 1
        group["bytes"] += info.nbytes
    return list(groups.values())


def parameters_by_part(config: LlamaConfig) -> dict[str, int]:
    """Returns the number of parameters of each part of the model; they sum to `config.num_params`."""
    width, layers = config.hidden_size, config.num_hidden_layers
    experts = config.num_experts
    feed_forward = width * (3 * config.intermediate_size * max(experts, 1) + experts)  # and the router
    parts = {
        "embedding": config.vocab_size * width,
        "attention": 0,
        "feed-forward": layers * feed_forward,
        "norms": (2 * layers + 1) * width,
        "output": config.vocab_size * width if config.has_output else 0,
        **({"head": len(config.labels) * width} if config.labels else {}),
    }
    return parts | {"attention": config.num_params - sum(parts.values())}  # with biases and norms of its own


def _format(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={inner}" for name, inner in value.items() if inner is not None)
    if isinstance(value, tuple):
        if isinstance(value[0], bool):  # of each layer
            value = [f"layer {layer}" for layer, flag in enumerate(value) if flag] or ["no layer"]
        return ", ".join(value[:8]) + (f" and {len(value) - 8} more" if len(value) > 8 else "")
    return f"{value:g}" if isinstance(value, float) else str(value)
