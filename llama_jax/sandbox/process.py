"""The client of a worker process: starts it once, and kills it after a timeout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.errors import LlamaJaxError

_START_TIMEOUT = 60.0  # seconds, for a busy machine with a slow disk; normally 0.1 or 0.2


class Answer(NamedTuple):
    """The answer to a request.

    Attributes:
      response: None if there is none: the worker was killed, or crashed.
      data: the bytes that came with it.
      timed_out: whether it was killed for taking too long.
    """

    response: dict[str, Any] | None
    data: bytes
    timed_out: bool


class Worker:
    """A worker process (worker.py), one per client process, which starts at the first request.

    Thread-safe: requests are serialized.
    """

    def __init__(self, responder: Path, task: str, library: str, error: type[LlamaJaxError]) -> None:
        """Starts nothing yet.

        Args:
          responder: the Python file with `respond` and `MAX_MEMORY`.
          task: what is done there, for messages: "chat templates are rendered".
          library: what it imports.
          error: raised if it cannot be started.
        """
        self._responder, self._task, self._library, self._error = responder, task, library, error
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def request(self, value: Any, timeout: float) -> Answer:
        """Sends a JSON value, and waits for the answer; any failure kills the worker.

        Args:
          value: the request.
          timeout: in seconds.
        """
        request = json.dumps(value).encode() + b"\n"
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self.close()
                self._process = self._start(timeout)
            answer = None
            try:
                answer = _exchange(self._process, request, timeout)
            finally:
                if answer is None or answer.response is None:  # after Ctrl-C a late answer would be stale
                    self.close()
        return answer

    def close(self) -> None:
        """Kills the worker, if it runs; the next request starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _start(self, timeout: float) -> subprocess.Popen[bytes]:
        worker = str(Path(__file__).with_name("worker.py"))
        command = [sys.executable, "-P", worker, f"{timeout:.0f}", str(self._responder)]
        paths = os.pathsep.join(filter(None, sys.path))  # so that the worker imports the same libraries
        single = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), "1")  # threads take address space
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **single, "PYTHONPATH": paths},
            )
        except OSError as error:
            raise self._error(
                f"{self._task} in a second Python process, and {sys.executable!r} cannot be started "
                f"({error.strerror or error}); check sys.executable"
            ) from None
        assert process.stdout is not None
        started, timer = False, _killing(process, _START_TIMEOUT)
        try:
            started = process.stdout.readline() == b"ready\n"
        finally:
            timer.cancel()
            if not started:
                process.kill()
                process.communicate()
        if not started:
            raise self._error(
                f"the Python process in which {self._task} exited at startup; check that it can "
                f"`import {self._library}`"
            )
        return process


def _exchange(process: subprocess.Popen[bytes], request: bytes, timeout: float) -> Answer:
    assert process.stdin is not None
    assert process.stdout is not None
    timed_out = threading.Event()
    timer, response, data = _killing(process, timeout, timed_out), None, b""
    try:
        process.stdin.write(request)
        process.stdin.flush()
        line = process.stdout.readline()
        if line.endswith(b"\n"):
            header = json.loads(line)
            data = process.stdout.read(header["bytes"])
            response = header["response"] if len(data) == header["bytes"] else None
    except OSError:  # the process has exited
        pass
    finally:
        timer.cancel()
        timer.join()
    return Answer(None if timed_out.is_set() else response, data, timed_out.is_set())


def _killing(
    process: subprocess.Popen[bytes], timeout: float, timed_out: threading.Event | None = None
) -> threading.Timer:
    """A timer that has been started and kills the process."""

    def kill() -> None:
        if timed_out is not None:
            timed_out.set()
        process.kill()

    timer = threading.Timer(timeout, kill)
    timer.daemon = True
    timer.start()
    return timer
