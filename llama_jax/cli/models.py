"""`llama-jax models`: the known models, with their sources and licenses, and which are cached."""

from __future__ import annotations

from collections.abc import Sequence

from llama_jax.cli import output
from llama_jax.console import terminal
from llama_jax.console.parser import Parser
from llama_jax.hub import known

EXAMPLES = """
llama-jax models
llama-jax models --json
"""


def run(argv: Sequence[str]) -> None:
    """Runs the command."""
    parser = Parser("llama-jax models", "List the known models.", EXAMPLES)
    parser.add_json()
    args = parser.parse(argv)
    if args.json:
        output.print_json({"models": [_describe(model) for model in known.KNOWN.values()]})
        return
    for model in known.KNOWN.values():
        status = f"cached: {model.path}" if known.is_cached(model.name) else "downloaded on first use"
        print(
            f"{model.name}\n"
            f"  {model.summary}\n"
            f"  license   {model.license}\n"
            f"  source    the wheel of {model.requirement}, {terminal.human_bytes(model.wheel_size)}\n"
            f"  {status}"
        )


def _describe(model: known.KnownModel) -> dict[str, object]:
    cached = known.is_cached(model.name)
    return {
        "name": model.name,
        "summary": model.summary,
        "licence": model.license,
        "requirement": model.requirement,
        "download_bytes": model.wheel_size,
        "bytes": model.size,
        "sha256": model.sha256,
        "cached": cached,
        "path": str(model.path) if cached else None,
    }
