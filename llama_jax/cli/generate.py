"""`llama-jax generate`: continue a prompt, streaming the text to stdout."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llama_jax.cli import output
from llama_jax.cli.arguments import ModelParser, read_stdin
from llama_jax.cli.grammar_flags import add_grammar_flags, grammar_kwargs
from llama_jax.cli.sampling_flags import add_sampling_flags, check_sampling_flags, sampling_kwargs
from llama_jax.console import loading, terminal
from llama_jax.console.parser import parse_float, parse_positive_int
from llama_jax.errors import InputError

if TYPE_CHECKING:
    from llama_jax.decoding.constraints import Grammar
    from llama_jax.decoding.drafts import Draft
    from llama_jax.text.model import Model

EXAMPLES = """
llama-jax generate smollm2-135m --prompt "The capital of France is"
llama-jax generate smollm2-135m --prompt "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 7
llama-jax generate smollm2-135m --prompt "The best way to learn is" --num-beams 4 --max-new-tokens 16
llama-jax generate smollm2-135m --prompt "Once upon a time" --bits 8 --cache-dtype int8
llama-jax generate smollm2-135m --prompt-lookup --prompt "one two three four five six, one two three"
llama-jax generate smollm2-135m --adapter runs/lora --prompt "Once upon a time"
llama-jax generate smollm2-135m --prompt "The capital of France is " --choices Paris,London
llama-jax generate smollm2-135m --prompt "A cat, as JSON: " --json-schema cat.json
llama-jax generate smollm2-135m --prompt - --json < question.txt
"""


def run(argv: Sequence[str]) -> None:
    """Runs the command."""
    args = _parser().parse(argv)
    prompt = read_stdin() if args.prompt == "-" else args.prompt
    check_sampling_flags(args)
    speculative = args.prompt_lookup or args.draft_model is not None
    if args.num_beams > 1 and args.temperature > 0:
        raise InputError(
            f"--num-beams {args.num_beams} is deterministic and --temperature {args.temperature} samples; "
            "leave one of them out"
        )
    if args.num_beams > 1 and speculative:
        flag = "--prompt-lookup" if args.prompt_lookup else f"--draft-model {args.draft_model}"
        raise InputError(
            f"--num-beams {args.num_beams} does not support speculative decoding ({flag}); "
            "leave one of them out"
        )
    if args.num_beams > 1 and args.num_return_sequences > args.num_beams:
        raise InputError(
            f"--num-return-sequences {args.num_return_sequences} is more than --num-beams "
            f"{args.num_beams}; raise --num-beams"
        )
    structured = grammar_kwargs(args)
    model = loading.load(args.model, args.dtype, args.bits, args.adapter, args.tokenizer, args.mesh)
    ids = model.encode_prompt(prompt, parse_special=args.parse_special)
    grammar = None
    if structured:
        from llama_jax.structured_output.build import grammar as build_grammar

        grammar = build_grammar(model.tokenizer, **structured)
    with terminal.warnings_as_notes():
        if speculative or args.num_beams > 1 or args.num_return_sequences > 1:
            _generate_whole(args, model, prompt, ids, grammar)
        else:
            _stream(args, model, prompt, ids, grammar)


def _stream(
    args: argparse.Namespace, model: Model, prompt: str, ids: list[int], grammar: Grammar | None
) -> None:
    """Prints one continuation as it is generated."""
    from llama_jax.text.stop_strings import StopStrings, split_stop_strings

    def write(text: str) -> None:
        if not args.json:
            terminal.write(text)

    sampling, key = model.sampling(**sampling_kwargs(args))
    end_ids, stop_strings = split_stop_strings(model.tokenizer, args.stop_string)
    clock, stops = TokenClock(), StopStrings(stop_strings)
    tokens: list[int] = []
    pieces: list[str] = []
    clock.tick()
    limits: Any = {"max_new_tokens": args.max_new_tokens, "end_ids": end_ids}
    limits |= {"cache_dtype": args.cache_dtype, "grammar": grammar}
    for token, text in terminal.spin_until_first(lambda: model.stream_tokens(ids, sampling, key, **limits)):
        clock.tick()
        visible, stopped = stops.push(text)
        write(visible if tokens else prompt + visible)
        tokens.append(token)
        pieces.append(visible)
        if stopped:
            break
    ended = stops.stopped or tokens[-1] in end_ids
    pieces.append(stops.flush())
    write(pieces[-1] + "\n")

    if grammar is not None and not ended:
        terminal.note("the text is unfinished: --max-new-tokens ended it; raise that")
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
        terminal.note(
            f"{', '.join(speeds)}, compiling {clock.compiling:.1f} s; {_precision_and_devices(args)}"
        )


def _generate_whole(
    args: argparse.Namespace, model: Model, prompt: str, ids: list[int], grammar: Grammar | None
) -> None:
    """Prints continuations that are not streamed: several samples, beam search, speculative decoding."""
    draft = _load_draft(args)
    texts: Any
    counts: dict[str, int] = {}
    start = time.perf_counter()
    with terminal.spinner("generating ..."):
        if draft is not None:
            texts, counts = _speculate(args, model, ids, draft, grammar)
        else:
            texts = model.generate(
                prompt,
                parse_special=args.parse_special,
                num_return_sequences=args.num_return_sequences,
                max_new_tokens=args.max_new_tokens,
                stop_strings=args.stop_string,
                num_beams=args.num_beams,
                length_penalty=args.length_penalty,
                cache_dtype=args.cache_dtype,
                **({} if grammar is None else {"grammar": grammar}),
                **sampling_kwargs(args),
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
        terminal.write((f"[{index}] {prompt}{text}" if len(texts) > 1 else prompt + text) + "\n")
    terminal.note(f"{seconds:.1f} s including compilation; {_precision_and_devices(args)}")
    if counts:
        terminal.note(
            "{new_tokens} tokens in {rounds} forward passes; {accepted} of {drafted} draft tokens "
            "accepted".format(**counts)
        )


def _load_draft(args: argparse.Namespace) -> Draft | Model | None:
    from llama_jax.decoding.drafts import PromptLookup

    if args.prompt_lookup:
        return PromptLookup()
    if args.draft_model is None:
        return None
    return loading.load(args.draft_model, args.dtype, args.bits, tokenizer=args.tokenizer, mesh=args.mesh)


def _speculate(
    args: argparse.Namespace, model: Model, ids: list[int], draft: Draft | Model, grammar: Grammar | None
) -> tuple[list[str], dict[str, int]]:
    """Returns the texts of speculative decoding, and its counts of forward passes and draft tokens."""
    import numpy as np

    from llama_jax.text.stop_strings import split_stop_strings

    sampling, key = model.sampling(**sampling_kwargs(args))
    end_ids, stop_strings = split_stop_strings(model.tokenizer, args.stop_string)
    out = model.speculate(
        [ids] * args.num_return_sequences,
        sampling,
        key,
        draft=draft,
        num_draft_tokens=args.num_draft_tokens,
        max_new_tokens=args.max_new_tokens,
        end_ids=end_ids,
        cache_dtype=args.cache_dtype,
        grammar=grammar,
    )
    tokens, lengths = np.asarray(out.output.tokens), np.asarray(out.output.lengths)
    texts = [
        model.continuation(ids if grammar is None else [], row[:length], stop_strings)
        for row, length in zip(tokens, lengths, strict=True)
    ]
    return texts, {
        "new_tokens": int(lengths.sum()),
        "rounds": int(out.rounds),
        "drafted": int(out.drafted.sum()),
        "accepted": int(out.accepted.sum()),
    }


def _precision_and_devices(args: argparse.Namespace) -> str:
    import jax

    weights = args.dtype if args.bits is None else f"{args.bits}-bit weights, {args.dtype}"
    return f"{weights}, {jax.device_count()} {jax.devices()[0].platform} device(s)"


def _parser() -> ModelParser:
    summary = "Continue a prompt with a model, streaming the text to stdout."
    parser = ModelParser("llama-jax generate", summary, EXAMPLES)
    parser.add_model()
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue; - reads stdin")
    parser.add_argument(
        "--no-parse-special",
        dest="parse_special",
        action="store_false",
        help="read control tokens in the prompt, such as <|im_start|>, as ordinary text",
    )
    add_sampling_flags(parser, max_new_tokens=64)
    add_grammar_flags(parser)
    option = parser.add_argument_group("number of sequences").add_argument
    option(
        "--num-return-sequences",
        type=parse_positive_int,
        default=1,
        metavar="N",
        help="print N texts (default: 1)",
    )
    option(
        "--num-beams",
        type=parse_positive_int,
        default=1,
        metavar="N",
        help="beam search with N beams; prints the best (default: 1, off)",
    )
    option(
        "--length-penalty",
        type=parse_float,
        default=1.0,
        metavar="X",
        help="length penalty of beam search; above 0 favors longer texts (default: 1)",
    )
    group = parser.add_argument_group("speculative decoding (fewer forward passes; the text is not streamed)")
    option = group.add_mutually_exclusive_group().add_argument
    option("--prompt-lookup", action="store_true", help="copy draft tokens from the prompt and the output")
    option(
        "--draft-model",
        metavar="MODEL",
        help="propose draft tokens with a smaller model of the same vocabulary",
    )
    group.add_argument(
        "--num-draft-tokens",
        type=parse_positive_int,
        default=8,
        metavar="N",
        help="draft tokens per forward pass (default: 8)",
    )
    parser.replacements["--draft"] = "--prompt-lookup or --draft-model MODEL"
    parser.add_adapter()
    parser.add_tokenizer()
    parser.add_dtype()
    parser.add_cache_dtype()
    parser.add_mesh()
    parser.add_json()
    return parser


class TokenClock:
    """Measures the time to the first token and of the later ones, excluding JAX's tracing and compilation."""

    def __init__(self) -> None:
        import jax

        self._compile_spans: list[tuple[float, float]] = []  # (start, end), disjoint and sorted
        self._ticks: list[float] = []
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            end = time.perf_counter()
            start = end - duration_secs
            while self._compile_spans and self._compile_spans[-1][0] >= start:  # nested: inner jit functions
                self._compile_spans.pop()
            self._compile_spans.append((start, end))

    @property
    def compiling(self) -> float:
        """Seconds spent on compilation so far."""
        return sum(end - start for start, end in self._compile_spans)

    def tick(self) -> None:
        """Records a time stamp: called once at the start, then after each token."""
        self._ticks.append(time.perf_counter() - self.compiling)

    def rates(self, prompt_tokens: int) -> tuple[float, float | None]:
        """Returns prefill and decode rates in tokens/s; the latter is None if there was only one token."""
        start, first, *later = self._ticks
        decode = len(later) / (later[-1] - first) if later else None
        return prompt_tokens / (first - start), decode
