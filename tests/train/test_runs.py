"""Laws of a run as a process: stopped in any way and started again, it ends where it would have ended."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.train.processes import Workshop, assert_same, finish, losses, records, running, steps, wait_for

STEPS = 40


@pytest.fixture(scope="module")
def whole(workshop: Workshop) -> Path:
    """A run in one go, of which every step is kept."""
    words = ("--train.steps", STEPS, "--checkpoint.every", 1, "--checkpoint.keep", 1000)
    workshop.train("whole", *words)
    return workshop.folder / "whole"


def test_the_run_learns(whole):
    by_step = losses(whole)
    assert len(by_step) == STEPS
    assert by_step[1] > 5 > 4 > by_step[STEPS]
    assert steps(whole) == list(range(1, STEPS + 1))


def test_forty_steps_are_twenty_and_twenty_more(workshop, whole):
    workshop.train("halves", "--train.steps", 20)
    again = workshop.train("halves", "--train.steps", STEPS)
    assert "resuming halves after step 20" in again.err
    assert_same(whole, workshop.folder / "halves", STEPS)
    assert losses(workshop.folder / "halves") == losses(whole)
    assert workshop.train("halves", "--train.steps", STEPS).err.count("has had its 40 steps") == 1
    assert losses(workshop.folder / "halves") == losses(whole)


def test_generate_and_inspect_read_the_run_by_the_name_that_was_given(workshop, whole):
    json_of = lambda verb, *words: json.loads(workshop.run("whole", *words, "--json", verb=verb).out)  # noqa: E731
    words = ("--prompt", "the cat", "--max-new-tokens", 8)
    text = workshop.run("whole", *words, verb="generate")
    assert text.status == 0, text.err
    assert len(text.out) > 8
    assert json_of("generate", *words)["prompt_tokens"] > 0
    about = json_of("inspect")
    assert about["format"] == "orbax"
    assert about["training"]["step"] == STEPS
    assert about["training"]["metrics"]["eval_loss"] < 4
    assert len(about["training"]["steps"]) == STEPS
    measured = [step["step"] for step in about["training"]["steps"] if step["metrics"]]
    assert measured == [10, 20, 30, 40]  # only where it was measured, eval.every
    assert "eval_loss" in workshop.run("whole", verb="inspect").out


def test_fine_tuning_starts_from_what_is_known(workshop, shared_data):
    """A llama2.c model with the vocabulary beside it: its loss is far below ln 512 = 6.24 from the first."""
    config = workshop.folder / "tune.toml"
    files = workshop.folder / "text" / "*.txt"
    model = shared_data / "stories260K" / "stories260K.bin"
    config.write_text(
        f'[model]\ninit_from = "{model}"\n[data]\nfiles = "{files}"\nheld_out = 0.2\n'
        '[train]\nsteps = 5\nbatch_size = 4\nseq_len = 32\ndtype = "float32"\nrun_dir = "tuned"\n'
        "[optimizer]\nlearning_rate = 1e-4\nwarmup_steps = 0\n[eval]\nevery = 1\nmax_new_tokens = 4\n"
        'prompt = "Once"\n[log]\ntensorboard = false\nplot = false\n'
    )
    done = workshop.run(config)
    assert done.status == 0, done.err
    evaluations = records(workshop.folder / "tuned", "evaluations.jsonl")
    assert evaluations[0]["eval_loss"] < 5.5
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert evaluations[-1]["text"].startswith("Once upon")
    assert "has had its 5 steps" in workshop.run(config).err


def stopped(workshop: Workshop, name: str, number: signal.Signals) -> int:
    """Starts a run that saves at its end alone, stops it on the way; returns its status."""
    words = ("--train.steps", STEPS, "--checkpoint.every", 0, "--eval.every", 1)
    process = workshop.start(workshop.config, "--train.run_dir", name, *words)
    wait_for(lambda: len(records(workshop.folder / name)) >= 3, process)
    process.send_signal(number)
    done = finish(process)
    assert "the same command goes on from there" in done.err
    assert "Traceback" not in done.err
    return done.status


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_signal_saves_the_step_it_finds_and_the_same_command_goes_on(workshop, whole, number, status):
    name = number.name
    assert stopped(workshop, name, number) == status
    run = workshop.folder / name
    (step,) = steps(run)
    assert 3 <= step < STEPS and len(losses(run)) == step
    assert_same(whole, run, step)
    workshop.train(name, "--train.steps", STEPS, "--checkpoint.every", 0, "--eval.every", 1)
    assert_same(whole, run, STEPS)
    assert losses(run) == losses(whole)
    evaluations = [record["step"] for record in records(run, "evaluations.jsonl")]
    assert evaluations == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(workshop):
    slow = ("--train.global_batch_size", 1024, "--checkpoint.every", 0)  # a step takes a second
    run = workshop.folder / "twice"
    with running(workshop.start(workshop.config, "--train.run_dir", "twice", *slow)) as process:
        wait_for(lambda: len(records(run)) == 1, process)
        process.send_signal(signal.SIGINT)
        read_until(process, "stopping after this step")
        process.send_signal(signal.SIGINT)
        assert "stopped without saving" in read_until(process, "stopped")
        assert process.wait(10) == 130
    assert not (run / "checkpoints").exists()


def read_until(process: subprocess.Popen[str], words: str) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if words in line:
            return line
    raise AssertionError(f"it never said {words!r}")


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_where_it_would_have_ended(workshop, whole):
    """Ten tries; in each, kills at a random moment until the run is done, mid-checkpoint among them."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")  # shown on failure
    rng = random.Random(seed)
    words = ("--train.steps", STEPS, "--checkpoint.every", 2, "--checkpoint.keep", 3)
    in_checkpoint = kills = 0
    for attempt in range(10):
        name = f"killed-{attempt}"
        run = workshop.folder / name
        with running(workshop.start(workshop.config, "--train.run_dir", name, *words)) as process:
            if attempt % 2:  # within a checkpoint: its folder is there under another name until it is whole
                after = rng.randrange(0, STEPS - 10)
                wait_for(lambda: len(records(run)) >= after and saving(run), process)  # noqa: B023
                time.sleep(rng.uniform(0, 0.02))
            else:
                wait_for(lambda: len(records(run)) >= 1, process)  # noqa: B023
                time.sleep(rng.uniform(0, 1.5))
            process.kill()
            process.wait()
        kills += process.returncode == -signal.SIGKILL
        in_checkpoint += saving(run)
        workshop.train(name, *words)
        assert_same(whole, run, STEPS)
        assert losses(run) == losses(whole)
        assert not saving(run)
        shutil.rmtree(run)
    assert kills >= 8
    assert in_checkpoint >= 1


def saving(run: Path) -> bool:
    """Whether a step is half saved."""
    folder = run / "checkpoints"
    return folder.is_dir() and any(not path.name.isdigit() for path in folder.iterdir())
