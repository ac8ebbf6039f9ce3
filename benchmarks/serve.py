"""Throughput and latency of the batcher: `python -m benchmarks.serve [--json]`.

SmolLM2-135M, greedy, no end token, through `Batcher` with its thread, as the server uses it: one stream alone
and 16 at once; and the time to the first token of a prompt alone, and while half of the rows are busy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import jax
import numpy as np

import llama_jax as lj
from benchmarks.generate_vs_peers import _machine
from llama_jax.serving.batcher import Batcher
from llama_jax.serving.requests import Request
from tests.golden import cases

ROWS = 16
NEW_TOKENS = 96
PROMPT_TOKENS = (32, 512)
GREEDY = lj.Sampling(temperature=0.0)


def prompts(count: int, length: int) -> list[list[int]]:
    """Prose, each from another place, so that no prefix is shared."""
    with np.load(cases.SMOLLM2) as golden:
        prose = np.tile(golden["prose"].astype(int), 4)
    return [prose[7 * n : 7 * n + length].tolist() for n in range(1, count + 1)]


def rate(batcher: Batcher, streams: int) -> float:
    """Tokens/s of all streams together, prompts included."""
    handles = [batcher.submit(Request(p, NEW_TOKENS, GREEDY)) for p in prompts(streams, 18)]
    start = time.perf_counter()
    tokens = sum(len(handle.result().tokens) for handle in handles)
    return tokens / (time.perf_counter() - start)


def first_token(batcher: Batcher, length: int, busy: int, number: int) -> float:
    """Seconds to the first token of a prompt, while `busy` rows generate."""
    others = [batcher.submit(Request(p, 600, GREEDY)) for p in prompts(busy, 18)]
    while not all(handle.generated > 2 for handle in others):
        time.sleep(0.01)
    (prompt,) = prompts(1, length)
    prompt = [100 + number, *prompt[1:]]  # another first token: no prefix is shared
    (result,) = [batcher.submit(Request(prompt, 1, GREEDY)).result()]
    for handle in others:
        handle.cancel()
    until_idle(batcher)
    return result.seconds_to_first


def until_idle(batcher: Batcher) -> None:
    while batcher.running or batcher.waiting:
        time.sleep(0.01)


def measure(path: str, rounds: int) -> dict[str, Any]:
    """Runs everything; returns the object that `--json` prints."""
    machine = _machine()
    model = lj.load(path, scan_layers=False)
    found: dict[str, list[float]] = {}
    with Batcher(model.config, model.params, batch_size=ROWS, max_length=1024) as batcher:
        batcher.warm_up()
        rate(batcher, 1)
        for number in range(rounds):
            for streams in (1, ROWS):
                found.setdefault(f"streams_{streams}", []).append(rate(batcher, streams))
            for length in PROMPT_TOKENS:
                for busy in (0, ROWS // 2):
                    seconds = first_token(batcher, length, busy, 2 * number + (busy > 0))
                    found.setdefault(f"first_token_{length}_busy_{busy}", []).append(seconds)
    median = {name: statistics.median(values) for name, values in found.items()}
    return {
        "machine": machine,
        "versions": f"JAX {jax.__version__}",
        "rounds": rounds,
        "tokens_per_second_1": median["streams_1"],
        f"tokens_per_second_{ROWS}": median[f"streams_{ROWS}"],
        "speedup": median[f"streams_{ROWS}"] / median["streams_1"],
        **{
            f"first_token_{length}": {
                "alone": median[f"first_token_{length}_busy_0"],
                "half_load": median[f"first_token_{length}_busy_{ROWS // 2}"],
            }
            for length in PROMPT_TOKENS
        },
        "ranges": {name: [min(values), max(values)] for name, values in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = measure(args.model, args.rounds)
    if args.json:
        print(json.dumps(result))
        return
    print(f"one stream     {result['tokens_per_second_1']:.1f} tokens/s")
    print(f"{ROWS} streams     {result[f'tokens_per_second_{ROWS}']:.1f} tokens/s, {result['speedup']:.2f} x")
    for length in PROMPT_TOKENS:
        alone, half = (result[f"first_token_{length}"][name] for name in ("alone", "half_load"))
        print(
            f"first token of {length}: {alone * 1000:.0f} ms alone, {half * 1000:.0f} ms with "
            f"{ROWS // 2} rows busy, {half / alone:.2f} x"
        )
    print(f"medians of {args.rounds} rounds; {result['machine']}; {result['versions']}")


if __name__ == "__main__":
    main()
