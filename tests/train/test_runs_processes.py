"""Several processes of a run equal one process with all their devices, bit for bit."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

import llama_jax as lj
from llama_jax.cli import main
from llama_jax.errors import ExitStatus
from llama_jax.eval.goodput import read_goodput
from llama_jax.train.checkpoints.lock import run_lock
from llama_jax.train.loop import Loop
from llama_jax.train.objectives.reference import REFERENCE_FILE
from llama_jax.train.watchdog import STACKS
from tests import tiny
from tests.random_models import random_model
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
STEPS = 8


def flags_for(axis: str) -> tuple[object, ...]:
    sizes = {"data": 1, "fsdp": 1, axis: 2}
    mesh = [argument for name, size in sizes.items() for argument in (f"--mesh.{name}", size)]
    return (*mesh, "--checkpoint.keep", 100)


def start_two(
    workshop: Workshop,
    run_dir: str,
    *flags: object,
    config: object = None,
    second: tuple[object, ...] = (),
    function: str = "llama_jax.cli:main",
):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    shared = ("train", config or workshop.config, "--train.run_dir", run_dir, *flags)
    shared = (*shared, "--distributed.coordinator", address, "--distributed.num_processes", 2)
    arguments = [(*shared, "--distributed.process_id", i, *(second * i)) for i in range(2)]
    return [workshop.server.start(function, each, devices=1, cwd=workshop.folder) for each in arguments]


def train_and_list_collectives(argv: Sequence[str]) -> int:
    """`llama-jax train`; then prints what it compiled or did with others between steps."""
    found: list[str] = []
    steps_run: list[int] = []

    def listed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            if len(steps_run) > 2 and steps_run[-1]:
                found.append(name)
            return function(*arguments, **more)

        return call

    for name in ("process_allgather", "broadcast_one_to_all", "sync_global_devices", "assert_equal"):
        setattr(multihost_utils, name, listed(name, getattr(multihost_utils, name)))
    run_step, run_steps = Loop._run_step, Loop._run_steps

    def count(loop: Loop) -> None:
        steps_run.append(loop.steps_done + 1)
        run_step(loop)

    def end(loop: Loop) -> int:
        stopped = run_steps(loop)
        steps_run.append(0)
        return stopped

    Loop._run_step, Loop._run_steps = count, end  # type: ignore[method-assign]
    compiled = listed("compiled", lambda: None)
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled() if "backend_compile" in event else None
    )
    status = main(argv)
    print(json.dumps([len(steps_run), found]))
    return status


COMPUTING = "reference: computing the log-probabilities of 40 pairs"


@pytest.fixture(scope="module")
def preferences(workshop: Workshop, shared_data: Path) -> str:
    """The configuration of `pair`: DPO, with log-probabilities of the reference that are computed once.

    Its base has one layer: every process compiles what samples.
    """
    tokenizer = lj.load(shared_data / "stories260K" / "stories260K.bin").tokenizer
    model = tiny.CONFIG.replace(
        vocab_size=tokenizer.vocab_size, num_hidden_layers=1, max_position_embeddings=128
    )
    weights = lj.Model(model, random_model(3, model)[1], tokenizer, workshop.folder)
    base = lj.save(weights, workshop.folder / "base")
    config = workshop.folder / set_up(workshop, shared_data, "dpo", PRECOMPUTED, 1e-2)
    text = config.read_text()
    first = next(line for line in text.splitlines() if line.startswith("init_from"))
    config.write_text(text.replace(first, f'init_from = "{base}"'))
    return config.name


@pytest.fixture(scope="module")
def pair(workshop: Workshop, preferences: str) -> tuple[Path, Path]:
    """A run of one process with two devices, and its first half by two processes with one device each."""
    flags = (*flags_for("fsdp"), "--eval.max_new_tokens", 4, "--eval.sample_every", STEPS // 2)
    whole = ("--train.run_dir", "one", "--train.steps", STEPS, "--checkpoint.every", STEPS // 2)
    workshop.train_all((preferences, *whole, *flags), devices=2)
    both = start_two(workshop, "two", "--train.steps", STEPS // 2, *flags, config=preferences)
    done = [finish(process) for process in both]
    assert [each.status for each in done] == [0, 0], done
    assert "step" not in done[1].err  # only process 0 logs
    assert COMPUTING in done[0].err
    shutil.copytree(workshop.folder / "two", workshop.folder / "still")
    return workshop.folder / "one", workshop.folder / "two"


def test_two_processes_equal_one_with_two_devices(pair):
    """Losses, log-probabilities, evaluations, sampled texts, and every array of the checkpoints."""
    one, two = pair
    assert_same(one, two, STEPS // 2)
    assert losses(one).items() >= losses(two).items()
    assert (one / REFERENCE_FILE).read_bytes() == (two / REFERENCE_FILE).read_bytes()
    evaluations = records(two, "evaluations.jsonl")
    assert evaluations == records(one, "evaluations.jsonl")[: len(evaluations)]
    assert "text" in evaluations[-1]
    saved = {path.name for path in (two / "checkpoints" / str(STEPS // 2) / "data").glob("process_*")}
    assert saved == {"process_0.json", "process_1.json"}


def test_one_process_resumes_a_run_of_two(workshop, preferences, pair):
    one, two = pair
    command = (preferences, "--train.run_dir", two, "--eval.max_new_tokens", 0)
    workshop.train_all((*command, "--train.steps", STEPS, *flags_for("fsdp")), devices=2)
    assert_same(one, two, STEPS)
    assert losses(one) == losses(two)
    assert records(one, "evaluations.jsonl")[-1].items() >= records(two, "evaluations.jsonl")[-1].items()
    workshop.train_all((*command, "--train.steps", STEPS + 2))  # on one device
    assert losses(two)[STEPS + 1] < np.log(2)
    assert all(np.isfinite(x).all() for x in checkpoint_contents(two, STEPS + 2)[0].values())


def test_signal_to_one_process_stops_and_saves_both(workshop):
    """And no collective but those of steps and evaluations runs until then."""
    flags = (*flags_for("data"), "--checkpoint.every", 0, "--eval.every", 2, "--checkpoint.every_minutes", 60)
    function = f"{__name__}:{train_and_list_collectives.__name__}"
    first, second = start_two(workshop, "stopped", "--train.steps", 10_000, *flags, function=function)
    run = workshop.folder / "stopped"
    with running(first), running(second):
        wait_for(lambda: len(records(run)) >= 5, first)
        second.send_signal(signal.SIGTERM)
        done = [finish(process) for process in (first, second)]
    assert [one.status for one in done] == [143, 143], done
    for one in done:
        count, found = json.loads(one.out.splitlines()[-1])
        assert count > 5 and found == []
    (step,) = steps(run)
    assert len(losses(run)) == step
    workshop.train("alone", "--train.steps", step, *flags, devices=2)
    alone = workshop.folder / "alone"
    assert_same(run, alone, step)
    assert losses(run) == losses(alone)
    assert records(run, "evaluations.jsonl") == records(alone, "evaluations.jsonl")


def test_a_process_that_stands_still_ends_the_run_with_the_stacks_of_the_other(workshop, preferences, pair):
    """Resumed by two processes, which read the log-probabilities."""
    hang = ("--distributed.hang_steps", 2, "--distributed.hang_seconds", 2)
    flags = (*flags_for("fsdp"), "--checkpoint.every", 0, "--eval.every", 0, "--train.steps", 100_000)
    run = workshop.folder / "still"
    before = len(records(run))
    first, second = start_two(workshop, "still", *flags, *hang, config=preferences)
    with running(first), running(second):
        wait_for(lambda: len(records(run)) >= before + 5, first)
        second.send_signal(signal.SIGSTOP)
        done = finish(first)
        second.send_signal(signal.SIGCONT)
        other = finish(second)
    assert done.status == ExitStatus.HUNG and "no step has ended for" in done.error
    assert other.status == ExitStatus.HUNG or other.status < 0  # JAX ends it: the first process has gone
    stacks = (run / STACKS / "process_0.txt").read_text()
    assert "waiting for a step" in stacks and "in _finish_running" in stacks
    goodput = read_goodput(run)
    assert goodput is not None and goodput.seconds["steps"] > 0
    assert COMPUTING not in done.err
    expected = losses(pair[0])
    assert {step: loss for step, loss in losses(run).items() if step in expected} == expected


def end(
    workshop: Workshop,
    run_dir: str,
    *flags: object,
    second: tuple[object, ...] = (),
    limit: int = 0,
    status: int = 2,
):
    """Starts two processes, of which the second has more flags and a limit on the size of files."""
    processes = start_two(workshop, run_dir, *flags_for("fsdp"), *flags, second=second)
    if limit:
        resource.prlimit(processes[1].pid, resource.RLIMIT_FSIZE, (limit, limit))
    with running(processes[0]), running(processes[1]):
        done = [finish(process, timeout=60) for process in processes]
    assert [each.status for each in done] == [status, status], done
    return [each.error for each in done]


def test_a_process_whose_peer_never_joins_says_so(workshop):
    first, second = start_two(workshop, "alone", "--distributed.join_seconds", 1, second=("--help", "train"))
    with running(first), running(second):
        done = finish(first)
    assert done.status == ExitStatus.LOST
    assert "not all 2 processes have met at localhost:" in done.error and "within 1 s" in done.error


def test_both_processes_exit_if_the_first_cannot_start(workshop):
    (workshop.folder / "locked").mkdir()
    with run_lock(workshop.folder / "locked"):
        first, second = end(workshop, "locked")
    assert "in use by another run" in first
    assert second == f"process 0 failed, and so this one stops: {first}"


def test_both_processes_exit_if_the_second_cannot_start(workshop):
    first, second = end(workshop, "nothing", second=("--data.files", "nowhere/*.txt"))
    assert "no file matches data.files = 'nowhere/*.txt'" in second
    assert first == f"process 1 failed, and so this one stops: {second}"


def test_processes_with_different_seeds_do_not_start(workshop):
    first, second = end(workshop, "seeds", second=("--train.seed", 1))
    for line in (first, second):
        assert "train.seed is 1 in process 1 and 0 in process 0; start every process of a run" in line


def test_both_processes_exit_if_one_cannot_write_its_part_of_a_checkpoint(workshop):
    flags = ("--train.steps", 10_000, "--checkpoint.every", 3, "--eval.every", 0)
    first, second = end(workshop, "quota", *flags, limit=9000, status=ExitStatus.STORAGE)
    assert "checkpoint of step 3 could not be written" in second and "File too large" in second
    assert first == f"process 1 failed, and so this one stops: {second}"
    assert not steps(workshop.folder / "quota")
