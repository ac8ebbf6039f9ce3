"""Each of several processes reads its share of weights and checkpoints, once; all find the same damage."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.train.fork_server import ForkServer
from tests.train.processes import finish
from tests.train.reading_processes import WIDE, local_checksum, wide_run
from tests.train.small_runs import make_state, one_device
from tests.weights.writers import random_params, write_hf

METADATA = 1 << 18  # bytes: Orbax's JSON, and the index of its database, which every process reads
ROOT = Path(__file__).parents[2]


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def reads(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> dict[str, Any]:
    """What two processes read of files that one wrote, and of files that they wrote."""
    folder = tmp_path_factory.mktemp("reading")
    params = random_params(WIDE)
    hf = write_hf(folder / "hf", WIDE, params, shards=2)
    state = make_state(one_device(), 1, config=WIDE)
    with wide_run(folder / "run") as checkpoints:
        checkpoints.save(1, state, {})
    damaged = Path(shutil.copytree(folder / "run", folder / "damaged"))
    step = damaged / "checkpoints" / "1"
    path = max(step.glob("params/ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    arguments = [hf, folder / "run", folder / "both", damaged, address]
    function = "tests.train.reading_processes:read_as_one_of_two"
    both = [fork_server.start(function, [*arguments, index], devices=2, cwd=ROOT) for index in range(2)]
    done = [finish(process) for process in both]
    assert [each.status for each in done] == [0, 0], done
    items = ("params", "state")
    return {
        "counts": [json.loads(each.out.splitlines()[-1]) for each in done],
        "sizes": {
            "hf": sum(path.stat().st_size for path in hf.glob("*.safetensors")),
            "run": size(folder / "run" / "checkpoints" / "1" / "params"),
            "state": sum(size(folder / "run" / "checkpoints" / "1" / item) for item in items),
            "again": sum(size(folder / "both" / "checkpoints" / "1" / item) for item in items),
        },
        "sums": (local_checksum(params), local_checksum(state.params)),
        "step": step,
    }


@pytest.mark.parametrize("what", ["hf", "run", "state", "again"])
def test_each_process_reads_its_share_once(what, reads):
    """Weights of a Hugging Face directory and of a run; a state that one process saved, or these two."""
    share = reads["sizes"][what] / 2
    for counts in reads["counts"]:
        assert 0.9 * share < counts[what] < 1.1 * share + METADATA


def test_what_the_processes_read_together_is_what_was_written(reads):
    for counts in reads["counts"]:
        assert (counts["sum"], counts["run sum"]) == reads["sums"]


def test_damage_in_the_shards_of_one_process_is_the_same_line_in_all(reads):
    first, second = (counts["error"] for counts in reads["counts"])
    assert first == second
    assert f"{reads['step']}/params: damaged: " in first and "is not what was saved" in first
