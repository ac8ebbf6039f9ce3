"""`llama-jax serve`: an OpenAI-compatible HTTP server for one model, and a chat page."""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
from collections.abc import Sequence

from llama_jax.cli.arguments import ModelParser
from llama_jax.console import loading, terminal
from llama_jax.console.parser import parse_float, parse_int, parse_positive_int
from llama_jax.errors import InputError

EXAMPLES = """
llama-jax serve smollm2-135m
llama-jax serve smollm2-135m --port 8080 --batch-size 16 --max-length 2048 --cache-dtype bfloat16
LLAMA_JAX_API_KEY=secret llama-jax serve runs/mine --host 0.0.0.0 --name mine
"""
CLIENT = """\
with the official client:
  from openai import OpenAI
  client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
  client.chat.completions.create(model="smollm2-135m", messages=[{"role": "user", "content": "Hello"}])

endpoints: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics (Prometheus), / (a chat page).
Ctrl-C or SIGTERM lets running answers end, for 20 s at most; a second one does not.
"""
_NEEDS = ("starlette", "uvicorn", "prometheus_client")


def run(argv: Sequence[str]) -> None:
    """Runs the command."""
    args = _parser().parse(argv)
    _check(args)

    from llama_jax.serving import server

    with server.bind(args.host, args.port) as bound:
        _serve(args, bound)


def _serve(args: argparse.Namespace, bound: socket.socket) -> None:
    from llama_jax.serving import server
    from llama_jax.serving.app import make_app
    from llama_jax.serving.batcher import Batcher
    from llama_jax.serving.service import Limits, Service

    model = loading.load(args.model, args.dtype, args.bits, args.adapter, args.tokenizer)
    context = model.config.max_position_embeddings
    # Ids that stand for nothing are suppressed in every request.
    num_ids = len(getattr(model.tokenizer, "unused_ids", ())) + 64
    batcher = Batcher(
        model.config,
        model.params,
        batch_size=args.batch_size,
        max_length=min(2048, context) if args.max_length is None else args.max_length,
        max_queue=args.max_queue,
        max_ids=num_ids,
        cache_dtype=args.cache_dtype,
    )
    limits = Limits(
        prompt_tokens=args.max_prompt_tokens, new_tokens=args.max_new_tokens, seconds=args.timeout
    )
    name = args.name or args.model
    service = Service(model, batcher, name, limits=limits, template=args.template)
    with terminal.counting_bars() as update:
        batcher.warm_up(lambda done, number: update("compiling", done, number))

    def started() -> None:
        terminal.note(f"{name} is served at {server.url(bound)} (Ctrl-C ends)")

    with batcher, terminal.warnings_as_notes():
        server.serve(make_app(service, args.api_key), service, bound, started)


def _check(args: argparse.Namespace) -> None:
    """Checks what can be known before a model is loaded.

    Raises:
      InputError: for a missing package, a port or a time out of range.
    """
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"serving needs {', '.join(missing)}: pip install 'llama-jax[serve]'")
    if not 0 <= args.port < 1 << 16:
        raise InputError(f"--port is {args.port}; it must be from 0, any free one, to 65535")
    if not args.timeout > 0:
        raise InputError(f"--timeout is {args.timeout:g}; it must be above 0 seconds")
    args.api_key = os.environ.get("LLAMA_JAX_API_KEY") if args.api_key is None else args.api_key
    if args.api_key == "":
        raise InputError("the API key is empty; give one, or leave --api-key and LLAMA_JAX_API_KEY out")


def _parser() -> ModelParser:
    summary = (
        "Serve a model over HTTP as OpenAI's API does: requests join and leave a running batch at any time."
    )
    parser = ModelParser("llama-jax serve", summary, EXAMPLES)
    parser.add_model()
    parser.epilog = f"{CLIENT}\n{parser.epilog}"
    option = parser.add_argument_group("address and access").add_argument
    option(
        "--host",
        default="127.0.0.1",
        metavar="H",
        help="default: 127.0.0.1, this machine alone; 0.0.0.0 is all",
    )
    option("--port", type=parse_int, default=8000, metavar="N", help="0 is any free one (default: 8000)")
    option(
        "--api-key", metavar="KEY", help="what /v1 requires as a bearer token (default: $LLAMA_JAX_API_KEY)"
    )
    option("--name", metavar="TEXT", help="what clients call the model (default: MODEL)")
    option = parser.add_argument_group("batch and limits").add_argument
    option(
        "--batch-size",
        type=parse_positive_int,
        default=8,
        metavar="B",
        help="texts generated at once (default: 8)",
    )
    option(
        "--max-length",
        type=parse_positive_int,
        metavar="N",
        help="tokens of a prompt and its answer; the cache has B + 1 times this (default: 2048)",
    )
    option(
        "--max-prompt-tokens",
        type=parse_positive_int,
        metavar="N",
        help="of a prompt (default: --max-length)",
    )
    option(
        "--max-new-tokens", type=parse_positive_int, metavar="N", help="of an answer (default: --max-length)"
    )
    option(
        "--max-queue",
        type=parse_positive_int,
        default=64,
        metavar="N",
        help="texts that wait for a row; more are refused with status 429 (default: 64)",
    )
    option(
        "--timeout", type=parse_float, default=600.0, metavar="S", help="seconds of a request (default: 600)"
    )
    templates = "llama-2, llama-3, mistral, chatml, or a Jinja file"
    parser.add_argument("--template", metavar="T", help=f"{templates} (default: the model's own)")
    parser.add_adapter()
    parser.add_tokenizer()
    parser.add_dtype()
    parser.add_cache_dtype()
    return parser
