"""User errors of `llama-jax train`: a one-line message, exit status 2, no partial files."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llama_jax.cli import main
from llama_jax.errors import ExitStatus
from llama_jax.train.checkpoints.lock import run_lock
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

STEPS = 12


@pytest.fixture(scope="module")
def trained(workshop: Workshop) -> Path:
    """A finished run with checkpoints of steps 4, 8 and 12."""
    workshop.train("trained", "--train.steps", STEPS, "--checkpoint.every", 4)
    return workshop.folder / "trained"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


Fail = Callable[..., str]


@pytest.fixture
def fail(workshop: Workshop, tmp_path: Path, capsys, monkeypatch) -> Fail:
    """Trains in this process, in `run` by default; returns the one-line error."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(workshop.folder / "compiled"))
    monkeypatch.chdir(tmp_path)

    def fail(*flags: object, config: Path = workshop.config, status: int = 2) -> str:
        run_dir = [] if "--train.run_dir" in flags else ["--train.run_dir", "run"]
        capsys.readouterr()
        assert main(["train", str(config), *run_dir, *map(str, flags)]) == status
        shown = capsys.readouterr()
        assert shown.out == ""
        *notes, error = shown.err.splitlines()
        assert error.startswith("error: ")
        assert not any(note.startswith("error") for note in notes)
        return "\n".join([*notes, error]) if notes else error.removeprefix("error: ")

    return fail


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.stepz", 3], "unknown setting --train.stepz; did you mean train.steps?"),
        (["--trian.steps", 3], "unknown setting --trian.steps; did you mean train.steps?"),
        (["--train.steps"], "--train.steps needs a value"),
        (["--train.steps", "many"], "--train.steps is 'many'; it must be a whole number"),
        (["--train.steps", "1.5"], "train.steps is 1.5; it must be a whole number"),
        (["--train.steps", 0], "train.steps is 0; it must be"),
        (["train.steps", 3], "unexpected argument 'train.steps'; settings are --section.key VALUE"),
        (["--optimizer.name", "adam"], "optimizer.name is 'adam'; did you mean adamw?"),
        (["--mesh.fsdp", 3], "mesh fsdp 3: it takes 3 of 8 devices"),
        (["--mesh.tensor", 8], "num_attention_heads 4 does not divide over axis tensor of size 8"),
        (
            ["--train.global_batch_size", 12],
            "train.global_batch_size is 12, which mesh.data x mesh.fsdp = 8 does not divide",
        ),
        (["--data.files", "nowhere/*.txt"], "no file matches data.files = 'nowhere/*.txt' (relative to "),
        (["--tokenizer.vocab_size", 40], "vocab_size is 40; it must be above 259"),
        (["--tokenizer.vocab_size", 100_000], "vocab_size is 100000; this text allows at most"),
        (["--model.vocab_size", 100], "model.vocab_size is 100; the tokenizer has 300 tokens"),
        (
            ["--model.num_attention_heads", 5],
            "model: hidden_size 32 is not a multiple of num_attention_heads 5",
        ),
        (["--model.init_from", "nothing"], "remove model.hidden_size"),
        (
            ["--train.seq_len", 128],
            "train.seq_len is 128 and the model's context (max_position_embeddings) 64: extend it with "
            "--model.max_position_embeddings 128, or set train.seq_len to at most 64",
        ),
        (["--model.rope_scaling.factor", 8], "model.rope_scaling.rope_type is missing"),
        (["--train.run_dir", "/dev/null/x"], "/dev/null/x: cannot be written: Not a directory"),
        (
            ["--distributed.num_processes", 2],
            "distributed.coordinator, distributed.num_processes and distributed.process_id",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings(fail, tmp_path, flags, message):
    assert message in fail(*flags)
    assert not (tmp_path / "run").exists()  # a failed start is not in the way of the next one


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[trian]\nsteps = 3\n", "unknown section [trian]; did you mean train?"),
        ("[train]\nstep = 3\n", "unknown key train.step; did you mean steps?"),
        ("[train]\nsteps = '3'\n", "train.steps is '3'; it must be a whole number"),
        ("[train\n", "not TOML: "),
        (None, "no such file; give a TOML file, or one of distill_smollm2, dpo_smollm2, "),
    ],
)
def test_files(fail, tmp_path, text, expected):
    path = tmp_path / "bad.toml"
    if text is not None:
        path.write_text(text)
    message = fail(config=path)
    assert message.startswith(f"{path}: ") or expected.startswith("train.steps is")
    assert expected in message
    assert not (tmp_path / "run").exists()


def test_wandb_is_not_installed(fail, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    assert fail("--log.wandb", "me") == (
        "log.wandb is 'me' and wandb is not installed: pip install 'llama-jax[wandb]'"
    )
    assert not (tmp_path / "run").exists()


def test_tokenizer_that_does_not_fit_the_weights(fail, trained, tmp_path, shared_data):
    config = tmp_path / "tune.toml"
    model = shared_data / "stories260K" / "stories260K.bin"
    config.write_text(
        f'[model]\ninit_from = "{model}"\n[tokenizer]\npath = "{trained}"\n[data]\nfiles = "x"\n'
    )
    assert f"the tokenizer has 300 tokens and model.init_from '{model}' was trained with 512" in fail(
        config=config
    )
    assert not (tmp_path / "run").exists()


def test_run_dir_is_a_file(fail, tmp_path):
    (tmp_path / "run").write_text("mine")
    assert "run: cannot be written: File exists" in fail()
    assert (tmp_path / "run").read_text() == "mine"


def test_run_dir_is_in_use(fail, run):
    with run_lock(run):
        message = fail()
    assert "this process already trains there" in message


def test_corpora(fail, tmp_path):
    text = tmp_path / "t"
    text.mkdir()
    files = ("--data.files", f"{text}/*.*")
    (text / "a.txt").write_text("")
    assert f"cannot train a tokenizer on '{text}/*.*': there is no text to train a vocabulary on" in fail(
        *files
    )
    (text / "a.txt").write_bytes(b"good\n" * 2000 + b"\xff\xfe bad \xff\n")
    assert "a.txt:2001" in fail(*files, "--data.validation_fraction", 0)
    (text / "a.txt").unlink()
    lines = ['{"text": "the cat sat on the mat and ran in the rain"}'] * 200
    lines[77] = '{"text": "the cat'
    (text / "a.jsonl").write_text("\n".join(lines))
    message = fail(*files, "--data.validation_fraction", 0, "--tokenizer.vocab_size", 280)
    assert "a.jsonl:78: not JSON" in message
    assert "data.bad_records" in message
    assert "tomatoes" in fail(*files, "--data.field", "tomatoes")


def test_bad_records_are_skipped_and_counted(workshop, tmp_path):
    lines = ['{"text": "the cat sat on the mat and ran in the rain"}'] * 50
    lines[7] = '{"text": "the cat'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    flags = (
        "--data.files",
        tmp_path / "a.jsonl",
        "--data.bad_records",
        "skip",
        "--tokenizer.vocab_size",
        280,
    )
    workshop.train(tmp_path / "skipping", *flags, "--train.steps", 10, "--data.validation_fraction", 0)
    assert records(tmp_path / "skipping")[-1]["skipped_records"] >= 1


def test_settings_that_must_not_change_when_a_run_is_resumed(fail, run, workshop, tmp_path):
    more = ("--train.steps", STEPS + 4)
    assert "train.seed is 7 and the run in run was started with 0" in fail("--train.seed", 7, *more)
    assert "train.seq_len is 16 and the run in run was started with 32" in fail("--train.seq_len", 16, *more)
    for setting, value, was in (
        ("train.global_batch_size", 16, 8),
        ("model.hidden_size", 64, 32),
        ("model.vocab_size", 384, 300),
        ("optimizer.name", "lion", '"adamw"'),
        ("train.objective", "sft", '"pretrain"'),
    ):
        assert re.search(
            rf'^{setting} is "?{value}"? and the run in run was started with {was}: set it to that',
            fail(f"--{setting}", value, *more),
        )
    for setting, value, was in (("validation_fraction", 0.25, 0.2), ("shuffle", "false", "true")):
        message = fail(f"--data.{setting}", value, *more)
        assert f"data.{setting} is {value}, and was {was}; set it to that" in message
        assert "have changed" not in message
    assert "tokenizer.vocab_size 310 is not the tokenizer that run was started with" in fail(
        "--tokenizer.vocab_size", 310, *more
    )
    changed = shutil.copytree(workshop.folder / "text", tmp_path / "text")
    (changed / "3.txt").write_text("the cat sat on the mat and ran in the rain\n" * 50)
    message = fail("--data.files", f"{changed}/*.txt", *more)
    assert "the data is not what this run was started with (the files of " in message
    assert steps(run) == [4, 8, 12] and (run / "config.toml").read_text().count("seed = 0") == 1


def newest_file(run: Path, step: int = STEPS) -> Path:
    """The largest file of a step's parameters."""
    folder = run / "checkpoints" / str(step) / "params"
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_damaged_checkpoint_is_skipped_for_the_previous_one(workshop, trained, tmp_path):
    damages = {"flip": flip, "truncate": lambda path: os.truncate(path, 10), "remove": Path.unlink}
    paths = {name: newest_file(shutil.copytree(trained, tmp_path / name)) for name in damages}
    for name, damage in damages.items():
        damage(paths[name])
    runs = [(name, 8) for name in damages] + [("flip", STEPS)]
    *all_done, _ = workshop.train_all(
        *[
            (workshop.config, "--train.run_dir", tmp_path / name, "--train.steps", steps)
            for name, steps in runs
        ]
    )
    for done, path in zip(all_done, paths.values(), strict=True):
        assert f"skipping the checkpoint of step {STEPS}: " in done.err
        # Large files are not read whole: the damage is then seen in the array, and named by it.
        assert path.name in done.err or "is not what was saved" in done.err
        assert "resuming from step 8, the newest intact checkpoint" in done.err
    assert_same(trained, tmp_path / "flip", STEPS)
    assert losses(tmp_path / "flip") == losses(trained)


def test_every_checkpoint_damaged(fail, run):
    for step in steps(run):
        flip(newest_file(run, step))
    message = fail().splitlines()[-1]
    assert "every checkpoint is damaged: step 12: " in message
    assert "move the directory away to start over" in message


def test_full_disk(workshop, run, trained):
    """With a file size limit of 24 kB the save fails as on a full disk; earlier checkpoints stay intact."""
    before = steps(run)

    process = workshop.start(workshop.config, "--train.run_dir", run, "--train.steps", STEPS + 4)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (24_000, 24_000))
    done = finish(process)
    assert done.status == ExitStatus.STORAGE
    assert "could not be written to" in done.error and "File too large" in done.error
    assert "the newest is of step 12" in done.error
    assert steps(run) == before
    assert_same(run, trained, STEPS)


def test_nonfinite_steps_abort_with_a_dump_and_are_not_saved(workshop, tmp_path):
    flags = ("--optimizer.learning_rate", 1e30, "--optimizer.max_grad_norm", 0, "--train.max_bad_steps", 3)
    done = workshop.train(tmp_path / "wild", *flags, "--train.steps", 30, "--checkpoint.every", 1, status=3)
    assert "not finite for 3 consecutive steps, which were skipped" in done.error
    (dump,) = (tmp_path / "wild" / "not_finite").iterdir()
    assert f"{dump} lists the tensors" in done.error
    assert {path.name for path in dump.iterdir()} == {"report.json", "batch.npz"}
    report = json.loads((dump / "report.json").read_text())
    assert report["not_finite_in_parameters"] == {} and report["not_finite_in_gradients"]
    assert np.load(dump / "batch.npz")["tokens"].shape == (8, 32)
    (*_, last) = records(tmp_path / "wild")
    assert last["skipped_steps"] == 3 and f"step_{last['step']}" == dump.name
    assert max(steps(tmp_path / "wild")) == last["step"] - 3  # none of them, although `every` is 1
    for step in steps(tmp_path / "wild"):
        assert all(np.isfinite(x).all() for x in checkpoint_contents(tmp_path / "wild", step)[0].values())


@pytest.mark.slow
def test_profiler_trace_at_a_step_and_on_sigusr1(workshop, tmp_path):
    run = tmp_path / "profiled"
    flags = ("--train.steps", 100_000, "--train.profile_at", 3, "--train.profile_steps", 2)
    process = workshop.start(workshop.config, "--train.run_dir", run, *flags)
    traces = lambda: process.err.read_text().count("profiler trace in ")  # noqa: E731
    with running(process):
        wait_for(lambda: traces() == 1, process)
        for file in (run / "profile").rglob("*.xplane.pb"):
            file.rename(tmp_path / "first")
        assert (tmp_path / "first").exists()
        process.send_signal(signal.SIGUSR1)
        wait_for(lambda: traces() == 2, process)
        assert any((run / "profile").rglob("*.xplane.pb"))
        process.send_signal(signal.SIGTERM)
        assert finish(process).status == 143
