"""`llama-jax bench`: speed of loading, prefill and decoding, and the share of the memory bandwidth used."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from llama_jax.cli import output
from llama_jax.cli.arguments import ModelParser
from llama_jax.console import loading, terminal
from llama_jax.console.parser import parse_positive_int

EXAMPLES = """
llama-jax bench smollm2-135m
llama-jax bench smollm2-135m --dtype bfloat16 --batch 8 --json
"""


def run(argv: Sequence[str]) -> None:
    """Runs the command."""
    args = _parser().parse(argv)

    import jax

    from llama_jax.eval import throughput

    path = loading.resolve(args.model)
    before, start = throughput.peak_host_memory(), time.perf_counter()
    model = loading.load(str(path), args.dtype, args.bits, tokenizer=args.tokenizer)
    seconds, peak = time.perf_counter() - start, throughput.peak_host_memory()
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    with terminal.spinner("measuring ..."):
        speed = throughput.measure(
            model.config,
            model.params,
            batch=args.batch,
            prompt_tokens=args.prompt_tokens,
            new_tokens=args.new_tokens,
            repeats=args.repeats,
        )
    result = {
        "model": args.model,
        "dtype": args.dtype,
        "bits": args.bits,
        "device": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "load_seconds": seconds,
        "weight_bytes": weights,
        "peak_host_bytes": peak,
        "peak_host_bytes_before_load": before,
        **dataclasses.asdict(speed),
    }
    if args.json:
        output.print_json(result)
        return
    size = terminal.human_bytes
    precision = args.dtype + (f", {args.bits}-bit weights" if args.bits else "")
    print(
        f"""\
model      {args.model}, {precision}, {size(weights)} of weights, on {result["device"]}
load       {seconds:.1f} s; peak host memory {size(peak)}, {peak / weights:.2f} x the weights \
({size(before)} before loading)
prefill    {speed.prefill_tokens_per_second:.0f} tokens/s (batch {speed.batch}, {speed.prompt_tokens} tokens)
decode     {speed.decode_tokens_per_second:.1f} tokens/s (batch {speed.batch}, {speed.new_tokens} tokens)
traffic    {size(speed.bytes_per_step)} per step (weights and cache), {size(speed.bytes_per_second)}/s
memory     {size(speed.memory_bandwidth)}/s measured; decoding reaches {speed.bandwidth_share:.0%} of it
Medians of {args.repeats}. Memory: the fastest of 14 sums over a 537 MB array, half before and half after."""
    )


def _parser() -> ModelParser:
    summary = "Measure loading, prefill, decoding, and the share of memory bandwidth that decoding reaches."
    parser = ModelParser("llama-jax bench", summary, EXAMPLES)
    parser.add_model()
    option = parser.add_argument
    option("--batch", type=parse_positive_int, default=1, metavar="B", help="batch size (default: 1)")
    option("--prompt-tokens", type=parse_positive_int, metavar="N", help="tokens to prefill (default: 512)")
    option("--new-tokens", type=parse_positive_int, metavar="N", help="tokens to decode (default: 128)")
    option(
        "--repeats", type=parse_positive_int, default=5, metavar="N", help="repeats of each run (default: 5)"
    )
    parser.add_tokenizer()
    parser.add_dtype()
    parser.add_json()
    return parser
