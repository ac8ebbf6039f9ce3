"""Runs the application on a socket until a signal ends it."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from llama_jax.errors import InputError
from llama_jax.serving.service import Service

DRAIN_SECONDS = 20
"""How long answers may go on after the first signal."""


def bind(host: str, port: int) -> socket.socket:
    """A socket on an address, before a model is loaded; nobody can connect yet.

    Raises:
      InputError: if the address is taken, not this machine's, or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(
            f"--host {host}: {error.strerror or error}; give an address of this machine"
        ) from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise InputError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; give another --port, or end "
            "the program that has it"
        ) from None
    return bound


def url(bound: socket.socket) -> str:
    """The address of a socket, as a browser takes it."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve(app: Starlette, service: Service, bound: socket.socket, started: Callable[[], None]) -> None:
    """Serves until SIGTERM or Ctrl-C: then answers that are running may end, and others are refused.

    A second signal ends those too.

    Args:
      app: of `make_app`.
      service: what it serves.
      bound: of `bind`.
      started: called when clients can connect.

    Raises:
      KeyboardInterrupt: after Ctrl-C.
    """
    server = Server(app, service, started)
    server.run(sockets=[bound])
    if signal.SIGINT in server.received:
        raise KeyboardInterrupt


class Server(uvicorn.Server):
    """uvicorn's, which would end by sending itself the signal again.

    Attributes:
      received: the signals so far.
    """

    def __init__(self, app: Starlette, service: Service, started: Callable[[], None]) -> None:
        """See `serve`."""
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=DRAIN_SECONDS,
        )
        super().__init__(config)
        self.received: list[int] = []
        self._service = service
        self._tell = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._tell()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.received.append(sig)
        self._service.stopping = True
        self.should_exit = True
