"""`llama-jax chat`: lines from stdin, and a pseudo-terminal with Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import llama_jax as lj
from llama_jax import cli
from llama_jax.console.terminal import printable
from llama_jax.text.conversation import Conversation
from tests import tiny

ROOT = Path(__file__).parents[2]
TEMPLATE = "{% for m in messages %}{{ m.content }}{{ 'b' if m.role == 'user' else ' ' }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def tiny_path(folder):
    """A model with a context of 8192 tokens, for long answers."""
    return tiny.write_model(folder, tiny.CONFIG.replace(max_position_embeddings=8192))


@pytest.fixture(scope="module")
def args(tiny_path, folder):
    """Arguments that chat with it."""
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)
    return ["chat", str(tiny_path), "--template", str(template), "--max-new-tokens", "5"]


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs one command line and returns its status, stdout and stderr."""

    def run(args, stdin=""):
        data = stdin if isinstance(stdin, bytes) else stdin.encode()
        fake = SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: False)
        monkeypatch.setattr(sys, "stdin", fake)
        status = cli.main([str(arg) for arg in args])
        return SimpleNamespace(status=status, **dict(zip(("out", "err"), capsys.readouterr(), strict=True)))

    return run


@pytest.fixture(scope="module")
def answers(tiny_path):
    """The model's answers to `a` and then to `ab`, in one conversation."""
    conversation = Conversation(lj.load(tiny_path), template=tiny_path.with_name("template.jinja"))
    return ["".join(conversation.say(text, max_new_tokens=5)) for text in ("a", "ab")]


# Lines from stdin


def test_lines_are_answered_in_order(run, args, answers):
    done = run(args, "a\n\n  ab  \n")
    assert (done.status, done.err) == (0, "")
    assert done.out == "".join(f"{answer}\n" for answer in answers)


def test_json_is_one_object_per_turn(run, args, answers):
    done = run([*args, "--json"], "a\nab")
    first, second = map(json.loads, done.out.splitlines())
    assert (done.status, done.err) == (0, "")
    assert [first["user"], second["user"]] == ["a", "ab"]
    assert [first["assistant"], second["assistant"]] == answers
    assert first["finish_reason"] == second["finish_reason"] == "length"
    assert first["reused_tokens"] == 0 < second["reused_tokens"] < second["prompt_tokens"]


def test_commands(run, args, answers):
    again = run(args, "a\n/reset\na\n/undo\na\n").out
    assert again == f"{answers[0]}\n" * 3
    shown = run(args, "/help\n/quit\na\n")
    assert (shown.status, shown.out) == (0, "")
    for command in ("/help", "/reset", "/undo", "/system TEXT", "/quit", "Ctrl-C"):
        assert command in shown.err
    assert run(args, "/exit\na\n").out == ""


def test_commands_confirm(run, args):
    told = run(args, "a\n/undo\n/reset\n/system abc\n/reset\n/system\n").err.splitlines()
    for line, part in zip(told, ("0 before", "cleared)", "set)", "is kept", "removed)"), strict=True):
        assert part in line


def test_the_system_prompt_is_set_and_removed(run, args):
    given = json.loads(run([*args, "--json", "--system", "abc"], "a\n").out)
    later = json.loads(run([*args, "--json"], "/system abc\na\n").out)
    assert given == later
    none = json.loads(run([*args, "--json", "--system", "abc"], "/system\na\n").out)
    assert none["prompt_tokens"] < given["prompt_tokens"]


def test_message_may_begin_with_a_slash(run, args):
    assert json.loads(run([*args, "--json"], " /reset\n").out)["user"] == "/reset"


def test_stop_string(run, args, answers):
    stop = answers[0][1:3]
    turn = json.loads(run([*args, "--json", "--stop-string", "zzz", "--stop-string", stop], "a\n").out)
    assert turn["assistant"] == answers[0][: answers[0].index(stop)]
    assert turn["finish_reason"] == "stop"


def test_seed(run, args):
    def sampled(seed):
        done = run([*args, "--json", "--temperature", "5", "--seed", seed], "a\n/undo\na\n")
        return [json.loads(line)["assistant"] for line in done.out.splitlines()]

    assert sampled(1) == sampled(1) != sampled(2)
    first, second = sampled(1)
    assert first != second  # a repeated question gets a new sample


@pytest.mark.parametrize(
    ("extra", "stdin", "parts"),
    [
        ([], "/unde\n", ["unknown command '/unde'", "did you mean /undo?"]),
        (
            [],
            "/xyzzy\n",
            ["unknown command '/xyzzy'", "the commands are /help, /reset, /undo, /system, /quit"],
        ),
        ([], "/undo\n", ["nothing to undo"]),
        ([], b"\xff\n", ["stdin is not UTF-8 text: line 1, byte 0xff at offset 0"]),
        ([], "a" * 9000, ["the conversation has", "context of 8192"]),
        (["--temperature", "-1"], "a\n", ["temperature is -1.0"]),
        (["--stop-string", ""], "a\n", ["stop_strings[0] is empty"]),
        (["--template", "chatlm"], "a\n", ["'chatlm'", "did you mean chatml?"]),
        (["--max-new-tokens", "0"], "a\n", ["at least 1"]),
        (["--templat", "chatml"], "a\n", ["unknown option --templat", "--template"]),
    ],
)
def test_bad_input_is_one_line(run, args, extra, stdin, parts):
    done = run([*args, *extra], stdin)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    for part in parts:
        assert part in done.err


def test_model_without_a_template(run, tiny_path):
    done = run(["chat", tiny_path], "a\n")
    assert (done.status, done.out) == (2, "")
    names = "llama-2, llama-3, mistral, chatml, or a Jinja file"
    assert f"error: the model has no chat template; choose one: {names}" in done.err


def test_closed_stdin(run, args, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert cli.main(args) == 2
    assert "stdin is closed" in capsys.readouterr().err


def test_help(run):
    done = run(["chat", "--help"])
    assert done.status == 0
    for part in ("--system", "--template", "--stop-string", "printf", "chatml"):
        assert part in done.out


# In a pseudo-terminal


# Makes the pseudo-terminal the controlling terminal, so that Ctrl-C typed there sends SIGINT.
SET_CONTROLLING_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "llama_jax.cli", *sys.argv[1:]])
"""


class Terminal:
    """The command in a pseudo-terminal."""

    def __init__(self, args, *, stdout=None):
        self.fd, inside = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", SET_CONTROLLING_TERMINAL, *args],
            stdin=inside,
            stdout=stdout or inside,
            stderr=inside,
            env={**os.environ, "TERM": "dumb", "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
        os.close(inside)
        self.seen = ""

    def read(self) -> bool:
        """Reads new output; returns False at end of file."""
        if select.select([self.fd], [], [], 0.2)[0]:
            try:
                self.seen += os.read(self.fd, 1 << 16).decode(errors="replace")
            except OSError:  # Linux, when the other side is closed
                return False
        return True

    def until(self, pattern: str) -> str:
        """Reads until the output matches `pattern`, and returns it up to the end of the match."""
        end = time.monotonic() + 120
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            assert self.read(), f"end of output before {pattern!r}: {self.seen[-2000:]!r}"
            assert time.monotonic() < end, f"no {pattern!r} in {self.seen[-2000:]!r}"
        shown, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return shown

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait_for_key(self) -> None:
        """Waits until the command has used no processor time for a while, so that it waits for a key.

        CPython's `input` with readline notices Ctrl-C only while it waits: one that comes just after another
        key is noticed with the next key.
        """
        end = time.monotonic() + 60
        idle, before = 0, ""
        while idle < 4:
            assert time.monotonic() < end, "the command does not wait for a key"
            time.sleep(0.1)
            stat = Path(f"/proc/{self.process.pid}/stat").read_text()
            state, *counters = stat.rpartition(") ")[2].split()
            now = " ".join(counters[10:12])  # utime, stime
            idle, before = (idle + 1 if state == "S" and now == before else 0), now

    def status(self) -> int:
        """Waits for the process to exit and returns its status."""
        end = time.monotonic() + 60
        while self.process.poll() is None:
            assert time.monotonic() < end, f"still running: {self.seen[-2000:]!r}"
            self.read()
        return self.process.returncode


@pytest.fixture
def terminal():
    """Starts terminals, and kills their processes at teardown."""
    started = []

    def start(args, **options):
        started.append(Terminal(args, **options))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()
        os.close(one.fd)


@pytest.mark.slow
def test_ctrl_c_stops_only_the_answer(terminal, args, answers):
    long = [*args[:-1], "8000"]
    screen = terminal(long)
    assert "Ctrl-C stops an answer" in screen.until("> ")
    screen.type("ab ab\n")
    screen.until(r"ab ab\r\n.{20}")  # the answer has begun
    screen.type("\x03")
    stopped = screen.until(r"\n> ")
    assert "Traceback" not in stopped
    screen.type("/undo\n")
    screen.until("> ")
    screen.type("/unde\n")
    assert "did you mean /undo?" in screen.until(r"\n> ")
    screen.type("a\n")
    shown = screen.until(r"a\r\n.{30}")
    assert printable(answers[0]).replace("\n", "\r\n") in shown  # the same answer as in a new conversation
    screen.process.send_signal(signal.SIGINT)
    screen.until(r"\n> ")
    screen.type("\x04")  # Ctrl-D
    assert screen.status() == 0


@pytest.mark.slow
def test_ctrl_c_at_the_prompt_quits(terminal, args):
    screen = terminal(args)
    screen.until("> ")
    screen.wait_for_key()
    screen.type("half a li")
    screen.until("half a li")
    screen.wait_for_key()
    screen.type("\x03")  # clears the line
    screen.until(r"\n> ")
    assert screen.process.poll() is None
    screen.wait_for_key()
    screen.type("\x03")
    assert screen.status() == 0
    assert "Traceback" not in screen.seen


@pytest.mark.slow
def test_json_output_excludes_the_prompt(terminal, args, answers, tmp_path):
    out = tmp_path / "out"
    with out.open("w") as file:
        screen = terminal([*args, "--json"], stdout=file)
    screen.until("> ")
    screen.type("a\n")
    screen.until(r"\n> ")
    screen.type("/quit\n")
    assert screen.status() == 0
    assert json.loads(out.read_text())["assistant"] == answers[0]
