"""Forks processes from a server that has imported JAX and the trainer but has not initialized a backend.

Such a process is a real one (its own signals, exit status, devices), without the seconds of imports that
`python -m llama_jax.train` starts with. `ForkServer` is the client; the module is run as the server, with a
Unix socket as its stdin. A `Worker` is such a process that runs many commands, and compiles what they share
once.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
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
        self._workers: dict[tuple[int, int], Worker] = {}
        self._server = subprocess.Popen(
            [sys.executable, "-m", __spec__.name], stdin=theirs, env=environment, cwd=ROOT
        )
        theirs.close()

    def start(
        self,
        function: str,
        arguments: Sequence[object],
        *,
        devices: int,
        cwd: Path,
        stdin: int | None = None,
    ) -> Process:
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
        descriptors.append(os.open(os.devnull, os.O_RDONLY) if stdin is None else stdin)
        socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        return Process(status, *paths)

    def worker(self, devices: int, number: int) -> Worker:
        """The worker of this number of devices and this number; a new one if it has died."""
        worker = self._workers.get((devices, number))
        if worker is None or worker.process.poll() is not None:
            worker = self._workers[devices, number] = Worker(self, devices)
        return worker

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()
        self._socket.close()
        self._server.wait()


class Worker:
    """A process that runs commands until it is closed."""

    def __init__(self, server: ForkServer, devices: int) -> None:
        self._socket, theirs = socket.socketpair()
        function = f"{__spec__.name}:run_commands"
        self.process = server.start(function, [], devices=devices, cwd=ROOT, stdin=theirs.detach())
        self._replies = self._socket.makefile("r")

    def run(self, argv: Sequence[object], cwd: Path, timeout: float = 120) -> tuple[int, str, str]:
        """Runs a command line of `llama-jax` in a folder; returns its exit status, stdout and stderr."""
        before = [path.stat().st_size for path in (self.process.out, self.process.err)]
        self._socket.settimeout(timeout)
        try:
            self._socket.sendall(json.dumps([str(cwd), *map(str, argv)]).encode() + b"\n")
            reply = self._replies.readline()
        except OSError:
            self.process.kill()
            raise
        out, err = (
            path.read_bytes()[start:].decode()
            for path, start in zip((self.process.out, self.process.err), before, strict=True)
        )
        assert reply, f"the worker died:\n{err}"
        return int(reply), out, err

    def close(self) -> None:
        self._replies.close()
        self._socket.close()
        self.process.wait(30)


def xla_flags(devices: int) -> str:
    """Those of the tests, with another number of devices."""
    return os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")


def serve(requests: socket.socket) -> dict[str, Any] | None:
    """Forks for each request, and returns it in the new process; returns None when the client has ended."""
    while True:
        message, descriptors, *_ = socket.recv_fds(requests, 1 << 16, 4)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG if message else 0)[0]:
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


def report(status: int, out: int, err: int, stdin: int) -> bool:
    """Forks: the child returns True; the parent writes the child's process id and, later, its exit status."""
    if child := os.fork():
        os.write(status, b"%d\n" % child)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(status, b"%d\n" % code)
        return False
    os.close(status)
    for source, target in ((stdin, 0), (out, 1), (err, 2)):
        os.dup2(source, target)
        os.close(source)
    return True


def run_commands(_: Sequence[str]) -> int:
    """Runs command lines of `llama-jax` in this process; replies to each with its exit status.

    stdin is a socket; a request is a line of JSON: the folder to run in, then the arguments.
    """
    from llama_jax import cli
    from llama_jax.train.metrics import peak_flops

    # Of the machine; it takes a quarter of a second.
    peak_flops._measured_flops = functools.cache(peak_flops._measured_flops)

    requests = socket.socket(fileno=0)
    for line in requests.makefile("r"):
        folder, *argv = json.loads(line)
        os.chdir(folder)
        try:
            status = cli.main(argv)
        except Exception:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        requests.sendall(b"%d\n" % status)
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
