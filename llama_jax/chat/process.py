"""The client of the process that renders chat templates: starts it once, and kills it after a timeout."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.errors import InputError, TokenizerError

RENDER_TIMEOUT = 2.0  # seconds; a long conversation takes milliseconds
_START_TIMEOUT = 60.0  # seconds, for a busy machine with a slow disk; normally 0.1
_ADVICE = "give another template (llama-2, llama-3, mistral, chatml, or a file)"


class Renderer:
    """Renders templates in a worker process (worker.py), one per client process.

    The worker starts at the first request, in about 50 ms; then an ordinary conversation takes a fraction of
    a millisecond. Thread-safe: requests are serialized.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

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
        request = json.dumps({"source": source, "variables": variables}).encode() + b"\n"
        with self._lock:
            line, timed_out = self._request(request)
        if timed_out:
            raise TokenizerError(f"{name} took more than {RENDER_TIMEOUT:g} s and was stopped; {_ADVICE}")
        if not line.endswith(b"\n"):
            raise TokenizerError(f"{name} crashed the process that rendered it; {_ADVICE}")
        response = json.loads(line)
        if "refused" in response:
            raise InputError(f"{name} refuses these messages: {_one_line(response['refused'])}")
        if "error" in response:
            reason = _one_line(response["error"])
            raise TokenizerError(f"{name} does not render: {reason}; fix it, or {_ADVICE}")
        return response["text"]

    def close(self) -> None:
        """Kills the worker, if it runs; the next request starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _request(self, request: bytes) -> tuple[bytes, bool]:
        """Returns the response line, and whether the request timed out; any failure kills the worker."""
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = self._start()
        line, timed_out = b"", True
        try:
            line, timed_out = _exchange(self._process, request, RENDER_TIMEOUT)
        finally:
            if timed_out or not line.endswith(b"\n"):  # also after Ctrl-C: a late response would be stale
                self.close()
        return line, timed_out

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", str(Path(__file__).with_name("worker.py")), f"{RENDER_TIMEOUT:.0f}"]
        paths = os.pathsep.join(filter(None, sys.path))  # so that the worker imports the same jinja2
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": paths},
            )
        except OSError as error:
            raise TokenizerError(
                f"chat templates are rendered in a second Python process, and {sys.executable!r} cannot be "
                f"started ({error.strerror or error}); check sys.executable"
            ) from None
        started = False
        try:
            started = _exchange(process, b"", _START_TIMEOUT) == (b"ready\n", False)
        finally:
            if not started:
                process.kill()
                process.communicate()
        if not started:
            raise TokenizerError(
                "the Python process that renders chat templates exited at startup; check that it can "
                "`import jinja2`"
            )
        return process


def _exchange(process: subprocess.Popen[bytes], request: bytes, timeout: float) -> tuple[bytes, bool]:
    """Writes a request and reads a line; returns the line, and whether the process was killed by timeout."""
    assert process.stdin is not None
    assert process.stdout is not None
    line, timed_out = b"", threading.Event()

    def kill() -> None:
        timed_out.set()
        process.kill()

    timer = threading.Timer(timeout, kill)
    timer.daemon = True
    timer.start()
    try:
        process.stdin.write(request)
        process.stdin.flush()
        line = process.stdout.readline()
    except OSError:  # the process has exited
        pass
    finally:
        timer.cancel()
        timer.join()
    return line, timed_out.is_set()


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200].rstrip(".")


RENDERER = Renderer()
atexit.register(RENDERER.close)
if hasattr(os, "register_at_fork"):  # a forked child must not share the parent's worker
    os.register_at_fork(after_in_child=RENDERER.__init__)  # type: ignore[misc]
