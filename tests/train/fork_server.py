"""Forks processes from a server that has imported JAX and the trainer but has not initialized a backend.

Such a process is a real one (its own signals, exit status, devices), without the seconds of imports that
`python -m llama_jax.train` starts with. `ForkServer` is the client; the module is run as the server, with a
Unix socket as its stdin.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# What a training process imports. None initializes a backend, which would not survive a fork.
PRELOADED = ("llama_jax.cli", "llama_jax.train.command", "llama_jax.train.launch")


class Process:
    """The part of `subprocess.Popen` that tests use; stdout and stderr are written to files."""

    def __init__(self, status: int, out: Path, err: Path) -> None:
        self._status, self.out, self.err = os.fdopen(status, "rb", buffering=0), out, err
        self.pid = int(self._status.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, or None while the process runs; minus the signal if one killed it."""
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.returncode = json.loads(self._status.readline())
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and not select.select([self._status], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        status = self.poll()
        assert status is not None
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for the end; returns stdout and stderr."""
        self.wait(timeout)
        return self.out.read_text(), self.err.read_text()


class ForkServer:
    """Starts the server, which ends with the test session.

    Attributes:
      environment: of all processes, but for the number of devices.
    """

    def __init__(self, environment: Mapping[str, str], folder: Path) -> None:
        self._socket, theirs = socket.socketpair()
        self.environment, self._folder, self._count = environment, folder, 0
        self._server = subprocess.Popen(
            [sys.executable, "-m", __spec__.name], stdin=theirs, env=environment, cwd=ROOT
        )
        theirs.close()

    def start(self, function: str, arguments: Sequence[object], *, devices: int, cwd: Path) -> Process:
        """Calls a function, `module:name`, in a new process, which exits with the status it returns."""
        self._count += 1
        request = {
            "function": function,
            "arguments": list(map(str, arguments)),
            "xla_flags": xla_flags(devices),
            "cwd": str(cwd),
        }
        paths = [self._folder / f"{self._count}.{name}" for name in ("out", "err")]
        status, childs_end = os.pipe()
        descriptors = [childs_end, *(os.open(path, os.O_CREAT | os.O_WRONLY) for path in paths)]
        socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        return Process(status, *paths)

    def close(self) -> None:
        self._socket.close()
        self._server.wait()


def xla_flags(devices: int) -> str:
    """Those of the tests, with another number of devices."""
    return os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")


def serve(requests: socket.socket) -> dict[str, Any] | None:
    """Forks for each request, and returns it in the new process; returns None when the client has ended."""
    while True:
        message, descriptors, *_ = socket.recv_fds(requests, 1 << 16, 3)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not message:
            return None
        if os.fork() == 0:
            requests.close()
            if report(*descriptors):
                return json.loads(message)
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


def report(status: int, out: int, err: int) -> bool:
    """Forks: the child returns True; the parent writes the child's process id and, later, its exit status."""
    if child := os.fork():
        os.write(status, b"%d\n" % child)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(status, b"%d\n" % code)
        return False
    os.close(status)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for source, target in ((out, 1), (err, 2)):
        os.dup2(source, target)
        os.close(source)
    return True


def run_commands(arguments: Sequence[str]) -> int:
    """Runs command lines of `llama-jax`, given in JSON, one after the other in this process.

    On stdout each is followed by NUL, its exit status and NUL; on stderr by NUL.
    """
    from llama_jax import cli

    for argv in json.loads(arguments[0]):
        print(f"\0{cli.main(argv)}\0", end="", flush=True)
        print("\0", end="", file=sys.stderr, flush=True)
    return 0


def main() -> int:
    """Serves; in a process that was forked, calls its function."""
    for module in PRELOADED:
        importlib.import_module(module)
    gc.freeze()  # collections in a child neither visit nor copy what was imported here
    gc.set_threshold(50_000, 20, 50)
    request = serve(socket.socket(fileno=0))
    if request is None:
        return 0
    os.chdir(request["cwd"])
    os.environ["XLA_FLAGS"] = request["xla_flags"]
    module, _, name = request["function"].partition(":")
    return getattr(importlib.import_module(module), name)(request["arguments"])


if __name__ == "__main__":
    sys.exit(main())
