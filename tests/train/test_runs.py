"""Training processes: a run that is stopped in any way and resumed equals an uninterrupted one bitwise."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import llama_jax as lj
from llama_jax.eval.goodput import read_goodput
from llama_jax.text.convert import FORMATS, convert
from tests.train.fork_server import Process, xla_flags
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

STEPS = 16  # a save takes a sixth of a second


@pytest.fixture(scope="module")
def uninterrupted(workshop: Workshop) -> Path:
    """An uninterrupted run that keeps the checkpoint of every step."""
    flags = ("--train.steps", STEPS, "--checkpoint.every", 1, "--checkpoint.keep", 1000)
    argv = [workshop.config, "--train.run_dir", "uninterrupted", *flags]
    subprocess.run(
        [sys.executable, "-m", "llama_jax.train", *map(str, argv)],
        env={**workshop.server.environment, "XLA_FLAGS": xla_flags(devices=1)},
        cwd=workshop.folder,
        check=True,
    )
    return workshop.folder / "uninterrupted"


def test_loss_decreases(uninterrupted):
    by_step = losses(uninterrupted)
    assert len(by_step) == STEPS
    assert by_step[1] > 5 > 4 > by_step[STEPS]
    assert steps(uninterrupted) == list(range(1, STEPS + 1))


def test_resumed_run_equals_uninterrupted_run(workshop, uninterrupted):
    workshop.train("halves", "--train.steps", 8)
    command = (workshop.config, "--train.run_dir", "halves", "--train.steps", STEPS)
    again = finish(workshop.start(*command))  # in a process of its own
    assert again.status == 0 and "resuming halves after step 8" in again.err
    assert_same(uninterrupted, workshop.folder / "halves", STEPS)
    (complete,) = workshop.train_all(command)
    assert complete.err.count(f"is complete after {STEPS} steps") == 1
    assert losses(workshop.folder / "halves") == losses(uninterrupted)


def test_a_bad_record_in_the_middle_loses_no_step_and_skipping_it_resumes(workshop, uninterrupted):
    lines = [json.dumps({"text": f"the cat sat on mat number {i}. " * 4}) + "\n" for i in range(400)]
    files = workshop.folder / "bad.jsonl"
    files.write_text("".join([*lines[:40], '{"text": 3}\n', *lines[40:]]))
    original = Path(shutil.copy(uninterrupted / "tokenizer.model", workshop.folder / "mine.model"))
    tokenizer = ("--tokenizer.path", original, "--tokenizer.vocab_size", 0)
    flags = (*tokenizer, "--data.files", files, "--data.shuffle", "false", "--data.validation_fraction", 0)
    command = (*flags, "--train.steps", STEPS)
    done = workshop.train("bad", *command, status=2)
    assert "bad.jsonl:41: field 'text' is of type int" in done.error
    (saved,) = steps(workshop.folder / "bad")
    assert f"saved after step {saved}; the same command with --data.bad_records skip goes on" in done.err
    original.unlink()  # the run has a copy
    again = workshop.train("bad", *command, "--data.bad_records", "skip")
    assert f"resuming bad after step {saved}" in again.err
    assert steps(workshop.folder / "bad")[-1] == STEPS


def test_no_checkpoint_is_saved_within_steps_that_are_not_finite(workshop):
    flags = ("--checkpoint.every", 2, "--checkpoint.keep", 1, "--checkpoint.best", 0, "--eval.every", 0)
    workshop.train("ruined", "--train.steps", 4, *flags)
    huge = ("--optimizer.learning_rate", 1e30, "--optimizer.max_grad_norm", 0)
    workshop.train("ruined", "--train.steps", STEPS, *flags, *huge, status=3)
    (kept,) = steps(workshop.folder / "ruined")
    assert kept in (4, 6)  # the first steps at the huge rate may still be finite


@pytest.mark.parametrize(
    ("flag", "value", "started"), [("rope_theta", 500000.0, 10000.0), ("rms_norm_eps", 0.001, 1e-05)]
)
def test_a_run_is_not_resumed_with_another_model(workshop, uninterrupted, flag, value, started):
    before = sorted(path.relative_to(uninterrupted) for path in uninterrupted.rglob("*"))
    done = workshop.train("uninterrupted", "--train.steps", STEPS + 2, f"--model.{flag}", value, status=2)
    message = (
        f"model.{flag} is {value} and the run in uninterrupted was started with {started}: set it to that"
    )
    assert message in done.error
    assert sorted(path.relative_to(uninterrupted) for path in uninterrupted.rglob("*")) == before


def test_optimizer_settings_may_change_when_a_run_is_resumed(workshop):
    """An average begins at the present weights; what is frozen keeps its value, and later gets moments."""
    flags = ("--optimizer.ema_decay", 0.5, "--optimizer.layer_decay", 0.9, "--optimizer.freeze", "embed.*")
    workshop.train("changed", "--train.steps", 2)
    workshop.train("changed", "--train.steps", 4, *flags)
    workshop.train("changed", "--train.steps", 5)
    two, four, five = (checkpoint_contents(workshop.folder / "changed", step)[0] for step in (2, 4, 5))
    embedding, scale = "embed.embedding", "final_norm.scale"
    assert (two[f"params:{embedding}"] == four[f"state:moved.{embedding}"]).all()
    assert (four[f"state:moved.{scale}"] != four[f"params:{scale}"]).any()
    assert (two[f"params:{embedding}"] != five[f"params:{embedding}"]).any()
    assert two.keys() == five.keys() and not any("embed" in name for name in four if "opt_state" in name)
    assert int(five["state:opt_state.0.count"]) == 5


def test_a_padded_vocabulary_trains_and_converts(workshop):
    workshop.train("padded", "--train.steps", 1, "--model.vocab_size", 384)
    run = lj.load(workshop.folder / "padded")
    assert (run.config.vocab_size, len(run.tokenizer.unused_ids)) == (384, 84)
    sampling, _ = run.sampling(temperature=1.0)
    assert list(sampling.suppress_tokens) == list(range(300, 384))
    for format in set(FORMATS) - {"llama2c"}:  # which has another layout of the vocabulary
        found = lj.load(convert(workshop.folder / "padded", workshop.folder / f"padded.{format}", format))
        assert found.tokenizer.encode("the cat sat") == run.tokenizer.encode("the cat sat")
        jax.tree.map(np.testing.assert_array_equal, found.params, run.params)


def test_generate_and_inspect_read_a_run_by_its_path(workshop, uninterrupted):
    generate = ("generate", "uninterrupted", "--prompt", "the cat", "--max-new-tokens", 8)
    inspect = ("inspect", "uninterrupted")
    text, result, table, description = workshop.run_all(
        generate, (*generate, "--json"), inspect, (*inspect, "--json")
    )
    assert text.status == 0, text.err
    assert len(text.out) > 8
    assert json.loads(result.out)["prompt_tokens"] > 0
    about = json.loads(description.out)
    assert about["format"] == "orbax"
    assert about["training"]["step"] == STEPS
    assert about["training"]["metrics"]["eval_loss"] < 4
    assert len(about["training"]["steps"]) == STEPS
    evaluated = [step["step"] for step in about["training"]["steps"] if step["metrics"]]
    assert evaluated == [10, STEPS]  # those evaluated, eval.every
    assert "eval_loss" in table.out
    shares = about["goodput"]["shares"]
    assert sum(shares.values()) == pytest.approx(1) and shares["steps"] > 0 and shares["compile"] > 0
    assert f"goodput: {shares['steps']:.1%} of " in table.out and "waiting for a batch" in table.out
    last = records(uninterrupted)[-1]
    assert last["wall_time"].keys() == shares.keys() and 0 < last["goodput"] <= 1


def test_finetuning_starts_from_pretrained_weights(workshop, shared_data):
    """A llama2.c model with its tokenizer: eval_loss is far below ln 512 = 6.24 from the start."""
    config = workshop.folder / "tune.toml"
    files = workshop.folder / "text" / "*.txt"
    base = Path(shutil.copytree(shared_data / "stories260K", workshop.folder / "base"))
    model = base / "stories260K.bin"
    config.write_text(
        f'[model]\ninit_from = "{model}"\n[data]\nfiles = "{files}"\nvalidation_fraction = 0.2\n'
        '[train]\nsteps = 3\nglobal_batch_size = 4\nseq_len = 32\ndtype = "float32"\nrun_dir = "tuned"\n'
        'remat = "none"\nattention = "xla"\nloss_chunks = 1\n'
        "[optimizer]\nlearning_rate = 1e-4\nwarmup_steps = 0\n[eval]\nevery = 1\nbatches = 4\n"
        'max_new_tokens = 4\nprompt = "Once"\n[log]\ntensorboard = false\nplot = false\n'
    )
    workshop.train_all([config])
    shutil.rmtree(base)  # a run of all weights needs it no more
    (again,) = workshop.train_all([config])
    evaluations = records(workshop.folder / "tuned", "evaluations.jsonl")
    assert evaluations[0]["eval_loss"] < 5.5
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert evaluations[-1]["text"].startswith("Once upon")
    assert "is complete after 3 steps" in again.err


@pytest.mark.slow
def test_signals_save_the_current_step_and_the_same_command_resumes(workshop, uninterrupted):
    """A run that saves at its end only, stopped twice: each process goes on where the one before stopped."""
    run = workshop.folder / "stopped"
    flags = ("--train.steps", STEPS, "--checkpoint.every", 0, "--eval.every", 1)
    reached = 0
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = workshop.start(workshop.config, "--train.run_dir", run, *flags)
        wait_for(lambda reached=reached: len(records(run)) >= reached + 3, process)
        process.send_signal(number)
        done = finish(process)
        assert done.status == status
        assert "run the same command again to resume" in done.err
        assert "Traceback" not in done.err
        assert (f"after step {reached}" in done.err) == (reached > 0)
        step = steps(run)[-1]
        assert reached + 3 <= step < STEPS and len(losses(run)) == step
        assert_same(uninterrupted, run, step)
        reached = step
    workshop.train("stopped", *flags)
    assert_same(uninterrupted, run, STEPS)
    assert losses(run) == losses(uninterrupted)
    evaluations = [record["step"] for record in records(run, "evaluations.jsonl")]
    assert evaluations == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_second_ctrl_c_exits_immediately(workshop):
    slow = ("--train.global_batch_size", 512, "--checkpoint.every", 0)  # a step takes half a second
    run = workshop.folder / "twice"
    with running(workshop.start(workshop.config, "--train.run_dir", "twice", *slow)) as process:
        wait_for(lambda: len(records(run)) == 1, process)
        process.send_signal(signal.SIGINT)
        wait_for(lambda: "stopping after this step" in process.err.read_text(), process)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert "stopped without saving" in process.err.read_text()
    assert not (run / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("in_checkpoint", [False, True])
def test_killed_and_resumed_run_equals_uninterrupted_run(workshop, uninterrupted, in_checkpoint):
    """Killed once at a random time, or at one during a checkpoint."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")  # shown on failure
    rng = random.Random(seed)
    name = f"killed-{in_checkpoint}"
    run = workshop.folder / name
    flags = ("--train.steps", STEPS, "--checkpoint.every", 3, "--checkpoint.keep", 3)
    with running(workshop.start(workshop.config, "--train.run_dir", name, *flags)) as process:
        wait_for(lambda: len(records(run)) >= 1, process)
        if in_checkpoint:
            stop_while_saving(process, run, rng)
        else:
            time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.wait()
    assert saving(run) or not in_checkpoint
    reached = len(records(run))
    resumed = re.search(r"after step (\d+)", workshop.train(name, *flags).err)
    if process.returncode:  # it may have ended before
        assert process.returncode == -signal.SIGKILL
        lost = reached - int(resumed[1] if resumed else 0)
        goodput = read_goodput(run)
        assert goodput is not None and goodput.starts == 2
        assert goodput.lost_steps in (lost, lost + 1)  # killed between the records of a step
        assert (goodput.seconds["lost"] > 0) == (goodput.lost_steps > 0)
        assert sum(goodput.shares.values()) == pytest.approx(1)
    assert_same(uninterrupted, run, STEPS)
    assert losses(run) == losses(uninterrupted)
    assert not saving(run)


def stop_while_saving(process: Process, run: Path, rng: random.Random) -> None:
    """Stops a process at a random time of one of its saves, whose directory has a temporary name."""
    after = rng.randrange(1, STEPS - 8)
    while True:
        wait_for(lambda: len(records(run)) >= after and saving(run), process)
        time.sleep(rng.uniform(0, 0.02))
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.01)  # until its threads stand still
        if saving(run):
            return
        process.send_signal(signal.SIGCONT)


def saving(run: Path) -> bool:
    """Whether a save is in progress."""
    folder = run / "checkpoints"
    return folder.is_dir() and any(not path.name.isdigit() for path in folder.iterdir())
