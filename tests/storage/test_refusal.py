"""What a store refuses for good is told from what may pass, by what its clients raise; without a store."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from llama_jax.errors import CheckpointSaveError, ExitStatus, StoreError
from llama_jax.storage import as_path, client
from llama_jax.storage.refusal import refusal
from llama_jax.train.checkpoints.save_errors import save_error

FOLDER = as_path("gs://bucket/run/checkpoints")


class HttpError(Exception):
    """gcsfs's."""

    def __init__(self, code: int) -> None:
        super().__init__(f"error {code}")
        self.code = code


def raised_from(cause: BaseException) -> BaseException:
    """As Orbax raises what its threads have raised."""
    try:
        try:
            raise cause
        except BaseException as error:
            raise ValueError("Failed to save") from error
    except ValueError as error:
        return error


FOR_GOOD = [
    (ValueError("PERMISSION_DENIED: Error writing x: HTTP response code: 403 [source]"), "refuses access"),
    (ValueError("UNAUTHENTICATED: Error writing x"), "refuses access"),
    (PermissionError(errno.EACCES, "Access Denied"), "refuses access"),
    (OSError("Forbidden: https://storage/x The account may not"), "refuses access"),
    (HttpError(403), "refuses access"),
    (HttpError(401), "no credentials"),
    (HttpError(404), "no bucket"),
    (ValueError("NOT_FOUND: Error writing x: HTTP response code: 404"), "no bucket"),
    (StoreError("gs://bucket: said before"), "said before"),
]
MAY_PASS = [
    ValueError("UNAVAILABLE: Error writing x: HTTP response code: 503"),
    ValueError("DEADLINE_EXCEEDED: Error writing x"),
    HttpError(503),
    HttpError(429),
    ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    TimeoutError("no answer"),
    StoreError("gs://bucket: said before", transient=True),
    RuntimeError("anything else"),
]


@pytest.mark.parametrize(("error", "said"), FOR_GOOD, ids=[str(error)[:20] for error, _ in FOR_GOOD])
def test_what_would_be_refused_again(error, said, monkeypatch):
    monkeypatch.setattr(client, "_bucket_exists", lambda *_: False)
    for one in (error, raised_from(error)):
        found = save_error(FOLDER, 7, one, lambda: [3, 6])
        assert isinstance(found, CheckpointSaveError) and found.exit_status == ExitStatus.BAD_INPUT
        assert said in str(found) and "\n" not in str(found)
        assert str(found).startswith("checkpoint of step 7 could not be written: gs://bucket")
        assert "the newest is of step 6" in str(found)
        assert refusal(Path("/tmp/run"), one) is None  # a disk's


@pytest.mark.parametrize("error", MAY_PASS, ids=[str(error)[:20] for error in MAY_PASS])
def test_what_may_pass(error):
    for one in (error, raised_from(error)):
        assert refusal(FOLDER, one) is None
        assert save_error(FOLDER, 7, one, list).exit_status == ExitStatus.STORAGE


def test_an_object_that_is_not_there_is_no_refusal(monkeypatch):
    monkeypatch.setattr(client, "_bucket_exists", lambda *_: True)
    assert refusal(FOLDER, FileNotFoundError(errno.ENOENT, "x")) is None


def test_a_store_that_refuses_all_does_not_hide_the_reason():
    def refused() -> list[int]:
        raise StoreError("gs://bucket: refused")

    found = save_error(FOLDER, 7, PermissionError(errno.EACCES, "Access Denied"), refused)
    assert "the earlier ones are as they were" in str(found) and not found.transient
