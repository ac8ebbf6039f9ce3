"""Generation over two processes: the results of a single one in both, and errors for calls that differ."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_jax as lj
from tests.decoding import in_processes
from tests.train.processes import finish

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("processes")
    in_processes.write_model(path)
    return path


@pytest.fixture(scope="module")
def both(folder, fork_server) -> list[dict[str, Any]]:
    """What each of two processes found."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    function = f"{in_processes.__name__}:run"
    started = [
        fork_server.start(function, (folder, address, index), devices=2, cwd=ROOT) for index in range(2)
    ]
    done = [finish(process) for process in started]
    assert [each.status for each in done] == [0, 0], "\n".join(each.err for each in done)
    return [json.loads((folder / f"{index}.json").read_text()) for index in range(2)]


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, Any]:
    """What this process finds, without a mesh."""
    return in_processes.results(lj.load(folder / "tiny.bin", scan_layers=False))


@pytest.mark.slow
def test_every_process_gets_the_results_of_a_single_one(both, alone):
    assert both[0]["results"] == both[1]["results"]
    found = both[0]["results"]
    assert found.keys() == alone.keys()
    for name, expected in alone.items():
        if not isinstance(expected, dict):
            assert found[name] == expected, name
            continue
        for field, value in expected.items():
            compare = np.testing.assert_array_equal
            if field in ("logprobs", "scores"):  # a sum over two devices is rounded in another order
                compare = lambda a, b, err_msg: np.testing.assert_allclose(a, b, atol=2e-5, err_msg=err_msg)  # noqa: E731
            compare(found[name][field], value, err_msg=f"{name}.{field}")
    assert found["generate"]["tokens"] == found["stream"] == found["speculative"]["tokens"]


@pytest.mark.slow
def test_a_call_that_differs_is_one_line_in_every_process(both):
    first, second = (each["errors"] for each in both)
    alike = "; every process of a mesh must make the same call"
    for errors in (first, second):
        assert errors["prompts"] == f"generate has other prompts in process 1 than in process 0{alike}"
        assert errors["seed and length"] == (
            f"generate has other key and options in process 1 than in process 0{alike}"
        )
        assert errors["function"].startswith("process 1 called beam_search where process 0 called stream; ")
        assert errors["afterwards"] == "no error"
    for errors, other, index in ((first, second, 1), (second, first, 0)):
        own, theirs = ("too long", "too long in the other")[:: 1 if index else -1]
        assert "need 265 positions" in errors[own]
        assert errors[theirs] == f"process {index} failed, and so this one stops: {other[theirs]}"
    assert first["absent"].startswith("process 1 has not called generate within 0 s; every process of a mesh")


@pytest.mark.slow
def test_a_line_of_one_process_gets_to_all(both):
    assert [each["typed"] for each in both] == ["a café"] * 2


@pytest.mark.slow
def test_the_coordination_service_keeps_the_last_call_alone(both):
    assert both[0]["keys"] <= 2
