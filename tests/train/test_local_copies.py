"""A run that lost a host resumes from the copy of a replica, else from its newest checkpoint."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from llama_jax.errors import ConfigError
from llama_jax.train.checkpoints.state_tree import named_leaves
from llama_jax.train.config.checkpoint import CheckpointConfig
from tests.train.copying_processes import LAST
from tests.train.fork_server import ForkServer
from tests.train.processes import finish, wait_for
from tests.train.reading_processes import checksum
from tests.train.small_runs import abstract_state, checkpoints_of, make_state, one_device, same

ROOT = Path(__file__).parents[2]


def start(fork_server: ForkServer, function: str, folder: Path) -> list[Any]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    name = f"tests.train.copying_processes:{function}"
    return [fork_server.start(name, [folder, address, index], devices=2, cwd=ROOT) for index in range(2)]


def restore(fork_server: ForkServer, folder: Path) -> list[dict[str, Any]]:
    done = [finish(process) for process in start(fork_server, "restore", folder)]
    assert [each.status for each in done] == [0, 0], done
    return [json.loads(each.out.splitlines()[-1]) for each in done]


def test_a_lost_host_gets_its_shards_from_the_other_slice(tmp_path: Path, fork_server: ForkServer) -> None:
    both = start(fork_server, "save_until_killed", tmp_path)
    for process in both:
        wait_for(lambda process=process: "saved" in process.out.read_text(), process)
    for process in both:
        process.kill()
        process.wait(30)
    shutil.rmtree(tmp_path / "host0")
    expected = checksum(named_leaves(make_state(one_device(), LAST)))
    for found in restore(fork_server, tmp_path):
        assert (found["step"], found["sum"]) == (LAST, expected)
        assert found["data"] == [{"step": LAST, "process": 0}, {"step": LAST, "process": 1}]
        assert found["run"] == {"data": "abc"}
        assert found["warnings"] == [f"resuming from the copies of step {LAST} on the hosts"]


def test_one_process_resumes_from_its_own_copy(tmp_path: Path) -> None:
    options: dict[str, Any] = {"every": 10, "local_every": 2, "local_dir": str(tmp_path / "host")}
    state = make_state(one_device(), 4)
    with checkpoints_of(tmp_path / "run", **options) as checkpoints:
        assert [step for step in range(1, 11) if checkpoints.should_save(step)] == [2, 4, 6, 8, 10]
        for step in (2, 3, 4):
            if checkpoints.should_save(step):
                checkpoints.save(step, state, {"step": step}, {"eval_loss": 1.0})
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    with checkpoints_of(tmp_path / "run", **options) as checkpoints:
        restored = checkpoints.restore(abstract_state(one_device()))
        assert (restored.step, restored.metrics) == (4, {"eval_loss": 1.0}) and same(restored.state, state)
        checkpoints.save(4, state, {"step": 4})  # of the end of the run: a checkpoint
        assert checkpoints.should_save(6)
        checkpoints.save(6, state, {"step": 6})
    for path in (tmp_path / "host").glob("*/*/shards.bin"):  # of 4 and 6
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    warnings: list[str] = []
    with checkpoints_of(tmp_path / "run", warnings.append, **options) as checkpoints:
        restored = checkpoints.restore(abstract_state(one_device()))
        assert restored.step == 4 and same(restored.state, state)
    assert len(warnings) == 1 and "the copies of step 6" in warnings[0] and "are damaged: " in warnings[0]
    shutil.rmtree(tmp_path / "run")
    with checkpoints_of(tmp_path / "run", **options) as checkpoints:  # a new run at the same place
        assert checkpoints.restore(abstract_state(one_device())) is None


def test_a_copy_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "host").touch()
    warnings: list[str] = []
    options: dict[str, Any] = {"every": 0, "local_every": 1, "local_dir": str(tmp_path / "host")}
    with checkpoints_of(tmp_path / "run", warnings.append, **options) as checkpoints:
        assert checkpoints.should_save(1)
        checkpoints.save(1, make_state(one_device()), {})
    assert warnings == [
        f"the copy in {tmp_path}/host could not be written: Not a directory; training goes on"
    ]


def test_copies_need_a_directory() -> None:
    with pytest.raises(
        ConfigError, match=r"checkpoint\.local_dir is ''; it must be a directory on each host"
    ):
        CheckpointConfig(local_every=1)
