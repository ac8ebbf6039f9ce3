"""The directory in which a test module runs training processes."""

import pytest

from tests.train.fork_server import ForkServer
from tests.train.processes import Workshop


@pytest.fixture(scope="module")
def workshop(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer
) -> Workshop:
    folder = tmp_path_factory.mktemp(request.module.__name__.rpartition(".")[2])
    return Workshop(folder, fork_server).set_up()
