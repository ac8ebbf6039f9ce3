"""The directory in which a test module runs training processes."""

import pytest

from tests.train.processes import Workshop


@pytest.fixture(scope="module")
def workshop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    cache = tmp_path_factory.getbasetemp() / "compiled"
    folder = tmp_path_factory.mktemp(request.module.__name__.rpartition(".")[2])
    return Workshop(folder, cache).set_up()
