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
llama-jax models --check
"""


def run(argv: Sequence[str]) -> None:
    """Runs the command."""
    parser = Parser("llama-jax models", "List the known models.", EXAMPLES)
    parser.add_argument(
        "--check", action="store_true", help="check the cached files against their published SHA-256"
    )
    parser.add_json()
    args = parser.parse(argv)
    if args.check:
        for name in filter(known.is_cached, known.KNOWN):
            with terminal.progress_bar(f"checking {name}") as progress:
                known.verify(name, progress)
    if args.json:
        checked = {"intact": True} if args.check else {}
        described = [_describe(model) for model in known.KNOWN.values()]
        output.print_json({"models": [row | (checked if row["cached"] else {}) for row in described]})
        return
    for model in known.KNOWN.values():
        intact = ", intact" if args.check else ""
        status = f"cached{intact}: {model.path}" if known.is_cached(model.name) else "downloaded on first use"
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
