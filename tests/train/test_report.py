"""What a run writes beside its checkpoints, also on a full disk and to a reader that has gone."""

from __future__ import annotations

import io
import json
import math
import os
import resource
import signal
import struct
import sys
import threading
import types
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter

from llama_jax import cli
from llama_jax.errors import ExitStatus, InputError
from llama_jax.train.config.log import LogConfig
from llama_jax.train.metrics.append_file import AppendFile
from llama_jax.train.metrics.plot import plot_losses
from llama_jax.train.metrics.report import METRICS, Report
from llama_jax.train.metrics.tensorboard import EventWriter
from llama_jax.train.signals import Interrupts
from tests.train.processes import finish, losses, steps


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Within it no file of this process can grow beyond `limit` bytes, as on a full disk or with a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def events(path: Path) -> list[Event]:
    """The events of a TFRecord file, which must be whole."""
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(Event.FromString(data[12 : 12 + length]))
        assert len(data) >= 16 + length
        data = data[16 + length :]
    return found


def test_a_record_is_written_whole_or_not_at_all(tmp_path):
    file = AppendFile(tmp_path / "new" / "a.jsonl")
    file.append(b"one\n")
    with full_disk(6), pytest.raises(InputError) as caught:
        file.append(b"second\n")
    assert str(caught.value) == f"{file.path}: cannot be written: File too large"
    assert file.path.read_bytes() == b"one\n"
    file.append(b"third\n")
    assert file.path.read_bytes() == b"one\nthird\n"
    file.close()


def test_event_file_has_the_bytes_of_tensorboardx(tmp_path):
    writer = EventWriter(tmp_path / "tensorboard", 3, pytest.fail)
    writer.add_scalars({"train/loss": 1.5, "train/mfu": 0.25}, 7)
    writer.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    header, start, record = events(path)
    assert header.file_version == "brain.Event:2" and path.name.startswith("events.out.tfevents.")
    assert start.step == 3 and start.session_log.status == start.session_log.START
    assert record.step == 7
    assert {value.tag: value.simple_value for value in record.summary.value} == {
        "train/loss": 1.5,
        "train/mfu": 0.25,
    }
    peer = RecordWriter(str(tmp_path / "peer"))
    for event in (header, start, record):
        peer.write(event.SerializeToString())
    peer.close()
    assert path.read_bytes() == (tmp_path / "peer").read_bytes()


def test_a_moments_full_disk_costs_events_and_one_warning(tmp_path, caplog):
    said: list[str] = []
    writer = EventWriter(tmp_path, 1, said.append)
    writer.add_scalars({"a": math.nan, "b": math.inf}, 1)
    (path,) = tmp_path.iterdir()
    with full_disk(path.stat().st_size + 20):
        for step in (2, 3):
            writer.add_scalars({"a": 2.0}, step)
    assert len(said) == 1
    assert said[0].startswith(f"warning: {path}: cannot be written: File too large; until it can be")
    writer.add_scalars({"a": 4.0}, 4)
    assert [event.step for event in events(path)] == [0, 1, 1, 4]
    assert not caplog.records  # tensorboardX would say that a value is not finite


def test_no_directory_for_events_is_a_warning(tmp_path):
    (tmp_path / "tensorboard").write_text("a file")
    said: list[str] = []
    writer = EventWriter(tmp_path / "tensorboard", 1, said.append)
    for step in (1, 2):
        writer.add_scalars({"a": 1.0}, step)
    writer.close()
    assert len(said) == 1 and f"warning: {tmp_path / 'tensorboard'}" in said[0]


def make_report(folder: Path, **log: object) -> Report:
    config = LogConfig(tensorboard=False, **log)  # type: ignore[arg-type]
    return Report(folder, config, total_steps=9, start_step=0, is_primary=True, settings={})


def test_a_run_whose_metrics_cannot_be_written_is_saved_and_resumes(workshop):
    """No room for metrics.jsonl, and none for TensorBoard; checkpoints may be on another disk."""
    run = workshop.folder / "full"
    run.mkdir()
    (run / METRICS).symlink_to("/dev/full")
    (run / "tensorboard").touch()
    flags = ("--train.steps", 4, "--log.tensorboard", "true", "--checkpoint.every", 0, "--eval.every", 0)
    done = workshop.train("full", *flags, status=ExitStatus.STORAGE)
    (step,) = steps(run)
    assert 1 <= step < 4
    assert done.error == (
        "full/metrics.jsonl: cannot be written: No space left on device; the run is saved after step "
        f"{step}: free some space, and run the same command again to resume"
    )
    assert done.err.count("training goes on without TensorBoard") == 1
    (run / METRICS).unlink()
    again = workshop.train("full", *flags)
    assert f"resuming full after step {step}" in again.err
    assert steps(run)[-1] == 4


def train_into_a_pipe(arguments: Sequence[str]) -> int:
    """Runs `llama-jax train`, whose stderr is a pipe that is read until the first step, as by `head`."""
    read, write = os.pipe()
    os.dup2(write, 2)
    os.close(write)

    def head() -> None:
        with os.fdopen(read, "rb", buffering=0) as lines:
            while not lines.readline().startswith(b"step 1/"):
                pass

    threading.Thread(target=head).start()
    return cli.main(["train", *arguments])


def test_a_run_whose_log_is_no_longer_read_is_saved(workshop):
    flags = ("--train.run_dir", "head", "--train.steps", 10_000, "--checkpoint.every", 0, "--eval.every", 0)
    function = f"{__name__}:train_into_a_pipe"
    process = workshop.server.start(function, (workshop.config, *flags), devices=1, cwd=workshop.folder)
    done = finish(process)
    assert (done.status, done.err) == (128 + signal.SIGPIPE, "")
    (step,) = steps(workshop.folder / "head")
    assert len(losses(workshop.folder / "head")) == step < 10_000


def test_a_log_line_to_a_closed_terminal_is_lost_alone(tmp_path):
    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(5, "Input/output error")

    with make_report(tmp_path) as report:
        report._console.file = Gone()
        report.log("a line")
        assert report.problem is None


def test_a_run_that_is_not_on_a_terminal_logs_its_first_step(tmp_path, capsys):
    with make_report(tmp_path, every=10) as report:
        report.first_step(1, 5.25)
        report.advance(2)
        assert report._bar.tasks[0].completed == 2
    assert capsys.readouterr().err == "step 1/9  loss 5.2500\n"


def test_signals_stop_a_run_unless_nohup_ignores_them():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
            assert wait_until(lambda: interrupts.agreed_stop() == signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with Interrupts() as interrupts:
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def wait_until(condition) -> bool:
    waited = threading.Event()
    return any(condition() or waited.wait(0.01) for _ in range(500))


def test_a_short_runs_plot_shows_its_points(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    records = [{"step": step, "loss": 3.0 - step} for step in (1, 2)]
    (tmp_path / METRICS).write_text("".join(json.dumps(record) + "\n" for record in records))
    with warnings.catch_warnings(action="error"):
        plot_losses(tmp_path, math.nan)
    (axes,) = drawn[0].axes
    assert axes.lines[0].get_marker() == "."
    ticks = [tick for tick in axes.get_xticks() if 1 <= tick <= 2]
    assert ticks == [1, 2]


@pytest.mark.parametrize("scores", [{"reward": 1.0, "advantage": -0.5}, {}], ids=["rewarded", "own answers"])
def test_samples_are_lines_of_json_and_tables_of_the_trackers(tmp_path, monkeypatch, scores):
    logged: list[Any] = []
    table = lambda columns, data: {"columns": columns, "data": data}  # noqa: E731
    fake = types.SimpleNamespace(
        init=lambda **_: types.SimpleNamespace(
            id="x", log=lambda *a, **k: logged.append((a, k)), finish=list
        ),
        Table=table,
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = LogConfig(tensorboard=True, wandb="project")
    record = {
        "step": 3,
        "prompt": [{"role": "user", "content": "a|b"}],
        "completion": "c",
        "tokens": 1,
        **scores,
    }
    options = {"is_primary": True, "has_samples": True, "settings": {}}
    with Report(tmp_path, config, total_steps=9, start_step=0, **options) as report:
        report.samples([record] * 2)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert lines == [record] * 2
    (((given,), step),) = logged
    names = ["prompt", "completion", *scores]
    assert given["samples"]["columns"] == names and step == {"step": 3}
    assert given["samples"]["data"][0] == [str(record["prompt"]), "c", *scores.values()]
    (path,) = (tmp_path / "tensorboard").iterdir()
    text = events(path)[-1].summary.value[0].tensor.string_val[0].decode()
    assert text.splitlines()[0] == " | ".join(names) and len(text.splitlines()) == 4
