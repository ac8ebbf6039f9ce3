"""The process that renders chat templates, seen from the library: started once, killed when it is late."""

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

SECONDS = 2.0  # that one rendering may take; a long conversation takes milliseconds
_SECONDS_TO_START = 60.0  # on a busy machine with a slow disk; otherwise 0.1
_ELSE = "give another template (llama-2, chatml, or a file)"


class Renderer:
    """Renders templates in a process of its own, one for each process that asks (worker.py).

    It starts at the first request, in about 50 ms, and then takes a fraction of a millisecond for an
    ordinary conversation. Threads take turns.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, name: str, source: str, variables: Mapping[str, Any]) -> str:
        """Returns the text that a template makes of its variables.

        Args:
          name: what errors call the template.
          source: the template, in Jinja.
          variables: what it may use; JSON values.

        Raises:
          InputError: with what the template itself says is wrong with the messages.
          TokenizerError: if it does not render, or takes more than its share of time or memory.
        """
        request = json.dumps({"source": source, "variables": variables}).encode() + b"\n"
        with self._lock:
            line, late = self._exchange(request)
        if late:
            raise TokenizerError(f"{name} took more than {SECONDS:g} s and was stopped; {_ELSE}")
        if not line.endswith(b"\n"):
            raise TokenizerError(f"{name} crashed the process that rendered it; {_ELSE}")
        answer = json.loads(line)
        if "refused" in answer:
            raise InputError(f"{name} refuses these messages: {_one_line(answer['refused'])}")
        if "error" in answer:
            raise TokenizerError(f"{name} does not render: {_one_line(answer['error'])}; mend it, or {_ELSE}")
        return answer["text"]

    def close(self) -> None:
        """Ends the process, if there is one; the next request starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _exchange(self, request: bytes) -> tuple[bytes, bool]:
        """Returns the answer, and whether it came too late; whatever goes wrong ends the process."""
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = self._start()
        line, late = b"", True
        try:
            line, late = _ask(self._process, request, SECONDS)
        finally:
            if late or not line.endswith(b"\n"):  # also after Ctrl-C, when an answer may still come
                self.close()
        return line, late

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", str(Path(__file__).with_name("worker.py")), f"{SECONDS:.0f}"]
        paths = os.pathsep.join(filter(None, sys.path))  # jinja2 is where it is for this process
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
                f"chat templates are rendered by a second Python, and {sys.executable!r} cannot be started "
                f"({error.strerror or error}); see that sys.executable names it"
            ) from None
        started = False
        try:
            started = _ask(process, b"", _SECONDS_TO_START) == (b"ready\n", False)
        finally:
            if not started:
                process.kill()
                process.communicate()
        if not started:
            raise TokenizerError(
                "the Python that renders chat templates ended at once; see that it can `import jinja2`"
            )
        return process


def _ask(process: subprocess.Popen[bytes], request: bytes, seconds: float) -> tuple[bytes, bool]:
    """Returns a line that the process answers, and whether it was killed for taking too long."""
    assert process.stdin is not None
    assert process.stdout is not None
    line, late = b"", threading.Event()

    def kill() -> None:
        late.set()
        process.kill()

    deadline = threading.Timer(seconds, kill)
    deadline.daemon = True
    deadline.start()
    try:
        process.stdin.write(request)
        process.stdin.flush()
        line = process.stdout.readline()
    except OSError:  # it is gone
        pass
    finally:
        deadline.cancel()
        deadline.join()
    return line, late.is_set()


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200].rstrip(".")


RENDERER = Renderer()
atexit.register(RENDERER.close)
if hasattr(os, "register_at_fork"):  # a copy of the pipes is no second process
    os.register_at_fork(after_in_child=RENDERER.__init__)  # type: ignore[misc]
