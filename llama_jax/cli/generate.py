"""`llama-jax generate`: continue a text, printing it as it is produced."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llama_jax.cli import output
from llama_jax.cli.parser import Parser, number, positive, whole
from llama_jax.errors import InputError

EXAMPLES = """
llama-jax generate smollm2-135m --prompt "The capital of France is"
llama-jax generate smollm2-135m --prompt "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 7
llama-jax generate smollm2-135m --prompt - --json < question.txt
"""


def run(argv: Sequence[str]) -> None:
    """Runs the command."""
    args = _parser().parse(argv)
    prompt = read_stdin() if args.prompt == "-" else args.prompt

    import jax

    from llama_jax.cli.clock import TokenClock
    from llama_jax.sampling import Sampling

    sampling = Sampling(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
    )
    sampling.check(1)
    model = output.load(args.model, args.dtype)
    ids = model.encode_prompt(prompt)

    def show(text: str) -> None:
        if not args.json:
            print(text, end="", flush=True)

    clock = TokenClock()
    tokens: list[int] = []
    pieces: list[str] = []
    clock.tick()
    for token, text in model.stream_tokens(ids, sampling, max_new_tokens=args.max_new_tokens, seed=args.seed):
        clock.tick()
        show(text if tokens else prompt + text)
        tokens.append(token)
        pieces.append(text)
    show("\n")

    prefill, decode = clock.rates(len(ids))
    if args.json:
        output.print_json(
            {
                "model": args.model,
                "prompt": prompt,
                "text": "".join(pieces),
                "prompt_tokens": len(ids),
                "tokens": tokens,
                "finish_reason": "stop" if tokens[-1] in model.tokenizer.eos_ids else "length",
                "prefill_tokens_per_second": prefill,
                "decode_tokens_per_second": decode,
                "compile_seconds": clock.compiling,
            }
        )
    else:
        speeds = [f"prefill {prefill:.0f} tokens/s ({len(ids)} tokens)"]
        if decode is not None:
            speeds.append(f"decode {decode:.1f} tokens/s ({len(tokens)} tokens)")
        output.note(
            f"{', '.join(speeds)}, compiling {clock.compiling:.1f} s; {args.dtype}, "
            f"{jax.device_count()} {jax.default_backend()} device(s)"
        )


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


def _parser() -> Parser:
    summary = "Continue a text with a model, printing it as it is produced."
    parser = Parser("llama-jax generate", summary, EXAMPLES)
    parser.add_model()
    option = parser.add_argument
    option("--prompt", required=True, metavar="TEXT", help="the text to continue; - reads stdin")
    option("--max-new-tokens", type=positive, default=64, metavar="N", help="stop after N (default: 64)")
    option("--temperature", type=number, default=0.0, metavar="X", help="0 (default): always the likeliest")
    option("--top-k", type=whole, default=0, metavar="K", help="draw from the K likeliest (default: all)")
    option("--top-p", type=number, default=1.0, metavar="P", help="draw from the likeliest that sum to P")
    option(
        "--min-p", type=number, default=0.0, metavar="P", help="none less than P times as likely as the first"
    )
    option("--repetition-penalty", type=number, default=1.0, metavar="X", help="above 1: repeat tokens less")
    option("--seed", type=whole, default=0, metavar="N", help="of the random choices (default: 0)")
    parser.add_dtype()
    parser.add_json()
    return parser
