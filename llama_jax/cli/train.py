"""`llama-jax train`: train a model, or resume a run; a wrapper around `llama_jax.train`."""

from __future__ import annotations

from collections.abc import Sequence


def run(argv: Sequence[str]) -> None:
    """Runs the command."""
    from llama_jax.train import command

    command.run(argv)
