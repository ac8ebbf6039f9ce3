"""A server in a thread, with a model of a few kilobytes, and what tests ask of it."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import llama_jax as lj
from llama_jax.serving import server
from llama_jax.serving.app import make_app
from llama_jax.serving.batcher import Batcher
from llama_jax.serving.service import Limits, Service
from tests import tiny

CONFIG = tiny.CONFIG.replace(num_hidden_layers=1, max_position_embeddings=384)
NAME = "tiny"
ROWS = 4


@dataclasses.dataclass(frozen=True)
class Running:
    """A server that runs, and what it serves."""

    url: str
    model: lj.Model
    service: Service
    server: server.Server

    @property
    def batcher(self) -> Batcher:
        return self.service.batcher

    def until_idle(self) -> None:
        """Waits until no request is in the queue or in a row, and no connection is served."""
        for _ in range(600):
            busy = self.batcher.running + self.batcher.waiting + len(self.server.server_state.tasks)
            if not busy:
                return
            time.sleep(0.05)
        raise AssertionError(f"{self.batcher.running} are running, {self.batcher.waiting} waiting")


@contextlib.contextmanager
def serving(
    model: lj.Model, *, api_key: str | None = None, max_queue: int = 32, **limits
) -> Iterator[Running]:
    """Serves a model on a free port of this machine."""
    batcher = Batcher(model.config, model.params, batch_size=ROWS, max_length=352, max_queue=max_queue)
    service = Service(model, batcher, NAME, limits=Limits(**limits), template="chatml")
    bound = server.bind("127.0.0.1", 0)
    started = threading.Event()
    running = server.Server(make_app(service, api_key), service, started.set)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [bound]})
    with bound, batcher:
        thread.start()
        assert started.wait(60)
        yield Running(server.url(bound), model, service, running)
        running.should_exit = running.force_exit = True
        thread.join()


def load(folder: Path) -> lj.Model:
    return lj.load(tiny.write_model(folder, CONFIG), scan_layers=False)
