"""The directory in which a test module runs training processes, and the server that starts them."""

from collections.abc import Iterator

import pytest

from tests.train.fork_server import ForkServer
from tests.train.processes import Workshop, environment


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    cache = tmp_path_factory.getbasetemp() / "compiled"
    server = ForkServer(environment(cache), tmp_path_factory.mktemp("output"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def workshop(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer
) -> Workshop:
    folder = tmp_path_factory.mktemp(request.module.__name__.rpartition(".")[2])
    return Workshop(folder, fork_server).set_up()
