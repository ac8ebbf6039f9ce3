"""`llama-jax serve` as a process: it serves, ends by a signal, and refuses what cannot work in one line."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from llama_jax import cli
from llama_jax.serving import server
from llama_jax.serving.app import make_app
from llama_jax.serving.batcher import Batcher
from llama_jax.serving.service import Service
from tests.serving import http

ROOT = Path(__file__).parents[2]


def test_a_process_serves_and_ends_by_sigterm_with_its_answers_whole(tmp_path):
    model = http.load(tmp_path)
    command = [
        sys.executable,
        "-m",
        "llama_jax",
        "serve",
        tmp_path / "tiny.bin",
        "--port",
        "0",
        "--name",
        "mine",
    ]
    environment = {**os.environ, "LLAMA_JAX_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    options = ["--batch-size", "2", "--template", "chatml", "--api-key", "k", "--max-length", "352"]
    with subprocess.Popen(
        [*command, *options], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            lines = []
            while not lines or " is served at " not in lines[-1]:
                lines.append(process.stderr.readline())
                assert lines[-1], "".join(lines)
            url = lines[-1].split()[4]
            key = {"Authorization": "Bearer k"}
            body = {"model": "mine", "prompt": "ab", "temperature": 0, "max_tokens": 300, "stream": True}
            with httpx.stream(
                "POST", f"{url}/v1/completions", json=body, headers=key, timeout=60
            ) as response:
                assert response.status_code == 200
                process.send_signal(signal.SIGTERM)
                lines = [line for line in response.iter_lines() if line]
            assert lines[-1] == "data: [DONE]" and '"finish_reason": "length"' in lines[-2]
            assert process.wait(30) == 0
            assert process.stderr.read() == ""
        finally:
            process.kill()
    assert model.config.max_position_embeddings == 384


def test_ctrl_c_ends_a_server_as_it_ends_every_program(tmp_path):
    """In this process, whose main thread serves."""
    model = http.load(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with Batcher(model.config, model.params, batch_size=http.ROWS, max_length=352) as batcher:
            service = Service(model, batcher, "mine", template="chatml")
            with server.bind("127.0.0.1", 0) as bound, pytest.raises(KeyboardInterrupt):
                server.serve(make_app(service), service, bound, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert service.stopping
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def error(capsys, *arguments):
    """The line of a command that fails."""
    assert cli.main(["serve", *map(str, arguments)]) == 2
    done = capsys.readouterr()
    assert done.out == "" and done.err.startswith("error: ") and done.err.count("\n") == 1
    return done.err


def test_a_port_that_is_taken_is_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert (
            f"cannot listen on 127.0.0.1 port {port}: Address already in use; give another --port"
            in error(capsys, "smollm2-135m", "--port", port)
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "--port is 70000; it must be from 0, any free one, to 65535"),
        (["--timeout", "0"], "--timeout is 0; it must be above 0 seconds"),
        (["--api-key", ""], "the API key is empty"),
        (["--host", "no.such.host.invalid", "--port", "0"], "--host no.such.host.invalid: "),
        (["--batch-size", "0"], "must be at least 1"),
        (["--rows", "3"], "unknown option --rows"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    assert message in error(capsys, "smollm2-135m", *arguments)


def test_a_length_beyond_the_context_is_one_line(capsys, tmp_path):
    http.load(tmp_path)
    line = error(capsys, tmp_path / "tiny.bin", "--port", 0, "--max-length", 500)
    assert "max_length is 500; the model's context has 384 positions" in line


def test_a_missing_package_is_named(capsys, monkeypatch):
    monkeypatch.setattr("llama_jax.cli.serve._NEEDS", ("starlette", "no_such_package"))
    assert "serving needs no_such_package: pip install 'llama-jax[serve]'" in error(capsys, "smollm2-135m")
