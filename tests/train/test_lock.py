"""The run lock: two runs never share a directory, and a killed run releases it."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llama_jax.errors import InputError
from llama_jax.train.checkpoints.lock import run_directory, run_lock

ROOT = Path(__file__).parents[2]
# Takes the lock, and starts a child process, like a data worker, that outlives it.
HOLD = """
import os, sys, time
from llama_jax.train.checkpoints.lock import run_lock
with run_lock(sys.argv[1]):
    if os.fork() == 0:
        time.sleep(float(sys.argv[2])); os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path), "5"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_second_run_is_an_error_that_names_the_first(holder, tmp_path):
    with pytest.raises(InputError) as caught, run_lock(tmp_path):
        pytest.fail("two runs in one directory")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(
        f"{tmp_path}: in use by another run: process {holder.pid} on {os.uname().nodename}"
    )
    assert ", since 20" in message and "choose another train.run_dir" in message


def test_killed_run_releases_the_lock_while_its_workers_live(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with run_lock(tmp_path):
        pass


def test_lock_is_released_when_a_run_ends_or_fails(tmp_path):
    with pytest.raises(KeyError), run_lock(tmp_path / "new" / "run"):
        raise KeyError
    with run_lock(tmp_path / "new" / "run"):
        pass


def test_one_process_cannot_train_twice_in_a_directory(tmp_path):
    with run_lock(tmp_path):
        with pytest.raises(InputError, match="this process already trains there"), run_lock(tmp_path):
            pass
        code = (
            f"from llama_jax.train.checkpoints.lock import run_lock\nwith run_lock({str(tmp_path)!r}): pass"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert "in use by another run" in done.stderr, "the second attempt released the lock of the first"


def test_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    warnings: list[str] = []
    with run_lock(tmp_path, warn=warnings.append):
        assert len(warnings) == 1 and "No locks available" in warnings[0]


def test_directory_that_cannot_be_created(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match="cannot be written: Not a directory"),
        run_lock(tmp_path / "file" / "run"),
    ):
        pass


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("runs/a[b]c", r"/runs/a\[b\]c' has '\[' in it, with which checkpoints cannot be read again"),
        ("par[x]/run", r"has '\[' in it"),
        ("runs/a\\b", "has '.*' in it, with which checkpoints cannot be read again"),
        ("~nosuchuser/x", r"train\.run_dir '~nosuchuser/x': .*; give the absolute path"),
        ("runs/\udcff", r"is not UTF-8; give another path"),
    ],
)
def test_directories_in_which_no_checkpoint_could_be_read_again(path, message):
    with pytest.raises(InputError, match=message):
        run_directory(path)


@pytest.mark.parametrize("path", ["runs/a b", "runs/é漢🙂", "runs/%20#?&=", "runs/a*b{c}", "~/runs", "gs:"])
def test_other_directories_are_taken(path):
    assert run_directory(path) == Path(path).expanduser()
