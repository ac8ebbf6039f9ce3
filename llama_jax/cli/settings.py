"""The flags that say how to choose each token, shared by the verbs that write text."""

from __future__ import annotations

import argparse
from typing import Any

from llama_jax.console.parser import Parser, number, positive, whole


def add_settings(parser: Parser, max_new_tokens: int) -> None:
    """Adds the flags of every setting, those of stopping, and the seed's."""
    how_long = parser.add_argument_group("how long")
    option = how_long.add_argument
    option(
        "--max-new-tokens",
        type=positive,
        default=max_new_tokens,
        metavar="N",
        help=f"stop after N tokens (default: {max_new_tokens})",
    )
    option("--min-new-tokens", type=whole, default=0, metavar="N", help="no end of text before N tokens")
    option(
        "--stop-string", action="append", default=[], metavar="TEXT", help="end before TEXT; may be repeated"
    )
    option = parser.add_argument_group("which tokens").add_argument
    option("--temperature", type=number, default=0.0, metavar="X", help="0 (default): always the likeliest")
    option("--top-k", type=whole, default=0, metavar="K", help="draw from the K likeliest (default: all)")
    option("--top-p", type=number, default=1.0, metavar="P", help="draw from the likeliest that sum to P")
    option(
        "--min-p", type=number, default=0.0, metavar="P", help="none less than P times as likely as the first"
    )
    option("--repetition-penalty", type=number, default=1.0, metavar="X", help="above 1: repeat tokens less")
    option(
        "--presence-penalty", type=number, default=0.0, metavar="X", help="-2 to 2; above 0: new tokens more"
    )
    option(
        "--frequency-penalty", type=number, default=0.0, metavar="X", help="the same for each time it came"
    )
    option(
        "--no-repeat-ngram-size", type=whole, default=0, metavar="N", help="no N tokens come twice in a row"
    )
    option(
        "--suppress-tokens", type=_ids, default=(), metavar="ID,ID", help="token ids that are never chosen"
    )
    option("--forced-tokens", type=_ids, default=(), metavar="ID,ID", help="token ids to begin with")
    option("--seed", type=whole, default=0, metavar="N", help="of the random choices (default: 0)")


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What `Model.settings` takes, from parsed flags."""
    from llama_jax.text.model import Settings

    return {name: getattr(args, name) for name in Settings.__annotations__}


def check_settings(args: argparse.Namespace) -> None:
    """Checks what can be checked of the flags before a model is loaded.

    Raises:
      InputError: for a value out of range, or two that contradict each other.
    """
    from llama_jax.decoding.sampling import Sampling
    from llama_jax.text.stop_strings import StopStrings

    settings = settings_of(args)
    del settings["seed"]
    Sampling(**settings).check(1)
    StopStrings(args.stop_string)


def _ids(text: str) -> tuple[int, ...]:
    """Reads token ids with commas between them."""
    return tuple(whole(part.strip()) for part in text.split(",") if part.strip())
