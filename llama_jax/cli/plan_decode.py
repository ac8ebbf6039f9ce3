"""`llama-jax plan MODEL --decode`: prefill and decoding on a TPU slice, by arithmetic."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping

from llama_jax.cli import output
from llama_jax.config import LlamaConfig
from llama_jax.console import loading, terminal
from llama_jax.errors import InputError
from llama_jax.meshes import AXES, mesh_sizes
from llama_jax.model_sizes import presets
from llama_jax.plan.decode import DecodePlan, plan_decode
from llama_jax.plan.prices import chip_hour_dollars
from llama_jax.plan.table import BOUNDS, seconds_text
from llama_jax.plan.topology import Topology

_BATCHES = (1, 8, 32, 128, 512, 2048)
_WEIGHTS = {16: "bfloat16", 8: "int8", 4: "int4"}


def plan_decoding(args: argparse.Namespace) -> None:
    """Prints the plan that the arguments of `llama-jax plan --decode` ask for."""
    model = _model(args.config)
    topology = dataclasses.replace(Topology.parse(args.topology), slices=args.slices or 1)
    context = args.context or model.max_position_embeddings
    weights, cache = _WEIGHTS[args.bits or 16], args.cache_dtype or "bfloat16"

    def plan(batch: int, mesh: Mapping[str, int]) -> DecodePlan:
        return plan_decode(model, topology, mesh, batch=batch, context=context, weights=weights, cache=cache)

    mesh = _mesh(args.mesh, model, topology)
    if not args.mesh and not plan(1, mesh).largest_batch:  # shard the weights over all chips instead
        mesh = mesh | {"data": 1, "fsdp": mesh["data"]}
    largest = plan(1, mesh).largest_batch
    batches = (
        [args.batch]
        if args.batch
        else [*(b for b in _BATCHES if b < largest), *([largest] if largest else [])]
    )
    plans = [plan(batch, mesh) for batch in batches or [1]]
    price, source = chip_hour_dollars(topology.kind, args.price)
    if args.json:
        rows = [
            dataclasses.asdict(one) | {"fits": one.fits, "tokens_per_second": one.tokens_per_second}
            for one in plans
        ]
        result = {"model": args.config, "weights": weights, "cache": cache, "largest_batch": largest}
        output.print_json(result | {"plans": rows, "dollars_per_chip_hour": price})
        return
    shape = ", ".join(f"{name} {size}" for name, size in mesh.items() if size > 1) or "one device"
    size = terminal.human_bytes
    output.print_table(
        [
            ("slice", f"{topology.name}, {topology.chips} chips; mesh: {shape}"),
            ("weights", f"{weights}, {size(plans[0].weight_bytes)} a chip of {size(plans[0].capacity)}"),
            ("cache", f"{cache}, {context:,} tokens a row; prompts of {plans[0].prompt:,}"),
            ("largest batch", f"{largest:,}" if largest else "none: the weights do not fit"),
        ],
        ("decoding", args.config),
    )
    output.print_table(
        [_row(one, price) for one in plans],
        ("batch", "HBM per chip", "prefill", "a token", "tokens/s", "$ per 1M", "HBM bandwidth", "bound by"),
        right=(0, 1, 2, 3, 4, 5, 6),
    )
    if price is not None:
        terminal.note(f"dollars: ${price:g} for an hour of a chip, {source}; of decoding alone")
    terminal.note("by arithmetic: docs/planning.md compares it with published measurements")


def _row(plan: DecodePlan, price: float | None) -> tuple[str, ...]:
    used = plan.weight_bytes + plan.cache_bytes + plan.temporary_bytes
    dollars = "" if price is None else f"{1e6 / plan.tokens_per_second * plan.chips * price / 3600:.2f}"
    return (
        f"{plan.batch:,}",
        terminal.human_bytes(used) + ("" if plan.fits else " DOES NOT FIT"),
        seconds_text(plan.prefill_seconds),
        seconds_text(plan.step_seconds),
        f"{plan.tokens_per_second:,.0f}",
        dollars,
        f"{plan.bandwidth_share:.0%}",
        BOUNDS[plan.bound],
    )


def _model(name: str) -> LlamaConfig:
    """The configuration of a preset, or of a model by its headers."""
    by_name = {preset.lower(): config for preset, config in vars(presets).items()}
    if config := by_name.get(name.lower()):
        return config
    from llama_jax.weights import open_source

    try:
        return open_source(loading.resolve(name)).config
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{error}; or give a preset: {', '.join(by_name)}") from None


def _mesh(text: str | None, model: LlamaConfig, topology: Topology) -> dict[str, int]:
    """The mesh as given; by default `tensor` as far as key heads and chips divide, `data` over the rest."""
    if text:
        return mesh_sizes(text, topology.chips)
    heads = model.num_key_value_heads
    tensor = max(n for n in range(1, heads + 1) if heads % n == 0 and topology.chips % n == 0)
    return dict.fromkeys(AXES, 1) | {"tensor": tensor, "data": topology.chips // tensor}
