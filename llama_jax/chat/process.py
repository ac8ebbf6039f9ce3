"""Chat templates to texts, by jinja2 in a process of its own (worker.py)."""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.errors import InputError, TokenizerError
from llama_jax.sandbox.process import Worker

RENDER_TIMEOUT = 2.0  # seconds; a long conversation takes milliseconds
_ADVICE = "give another template (llama-2, llama-3, mistral, chatml, or a file)"


class Renderer:
    """Renders templates in a worker process (worker.py), one per client process.

    The worker starts at the first request, in about 50 ms; then an ordinary conversation takes a fraction of
    a millisecond. Thread-safe: requests are serialized.
    """

    def __init__(self) -> None:
        file = Path(__file__).with_name("worker.py")
        self._worker = Worker(file, "chat templates are rendered", "jinja2", TokenizerError)

    def render(self, name: str, source: str, variables: Mapping[str, Any]) -> str:
        """Renders a template.

        Args:
          name: the template's name in error messages.
          source: the Jinja source.
          variables: the template's variables; JSON values.

        Raises:
          InputError: with the message of the template's `raise_exception`.
          TokenizerError: if it does not render, or exceeds the limits on time or memory.
        """
        request = {"source": source, "variables": variables}
        response, _, timed_out = self._worker.request(request, RENDER_TIMEOUT)
        if timed_out:
            raise TokenizerError(f"{name} took more than {RENDER_TIMEOUT:g} s and was stopped; {_ADVICE}")
        if response is None:
            raise TokenizerError(f"{name} crashed the process that rendered it; {_ADVICE}")
        if "refused" in response:
            raise InputError(f"{name} refuses these messages: {_one_line(response['refused'])}")
        if "error" in response:
            reason = _one_line(response["error"])
            raise TokenizerError(f"{name} does not render: {reason}; fix it, or {_ADVICE}")
        return str(response["text"])

    def close(self) -> None:
        """Kills the worker, if it runs; the next request starts another."""
        self._worker.close()


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200].rstrip(".")


RENDERER = Renderer()
atexit.register(RENDERER.close)
if hasattr(os, "register_at_fork"):  # a forked child must not share the parent's worker
    os.register_at_fork(after_in_child=RENDERER.__init__)  # type: ignore[misc]
