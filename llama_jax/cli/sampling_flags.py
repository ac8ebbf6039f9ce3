"""Sampling and stopping flags, shared by the subcommands that generate text."""

from __future__ import annotations

import argparse
from typing import Any

from llama_jax.console.parser import Parser, parse_float, parse_int, parse_positive_int


def add_sampling_flags(parser: Parser, max_new_tokens: int) -> None:
    """Adds the flags of stopping, of every field of `Sampling`, and of the seed."""
    option = parser.add_argument_group("length and stopping").add_argument
    option(
        "--max-new-tokens",
        type=parse_positive_int,
        default=max_new_tokens,
        metavar="N",
        help=f"generate at most N tokens (default: {max_new_tokens})",
    )
    option(
        "--min-new-tokens", type=parse_int, default=0, metavar="N", help="no EOS before N tokens (default: 0)"
    )
    option(
        "--stop-string", action="append", default=[], metavar="TEXT", help="stop before TEXT; may be repeated"
    )
    option = parser.add_argument_group("sampling").add_argument
    option(
        "--temperature", type=parse_float, default=0.0, metavar="X", help="0 decodes greedily (default: 0)"
    )
    option(
        "--top-k", type=parse_int, default=0, metavar="K", help="sample from the K most likely (default: all)"
    )
    option(
        "--top-p",
        type=parse_float,
        default=1.0,
        metavar="P",
        help="nucleus sampling: the most likely tokens whose probabilities sum to P (default: 1, all)",
    )
    option(
        "--min-p",
        type=parse_float,
        default=0.0,
        metavar="P",
        help="only tokens with at least P times the probability of the most likely one (default: 0)",
    )
    option(
        "--repetition-penalty",
        type=parse_float,
        default=1.0,
        metavar="X",
        help="above 1 penalizes tokens of the prompt and the output (default: 1)",
    )
    option(
        "--presence-penalty",
        type=parse_float,
        default=0.0,
        metavar="X",
        help="-2 to 2; above 0 penalizes generated tokens once each (default: 0)",
    )
    option(
        "--frequency-penalty",
        type=parse_float,
        default=0.0,
        metavar="X",
        help="-2 to 2; above 0 penalizes generated tokens per occurrence (default: 0)",
    )
    option(
        "--no-repeat-ngram-size",
        type=parse_int,
        default=0,
        metavar="N",
        help="no N-gram occurs twice (default: 0, off)",
    )
    option("--suppress-tokens", type=_parse_ids, default=(), metavar="ID,ID", help="ids never to sample")
    option("--forced-tokens", type=_parse_ids, default=(), metavar="ID,ID", help="ids to begin with")
    option("--seed", type=parse_int, default=0, metavar="N", help="random seed (default: 0)")


def sampling_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the keyword arguments of `Model.sampling` from parsed flags."""
    from llama_jax.text.settings import SamplingSettings

    return {name: getattr(args, name) for name in SamplingSettings.__annotations__}


def check_sampling_flags(args: argparse.Namespace) -> None:
    """Checks the flags as far as possible before a model is loaded.

    Raises:
      InputError: for a value out of range, or two that contradict each other.
    """
    from llama_jax.decoding.sampling import Sampling
    from llama_jax.text.stop_strings import StopStrings

    settings = sampling_kwargs(args)
    del settings["seed"]
    Sampling(**settings).check(1)
    StopStrings(args.stop_string)


def _parse_ids(text: str) -> tuple[int, ...]:
    """Parses comma-separated token ids."""
    return tuple(parse_int(part.strip()) for part in text.split(",") if part.strip())
