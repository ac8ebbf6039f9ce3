"""What goes wrong in a store: retried where that can help, and otherwise one line with what to do."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import types

import pytest

from llama_jax.errors import StoreError
from llama_jax.storage import as_path, client, read_range, reading
from tests.train.fork_server import ROOT

pytestmark = pytest.mark.stores

DATA = bytes(range(256)) * 2000
READ = r"GET .*/x(\?alt=media|\?$)"


@pytest.fixture
def path(folder):
    (folder / "x").write_bytes(DATA)
    (folder / "x").read_bytes()  # opened
    return folder / "x"


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    """Retries without waiting."""

    async def no_sleep(*_):
        await real_sleep(0)

    real_sleep = asyncio.sleep
    hurried = types.SimpleNamespace(**{**vars(asyncio), "sleep": no_sleep})
    for module in ("gcsfs.retry", "s3fs.core", "aiobotocore.endpoint"):
        pytest.importorskip(module)
        monkeypatch.setattr(f"{module}.asyncio", hurried)


def message(action):
    with pytest.raises(StoreError) as caught:
        action()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value), caught.value.transient


@pytest.mark.parametrize("status", [500, 503, 429])
def test_errors_that_pass_are_retried(path, store, status):
    with store.faults.injected(READ, status, times=2) as fault:
        assert read_range(path, 0, len(DATA)).tobytes() == DATA
        assert fault.times == 0
    with store.faults.injected(r"(POST|PUT) ", status, times=2) as fault:
        path.write_bytes(b"other")
        assert fault.times == 0
    assert path.read_bytes() == b"other"


def test_errors_that_stay_are_said(path, store):
    for match, action, doing in (
        (READ, lambda: read_range(path, 0, 100), "read"),
        (r"(POST|PUT) ", lambda: path.write_bytes(b"a"), "written"),
        (r"(GET|HEAD) ", lambda: list(path.parent.iterdir()), "listed"),
    ):
        with store.faults.injected(match, 503):
            text, transient = message(action)
        assert f"cannot be {doing}: the store still fails after several tries" in text and transient


def test_access_denied(path, store):
    with store.faults.injected(r" ", 403):
        for action in (lambda: read_range(path, 0, 9), path.exists, lambda: path.write_bytes(b"")):
            text, transient = message(action)
            assert "the store refuses access" in text and str(path) in text and not transient


def test_no_credentials(path, store, monkeypatch):
    if store.scheme == "gs":
        with store.faults.injected(r" ", 401):
            text, _ = message(path.exists)
    else:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        client._make.cache_clear()
        text, _ = message(path.exists)
        client._make.cache_clear()
    assert "there are no credentials" in text and ("gcloud auth" in text or "aws configure" in text)


def test_a_body_that_ends_early_is_read_again(path, store):
    with store.faults.injected(READ, "truncated", times=2) as fault:
        assert read_range(path, 10, len(DATA) - 10).tobytes() == DATA[10:]
        assert fault.times == 0
    with store.faults.injected(READ, "truncated"):
        _, transient = message(lambda: read_range(path, 10, 1000))
        assert transient


def test_a_slow_answer_has_a_deadline(path, store, monkeypatch):
    monkeypatch.setattr(client, "DEADLINE_SECONDS", 0.5)
    with store.faults.injected(READ, "slow"):
        text, transient = message(lambda: read_range(path, 0, 100))
    assert "no answer within" in text and transient


def test_an_object_that_goes_or_changes_while_it_is_read(path, store):
    with path.open("rb") as file:
        file.read(10)
        path.write_bytes(DATA[::-1])
        text, _ = message(lambda: (file.seek(400_000), file.read(100_000)))
    assert "while it was read" in text
    reading.pin(path)
    path.unlink()
    assert "was deleted while it was read" in message(lambda: read_range(path, 0, 10))[0]


def test_a_store_that_is_not_there(monkeypatch):
    pytest.importorskip("gcsfs")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    client._make.cache_clear()
    text, transient = message(as_path("gs://bucket/x").exists)
    client._make.cache_clear()
    assert "still fails after several tries" in text and transient


def test_the_command_line_says_it_in_one_line(folder, store):
    with store.faults.injected(r" ", 403):
        done = subprocess.run(
            [sys.executable, "-m", "llama_jax", "inspect", str(folder / "model")],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ,
        )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: gs://" if store.scheme == "gs" else "error: s3://"), done.stderr
    assert done.stderr.count("\n") == 1 and "refuses access" in done.stderr
