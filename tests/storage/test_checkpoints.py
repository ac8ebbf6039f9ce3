"""A run's checkpoints in stores: committed by their manifest, verified, retained, resumed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
import time

import pytest

from llama_jax.errors import CheckpointError, CheckpointSaveError, ExitStatus, InputError, StoreError
from llama_jax.storage import as_path
from llama_jax.text.pretrained import load_params
from llama_jax.train.checkpoints import store_lock
from llama_jax.train.checkpoints.lock import run_lock
from llama_jax.weights.runs import list_steps, step_folders
from tests.train.small_runs import abstract_state, checkpoints_of, make_state, one_device, same, save_run


def restore(folder, warnings=None):
    with checkpoints_of(folder, (warnings if warnings is not None else []).append) as checkpoints:
        return checkpoints.restore(abstract_state(one_device()))


def test_steps_are_saved_retained_and_restored(folder):
    with checkpoints_of(folder, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(one_device(), step), {"batch": step}, {"eval_loss": 1 / step})
    assert list(step_folders(folder)) == [2, 3]
    assert sorted({path.parts[4] for path in (folder / "checkpoints").find()}) == ["2", "3"]
    restored = restore(folder)
    assert restored.step == 3 and restored.data_states == [{"batch": 3}]
    assert same(restored.state, make_state(one_device(), 3))
    assert [(step.step, step.problem) for step in list_steps(folder)] == [(2, None), (3, None)]


def test_what_is_not_sealed_is_no_step(folder):
    save_run(folder, 1, 2)
    step = folder / "checkpoints" / "2"
    (step / "checksums.json").unlink()  # as after a kill before the commit, or in a deletion
    warnings = []
    assert restore(folder, warnings).step == 1 and not warnings
    with checkpoints_of(folder) as checkpoints:
        checkpoints.save(2, make_state(one_device(), 2), {"batch": 2})
    assert restore(folder).step == 2 and list(step_folders(folder)) == [1, 2]


def test_a_changed_object_is_found(folder):
    save_run(folder, 1, 2)
    data = max((folder / "checkpoints" / "2" / "params").find().items(), key=lambda item: item[1].size)[0]
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(bytes(content))
    warnings = []
    assert restore(folder, warnings).step == 1
    assert "its checksum does not match" in warnings[0]
    with pytest.warns(UserWarning, match="checksum does not match"):
        load_params(str(folder))
    with checkpoints_of(folder) as checkpoints:
        checkpoints.save(3, make_state(one_device(), 3), {"batch": 3})
    assert (folder / "checkpoints" / "2.damaged" / "checksums.json").is_file()


def test_a_copy_of_a_run_works_elsewhere(folder, tmp_path):
    save_run(folder, 1)
    for path in folder.find():
        target = tmp_path / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    assert same(restore(tmp_path).state, make_state(one_device(), 1))
    shutil.rmtree(tmp_path / "checkpoints" / "1" / "params" / "d", ignore_errors=True)
    with pytest.raises(CheckpointError):
        restore(tmp_path)


def test_a_lock_is_one_runs_and_is_released(folder):
    lock = folder / "lock"
    with run_lock(folder):
        assert lock.is_file()
        with pytest.raises(InputError, match="this process already trains there"), run_lock(folder):
            pass
    assert not lock.exists()


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr(store_lock, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(store_lock, "EXPIRY_SECONDS", 1.5)
    monkeypatch.setattr(store_lock, "_POLL_SECONDS", 0.3)


def other(pid, host):
    return json.dumps({"pid": pid, "host": host, "since": "then"}).encode()


def test_a_lock_whose_owner_lives_is_refused(folder, hurried):
    notes = []
    with (
        store_lock.store_lock(folder / "lock", other(1, "elsewhere"), notes.append),
        pytest.raises(InputError, match="in use by another run: process 1 on elsewhere, since then"),
        run_lock(folder, warn=notes.append),
    ):
        pass
    assert "waiting up to" in notes[0]


@pytest.mark.parametrize("owner", [other(1, "elsewhere"), b"not JSON"], ids=["silent", "unreadable"])
def test_a_lock_whose_owner_is_gone_is_taken_over(folder, hurried, owner):
    (folder / "lock").write_bytes(owner)
    with run_lock(folder):
        assert json.loads((folder / "lock").read_bytes())["pid"] == os.getpid()


def test_a_lock_of_a_process_that_was_killed_here_is_taken_over_at_once(folder):
    ended = subprocess.Popen(["true"])
    ended.wait()
    (folder / "lock").write_bytes(other(ended.pid, socket.gethostname()))
    notes = []
    with run_lock(folder, warn=notes.append):
        assert not notes


def test_a_run_whose_lock_was_taken_over_ends(folder, hurried, monkeypatch, capsys):
    ended = threading.Event()

    def end(status):
        ended.set()
        raise StoreError("the process has ended")

    monkeypatch.setattr(store_lock.os, "_exit", end)
    with run_lock(folder):
        (folder / "lock").write_bytes(other(1, "elsewhere"))
        assert ended.wait(20)
    assert "another run has taken this run's lock" in capsys.readouterr().err
    assert (folder / "lock").is_file()  # the other's


def test_a_lock_outlives_failures_of_the_store(folder, store, hurried):
    with run_lock(folder):
        before = (folder / "lock").info().version
        with store.faults.injected("lock", 403, times=3) as fault:
            while fault.times:
                time.sleep(0.05)
        while (folder / "lock").info().version == before:
            time.sleep(0.05)


def test_a_store_that_fails_while_a_run_is_restored_damages_nothing(folder, store):
    save_run(folder, 1)
    with store.faults.injected("checkpoints", 403), pytest.raises(StoreError, match="refuses access"):
        restore(folder)
    with (
        store.faults.injected(r"GET .*/d/", 403),
        pytest.raises(StoreError, match=r"the store failed|refuses access"),
    ):
        restore(folder)
    assert restore(folder).step == 1


def test_a_bucket_that_is_not_there_is_a_refusal(folder):
    missing = as_path(f"{folder.scheme}://no-such-bucket/run")
    with pytest.raises(
        (CheckpointSaveError, StoreError), match="there is no bucket 'no-such-bucket'"
    ) as found:
        save_run(missing, 1)
    assert found.value.exit_status == ExitStatus.BAD_INPUT
