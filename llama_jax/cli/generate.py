"""`llama-jax generate`: continue a text, printing it as it is produced."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llama_jax.cli import output
from llama_jax.cli.arguments import ModelParser
from llama_jax.cli.settings import add_settings, check_settings, settings_of
from llama_jax.console import loading, terminal
from llama_jax.console.parser import number, positive
from llama_jax.errors import InputError

if TYPE_CHECKING:
    from llama_jax.decoding.drafts import Draft
    from llama_jax.text.model import Model

EXAMPLES = """
llama-jax generate smollm2-135m --prompt "The capital of France is"
llama-jax generate smollm2-135m --prompt "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 7
llama-jax generate smollm2-135m --prompt "The best way to learn is" --num-beams 4 --max-new-tokens 16
llama-jax generate smollm2-135m --prompt "Once upon a time" --bits 8 --cache-dtype int8
llama-jax generate smollm2-135m --draft prompt --prompt "one two three four five six, one two three"
llama-jax generate smollm2-135m --adapter runs/lora --prompt "Once upon a time"
llama-jax generate smollm2-135m --prompt - --json < question.txt
"""


def run(argv: Sequence[str]) -> None:
    """Runs the command."""
    args = _parser().parse(argv)
    prompt = read_stdin() if args.prompt == "-" else args.prompt
    check_settings(args)
    several = args.num_beams > 1 or args.num_return_sequences > 1 or args.draft is not None
    if args.num_beams > 1 and args.temperature > 0:
        raise InputError(
            f"--num-beams {args.num_beams} leaves nothing to chance and --temperature {args.temperature} "
            "does; leave one of them out"
        )
    if args.num_beams > 1 and args.draft is not None:
        raise InputError(
            f"--num-beams {args.num_beams} follows several texts and --draft {args.draft} drafts one; "
            "leave one of them out"
        )
    if args.num_beams > 1 and args.num_return_sequences > args.num_beams:
        raise InputError(
            f"--num-return-sequences {args.num_return_sequences} is more than --num-beams {args.num_beams}"
        )
    model = loading.load(args.model, args.dtype, args.bits, args.adapter)
    ids = model.encode_prompt(prompt)
    (_several if several else _one)(args, model, prompt, ids)


def _one(args: argparse.Namespace, model: Model, prompt: str, ids: list[int]) -> None:
    """Streams one continuation."""
    from llama_jax.text.stop_strings import StopStrings

    def show(text: str) -> None:
        if not args.json:
            print(text, end="", flush=True)

    sampling, key = model.settings(**settings_of(args))
    clock, stops = TokenClock(), StopStrings(args.stop_string)
    tokens: list[int] = []
    pieces: list[str] = []
    clock.tick()
    steps = model.stream_tokens(
        ids, sampling, key, max_new_tokens=args.max_new_tokens, cache_dtype=args.cache_dtype
    )
    for token, text in steps:
        clock.tick()
        shown, stopped = stops.push(text)
        show(shown if tokens else prompt + shown)
        tokens.append(token)
        pieces.append(shown)
        if stopped:
            break
    ended = stops.stopped or tokens[-1] in model.tokenizer.eos_ids
    pieces.append(stops.flush())
    show(pieces[-1] + "\n")

    prefill, decode = clock.rates(len(ids))
    if args.json:
        output.print_json(
            {
                "model": args.model,
                "prompt": prompt,
                "text": "".join(pieces),
                "prompt_tokens": len(ids),
                "tokens": tokens,
                "finish_reason": "stop" if ended else "length",
                "prefill_tokens_per_second": prefill,
                "decode_tokens_per_second": decode,
                "compile_seconds": clock.compiling,
            }
        )
    else:
        speeds = [f"prefill {prefill:.0f} tokens/s ({len(ids)} tokens)"]
        if decode is not None:
            speeds.append(f"decode {decode:.1f} tokens/s ({len(tokens)} tokens)")
        terminal.note(f"{', '.join(speeds)}, compiling {clock.compiling:.1f} s; {_numbers(args)}")


def _several(args: argparse.Namespace, model: Model, prompt: str, ids: list[int]) -> None:
    """Prints what comes whole: several continuations, the best of several, one that was drafted."""
    draft = None if args.draft is None else _draft(args)
    texts: Any
    counts: dict[str, int] = {}
    start = time.perf_counter()
    with terminal.spinner("writing ..."):
        if draft is not None:
            texts, counts = _drafted(args, model, ids, draft)
        else:
            texts = model.generate(
                prompt,
                num_return_sequences=args.num_return_sequences,
                max_new_tokens=args.max_new_tokens,
                stop_strings=args.stop_string,
                num_beams=args.num_beams,
                length_penalty=args.length_penalty,
                cache_dtype=args.cache_dtype,
                **settings_of(args),
            )
    seconds = time.perf_counter() - start
    if args.json:
        output.print_json(
            {
                "model": args.model,
                "prompt": prompt,
                "text": texts[0],
                "texts": texts,
                "prompt_tokens": len(ids),
                "seconds": seconds,
                **counts,
            }
        )
        return
    for index, text in enumerate(texts, 1):
        print(f"[{index}] {prompt}{text}" if len(texts) > 1 else prompt + text)
    terminal.note(f"{seconds:.1f} s, compiling included; {_numbers(args)}")
    if counts:
        terminal.note(
            "{new_tokens} tokens in {rounds} runs of the model; of {drafted} drafts {accepted} were "
            "accepted".format(**counts)
        )


def _draft(args: argparse.Namespace) -> Draft | Model:
    from llama_jax.decoding.drafts import PromptLookup

    return PromptLookup() if args.draft == "prompt" else loading.load(args.draft, args.dtype, args.bits)


def _drafted(
    args: argparse.Namespace, model: Model, ids: list[int], draft: Draft | Model
) -> tuple[list[str], dict[str, int]]:
    """Texts that were drafted, and how many runs of the model they took."""
    import numpy as np

    sampling, key = model.settings(**settings_of(args))
    out = model.speculate(
        [ids] * args.num_return_sequences,
        sampling,
        key,
        draft=draft,
        num_draft_tokens=args.num_draft_tokens,
        max_new_tokens=args.max_new_tokens,
        cache_dtype=args.cache_dtype,
    )
    tokens, lengths = np.asarray(out.generation.tokens), np.asarray(out.generation.lengths)
    texts = [
        model.continuation(ids, row[:length], args.stop_string)
        for row, length in zip(tokens, lengths, strict=True)
    ]
    return texts, {
        "new_tokens": int(lengths.sum()),
        "rounds": int(out.rounds),
        "drafted": int(out.drafted.sum()),
        "accepted": int(out.accepted.sum()),
    }


def _numbers(args: argparse.Namespace) -> str:
    import jax

    weights = args.dtype if args.bits is None else f"{args.bits}-bit weights, {args.dtype}"
    return f"{weights}, {jax.device_count()} {jax.default_backend()} device(s)"


def read_stdin() -> str:
    """Reads a text from stdin.

    Raises:
      InputError: if it is closed, or not UTF-8.
    """
    if sys.stdin is None:
        raise InputError("stdin is closed; give the text as an argument")
    data = sys.stdin.buffer.read()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        where = f"byte {data[error.start]:#04x} at offset {error.start}"
        raise InputError(f"stdin is not UTF-8 text: {where}; convert it first") from None


def _parser() -> ModelParser:
    summary = "Continue a text with a model, printing it as it is produced."
    parser = ModelParser("llama-jax generate", summary, EXAMPLES)
    parser.add_model()
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue; - reads stdin")
    add_settings(parser, max_new_tokens=64)
    option = parser.add_argument_group("how many").add_argument
    option("--num-return-sequences", type=positive, default=1, metavar="N", help="print N texts (default: 1)")
    option(
        "--num-beams",
        type=positive,
        default=1,
        metavar="N",
        help="beam search: follow N texts, print the best",
    )
    option(
        "--length-penalty", type=number, default=1.0, metavar="X", help="of beams; above 0 favours long texts"
    )
    option = parser.add_argument_group("how fast").add_argument
    option(
        "--draft",
        metavar="MODEL",
        help="the same text in fewer runs of the model, by judging drafts of it: 'prompt' copies them from "
        "the text so far, MODEL is a smaller model of the same vocabulary",
    )
    option("--num-draft-tokens", type=positive, default=8, metavar="N", help="drafts a run (default: 8)")
    parser.add_adapter()
    parser.add_dtype()
    parser.add_cache_dtype()
    parser.add_json()
    return parser


class TokenClock:
    """Times the first token and the later ones, without the time that JAX spends on tracing and compiling."""

    def __init__(self) -> None:
        self._compiling: list[tuple[float, float]] = []  # disjoint spans, in order
        self._ticks: list[float] = []
        import jax

        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            end = time.perf_counter()
            start = end - duration_secs
            while self._compiling and self._compiling[-1][0] >= start:  # one program traced inside another
                self._compiling.pop()
            self._compiling.append((start, end))

    @property
    def compiling(self) -> float:
        """Seconds spent on compiling so far."""
        return sum(end - start for start, end in self._compiling)

    def tick(self) -> None:
        """Marks the beginning, and then each token."""
        self._ticks.append(time.perf_counter() - self.compiling)

    def rates(self, prompt_tokens: int) -> tuple[float, float | None]:
        """Returns prefill and decode tokens/s; the latter is None where there was one token only."""
        begin, first, *later = self._ticks
        decode = len(later) / (later[-1] - first) if later else None
        return prompt_tokens / (first - begin), decode
