"""Several processes of one run: together they are one process with their devices."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import numpy as np
import pytest

from llama_jax.train.objectives.reference import NAME as REFERENCE
from tests.train.processes import (
    Workshop,
    assert_same,
    everything,
    finish,
    losses,
    records,
    running,
    steps,
    wait_for,
)
from tests.train.test_finetune_runs import ASKED_BEFORE, set_up

pytestmark = pytest.mark.slow
STEPS = 20


def words_for(axis: str) -> tuple[object, ...]:
    sizes = {"data": 1, "fsdp": 1, axis: 2}
    mesh = [word for name, size in sizes.items() for word in (f"--mesh.{name}", size)]
    return (*mesh, "--checkpoint.keep", 100, "--eval.max_new_tokens", 4, "--eval.sample_every", 10)


def start_two(workshop: Workshop, run_dir: str, *words: object, config: object = None):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = f"localhost:{free.getsockname()[1]}"
    shared = (config or workshop.config, "--train.run_dir", run_dir, *words)
    shared = (*shared, "--distributed.coordinator", where, "--distributed.num_processes", 2)
    return [workshop.start(*shared, "--distributed.process_id", i) for i in range(2)]


@pytest.fixture(scope="module", params=["data", "fsdp"])
def pair(request: pytest.FixtureRequest, workshop: Workshop) -> tuple[Path, Path]:
    """A run of one process with two devices, and half of it by two processes with one each."""
    words = words_for(request.param)
    one, two = f"one-{request.param}", f"two-{request.param}"
    workshop.train(one, "--train.steps", STEPS, "--checkpoint.every", 10, *words, devices=2)
    done = [finish(process) for process in start_two(workshop, two, "--train.steps", STEPS // 2, *words)]
    assert [each.status for each in done] == [0, 0], done
    assert "step" not in done[1].err  # the first alone speaks
    return workshop.folder / one, workshop.folder / two


def test_two_processes_are_one_of_two_devices(pair):
    """Bit for bit: losses, held-out numbers, texts, and every array of the checkpoints."""
    one, two = pair
    assert_same(one, two, STEPS // 2)
    assert losses(one).items() >= losses(two).items()
    assert records(one, "evaluations.jsonl")[0] == records(two, "evaluations.jsonl")[0]
    saved = {path.name for path in (two / "checkpoints" / str(STEPS // 2) / "data").glob("process_*")}
    assert saved == {"process_0.json", "process_1.json"}


@pytest.mark.parametrize("pair", ["fsdp"], indirect=True)
def test_one_process_goes_on_from_what_two_saved(workshop, pair):
    one, two = pair
    workshop.train(two, "--train.steps", STEPS, *words_for("fsdp"), devices=2)
    assert_same(one, two, STEPS)
    assert losses(one) == losses(two)
    assert records(one, "evaluations.jsonl") == records(two, "evaluations.jsonl")
    assert "text" in records(two, "evaluations.jsonl")[-1]
    workshop.train(two, "--train.steps", STEPS + 2)  # on one device
    assert losses(two)[STEPS + 1] < 4
    assert all(np.isfinite(x).all() for x in everything(two, STEPS + 2)[0].values())


def test_two_processes_ask_their_reference_together_and_read_it_again(workshop, shared_data):
    """Bit for bit as one of two devices does, which goes on with what they wrote."""
    config = set_up(workshop, shared_data, "dpo", ASKED_BEFORE, 1e-3)
    one, two = workshop.folder / "asked-one", workshop.folder / "asked-two"
    for steps_, asks in ((2, True), (4, False)):
        words = ("--train.steps", steps_, *words_for("fsdp"), "--eval.max_new_tokens", 0)
        done = [finish(process) for process in start_two(workshop, "asked-two", *words, config=config)]
        assert [each.status for each in done] == [0, 0], done
        assert ("reference: the log-probabilities of 40 pairs" in done[0].err) == asks
    alone = workshop.run(config, "--train.run_dir", "asked-one", *words, devices=2)
    assert alone.status == 0, alone.err
    assert (one / REFERENCE).read_bytes() == (two / REFERENCE).read_bytes()
    assert_same(one, two, 4)
    assert losses(one) == losses(two)
    assert records(one, "evaluations.jsonl")[-1] == records(two, "evaluations.jsonl")[-1]


def test_a_signal_to_one_stops_both_with_everything_saved(workshop):
    words = ("--train.steps", 10_000, *words_for("fsdp"), "--checkpoint.every", 0)
    first, second = start_two(workshop, "stopped", *words)
    run = workshop.folder / "stopped"
    with running(first), running(second):
        wait_for(lambda: len(records(run)) >= 5, first)
        second.send_signal(signal.SIGTERM)
        done = [finish(process) for process in (first, second)]
    assert [one.status for one in done] == [143, 143], done
    (step,) = steps(run)
    assert len(losses(run)) == step
    workshop.train("reference", "--train.steps", step, *words_for("fsdp"), devices=2)
    assert_same(run, workshop.folder / "reference", step)


def test_both_end_when_the_first_cannot_begin(workshop):
    first, second = start_two(workshop, "nothing", *words_for("fsdp"), "--data.files", "nowhere/*.txt")
    with running(first), running(second):
        done = finish(first)
        assert done.status == 2
        assert "no file matches data.files = 'nowhere/*.txt'" in done.err
        assert finish(second).status != 0
