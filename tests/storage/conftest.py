import re

import pytest

from . import servers


def pytest_collection_modifyitems(items):
    """Every test here that uses a store."""
    for item in items:
        if {"gcs", "s3", "store"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("stores")


def _running(server):
    with server() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        yield store


@pytest.fixture(scope="session")
def gcs():
    pytest.importorskip("gcsfs"), pytest.importorskip("gcp_storage_emulator")
    yield from _running(servers.gcs)


@pytest.fixture(scope="session")
def s3():
    pytest.importorskip("s3fs"), pytest.importorskip("moto")
    yield from _running(servers.s3)


@pytest.fixture(params=["gcs", "s3"])
def store(request):
    """Each of the stores; its faults are gone after a test."""
    running = request.getfixturevalue(request.param)
    running.faults.log.clear()
    yield running
    running.faults.active.clear()


@pytest.fixture
def folder(store, request):
    """An address of the test's own."""
    from llama_jax.storage import as_path

    return as_path(f"{store.root}/{re.sub(r'[^a-zA-Z0-9]+', '-', request.node.name)}")


def upload(source, target):
    """Copies a folder or file into a store."""
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    for path in files:
        (target / path.relative_to(source) if path != source else target).write_bytes(path.read_bytes())
    return target
