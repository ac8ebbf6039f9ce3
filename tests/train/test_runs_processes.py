"""Several processes of a run equal one process with all their devices, bit for bit."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import numpy as np
import pytest

from llama_jax.train.objectives.reference import REFERENCE_FILE
from tests.train.processes import (
    Workshop,
    assert_same,
    checkpoint_contents,
    finish,
    losses,
    records,
    running,
    steps,
    wait_for,
)
from tests.train.test_finetune_runs import PRECOMPUTED, set_up

pytestmark = pytest.mark.slow
STEPS = 20


def flags_for(axis: str) -> tuple[object, ...]:
    sizes = {"data": 1, "fsdp": 1, axis: 2}
    mesh = [argument for name, size in sizes.items() for argument in (f"--mesh.{name}", size)]
    return (*mesh, "--checkpoint.keep", 100, "--eval.max_new_tokens", 4, "--eval.sample_every", 10)


def start_two(workshop: Workshop, run_dir: str, *flags: object, config: object = None):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    shared = (config or workshop.config, "--train.run_dir", run_dir, *flags)
    shared = (*shared, "--distributed.coordinator", address, "--distributed.num_processes", 2)
    return [workshop.start(*shared, "--distributed.process_id", i) for i in range(2)]


@pytest.fixture(scope="module", params=["data", "fsdp"])
def pair(request: pytest.FixtureRequest, workshop: Workshop) -> tuple[Path, Path]:
    """A run of one process with two devices, and its first half by two processes with one device each."""
    flags = flags_for(request.param)
    one, two = f"one-{request.param}", f"two-{request.param}"
    workshop.train(one, "--train.steps", STEPS, "--checkpoint.every", 10, *flags, devices=2)
    done = [finish(process) for process in start_two(workshop, two, "--train.steps", STEPS // 2, *flags)]
    assert [each.status for each in done] == [0, 0], done
    assert "step" not in done[1].err  # only process 0 logs
    return workshop.folder / one, workshop.folder / two


def test_two_processes_equal_one_with_two_devices(pair):
    """Losses, evaluations, sampled texts, and every array of the checkpoints."""
    one, two = pair
    assert_same(one, two, STEPS // 2)
    assert losses(one).items() >= losses(two).items()
    assert records(one, "evaluations.jsonl")[0] == records(two, "evaluations.jsonl")[0]
    saved = {path.name for path in (two / "checkpoints" / str(STEPS // 2) / "data").glob("process_*")}
    assert saved == {"process_0.json", "process_1.json"}


@pytest.mark.parametrize("pair", ["fsdp"], indirect=True)
def test_one_process_resumes_a_run_of_two(workshop, pair):
    one, two = pair
    workshop.train(two, "--train.steps", STEPS, *flags_for("fsdp"), devices=2)
    assert_same(one, two, STEPS)
    assert losses(one) == losses(two)
    assert records(one, "evaluations.jsonl") == records(two, "evaluations.jsonl")
    assert "text" in records(two, "evaluations.jsonl")[-1]
    workshop.train(two, "--train.steps", STEPS + 2)  # on one device
    assert losses(two)[STEPS + 1] < 4
    assert all(np.isfinite(x).all() for x in checkpoint_contents(two, STEPS + 2)[0].values())


def test_two_processes_precompute_and_reread_the_reference(workshop, shared_data):
    """The file equals that of one process with two devices."""
    config = set_up(workshop, shared_data, "dpo", PRECOMPUTED, 1e-3)
    one, two = workshop.folder / "reference-one", workshop.folder / "reference-two"
    for num_steps, computes in ((2, True), (4, False)):
        flags = ("--train.steps", num_steps, *flags_for("fsdp"), "--eval.max_new_tokens", 0)
        done = [finish(process) for process in start_two(workshop, "reference-two", *flags, config=config)]
        assert [each.status for each in done] == [0, 0], done
        assert ("reference: computing the log-probabilities of 40 pairs" in done[0].err) == computes
    workshop.train_all((config, "--train.run_dir", one, *flags), devices=2)
    assert (one / REFERENCE_FILE).read_bytes() == (two / REFERENCE_FILE).read_bytes()
    assert_same(one, two, 4)
    assert losses(one) == losses(two)
    assert records(one, "evaluations.jsonl")[-1] == records(two, "evaluations.jsonl")[-1]


def test_signal_to_one_process_stops_and_saves_both(workshop):
    flags = ("--train.steps", 10_000, *flags_for("fsdp"), "--checkpoint.every", 0)
    first, second = start_two(workshop, "stopped", *flags)
    run = workshop.folder / "stopped"
    with running(first), running(second):
        wait_for(lambda: len(records(run)) >= 5, first)
        second.send_signal(signal.SIGTERM)
        done = [finish(process) for process in (first, second)]
    assert [one.status for one in done] == [143, 143], done
    (step,) = steps(run)
    assert len(losses(run)) == step
    flags = ("--train.steps", step, *flags_for("fsdp"), "--eval.max_new_tokens", 0)
    workshop.train("reference", *flags, devices=2)
    assert_same(run, workshop.folder / "reference", step)


def test_both_processes_exit_if_the_first_cannot_start(workshop):
    first, second = start_two(workshop, "nothing", *flags_for("fsdp"), "--data.files", "nowhere/*.txt")
    with running(first), running(second):
        done = finish(first)
        assert done.status == 2
        assert "no file matches data.files = 'nowhere/*.txt'" in done.err
        assert finish(second).status != 0
