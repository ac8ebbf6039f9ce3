"""Errors that no reader or writer of files has given a message: still one line that says what to do."""

from __future__ import annotations

import errno
import os

import pytest

from llama_jax.console.exit_status import exit_status
from llama_jax.errors import DataError, ExitStatus


def run(error: BaseException) -> int:
    def program() -> None:
        raise error

    return exit_status(program)


def test_an_operating_systems_error_names_its_file(capsys):
    assert run(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x/loss.png")) == 2
    assert capsys.readouterr().err == (
        "error: runs/x/loss.png: No space left on device; check the path, its permissions and the disk's "
        "space\n"
    )


def test_a_file_server_that_fails_is_no_bad_input(capsys):
    """Also where a reader has given the error a line of its own: launchers start a run again."""

    def read() -> None:
        try:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "tokens.bin")
        except OSError as error:
            raise DataError(f"tokens.bin: {error.strerror}") from None

    assert run(OSError(errno.EIO, os.strerror(errno.EIO), "tokens.bin")) == ExitStatus.STORAGE
    assert exit_status(read) == ExitStatus.STORAGE
    assert capsys.readouterr().err.endswith("error: tokens.bin: Stale file handle\n")


def test_a_current_directory_that_was_deleted(capsys, tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert run(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))) == 2
    assert capsys.readouterr().err == (
        "error: the current directory no longer exists; change to another one\n"
    )


def test_an_error_that_is_nobodys_fault_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a bug"):
        run(RuntimeError("a bug"))
