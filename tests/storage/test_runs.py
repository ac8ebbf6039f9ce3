"""A run whose data and directory are in a store: killed, resumed, and the same bit for bit as on a disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from llama_jax.errors import ExitStatus
from llama_jax.weights.runs import step_folders
from tests.train.fork_server import ROOT
from tests.train.processes import Workshop, assert_same, environment, losses, wait_for

from .conftest import upload

STEPS = ("--train.steps", "12", "--checkpoint.every", "4", "--eval.every", "6")


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    """A corpus and a configuration, and a run of them on the disk."""
    folder = tmp_path_factory.mktemp("shop")
    shop = Workshop(folder, server=None).set_up()
    _, err = train(shop, folder / "local").communicate(timeout=120)
    assert losses(folder / "local").keys() == set(range(1, 13)), err
    return shop


def train(shop, run_dir, *arguments):
    """Starts `train` in a process that sees the stores."""
    command = [sys.executable, "-m", "llama_jax.train", shop.config, "--train.run_dir", run_dir, *STEPS]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        list(map(str, [*command, *arguments])),
        env=environment(shop.folder / "cache") | {"PYTHONPATH": paths},
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_run_that_is_killed_resumes_bit_for_bit(shop, folder, capsys):
    corpus = upload(shop.folder / "text", folder / "text")
    run, files = folder / "run", ("--data.files", f"{corpus}/*.txt")
    killed = train(shop, run, *files)
    try:
        wait_for(lambda: bool(step_folders(run)), killed)
    finally:
        killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert (run / "lock").is_file()
    resumed = train(shop, run, *files)
    _, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, err
    assert "resuming" in err and "Traceback" not in err
    assert losses(run) == losses(shop.folder / "local")
    assert_same(shop.folder / "local", run, 12)
    assert not (run / "lock").exists()
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.toml", "metrics.jsonl", "evaluations.jsonl", "tokenizer.model", "checkpoints"}


def test_a_store_that_refuses_a_checkpoint_ends_the_run_for_good(shop, folder, store):
    """No launcher starts it again; what passes is told from it in test_refusal.py."""
    run = folder / "run"
    with store.faults.injected(r"(POST|PUT) .*checkpoints/4/params/.*(ocdbt|/d/)", 403):
        process = train(shop, run)
        _, err = process.communicate(timeout=180)
    assert process.returncode == ExitStatus.BAD_INPUT, err
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert line.startswith("error: checkpoint of step 4 could not be written: "), err
    assert "the store refuses access" in line and "Traceback" not in err, err
    assert step_folders(run) == {}


@pytest.mark.parametrize("store", ["s3"], indirect=True)  # gcsfs names the object in the body
def test_a_store_that_refuses_the_metrics_saves_the_run_and_ends_it_for_good(shop, folder, store):
    run = folder / "run"
    with store.faults.injected(r"(POST|PUT) .*metrics\.jsonl", 403):
        process = train(shop, run)
        _, err = process.communicate(timeout=180)
    assert process.returncode == ExitStatus.BAD_INPUT, err
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert "metrics.jsonl: the store refuses access" in line and "Traceback" not in err, err
    assert "the run is saved after step" in line and step_folders(run), err
