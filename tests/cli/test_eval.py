"""`llama-jax eval`: tables, JSON, files, one-line errors. Tasks: tests/parity/test_harness.py."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import llama_jax as lj
from llama_jax import cli
from llama_jax.eval.perplexity import perplexity

TEXT = "Once upon a time there was a little girl. She liked to play in the park. " * 2


@pytest.fixture
def run(capsys):
    def run(*args):
        status = cli.main(["eval", *map(str, args)])
        return SimpleNamespace(status=status, **dict(zip(("out", "err"), capsys.readouterr(), strict=True)))

    return run


@pytest.fixture(scope="module")
def path(shared_data) -> Path:
    return shared_data / "stories260K" / "stories260K.bin"


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def assert_error(done, *parts):
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
    for part in parts:
        assert str(part) in done.err


def test_perplexity_of_a_file(run, path, text):
    done = run(path, "--text", text, "--window", 48, "--stride", 16, "--json")
    found, expected = json.loads(done.out), perplexity(lj.load(path), TEXT, window=48, stride=16)
    assert (done.status, done.err) == (0, "")
    assert found["loss"] == pytest.approx(expected.loss, abs=1e-5)
    assert (found["tokens"], found["bytes"]) == (expected.tokens, len(TEXT))
    assert (found["window"], found["stride"], found["dtype"]) == (48, 16, "float32")
    table = run(path, "--text", text, "--window", 48, "--stride", 16).out
    assert f"{expected.bits_per_byte:.4f}" in table and "windows of 48 tokens, 16 apart" in table


def test_retrieval_writes_maps(run, path, tmp_path):
    out = tmp_path / "maps"
    args = ("--passkey", "--needle", "--lengths", "150,200", "--depths", "0,1", "--out", out)
    done = run(path, *args, "--json")
    report = json.loads(done.out)
    assert done.status == 0 and f"to {out}" in done.err
    for kind in ("passkey", "needle"):
        assert (report[kind]["lengths"], report[kind]["depths"]) == ([150, 200], [0.0, 1.0])
        assert [len(row) for row in report[kind]["found"]] == [2, 2]
        assert (out / f"{kind}.png").read_bytes().startswith(b"\x89PNG")
        assert str(path) in (out / f"{kind}.html").read_text()
    assert json.loads((out / "retrieval.json").read_text()) == report


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ([], ["give one of --tasks NAMES, --text FILE"]),
        (["--tasks", "a", "--text", "b"], ["give only one of"]),
        (["--text", "b", "--needle"], ["give only one of"]),
        (["--text", "b", "--limit", "3"], ["--limit belongs to --tasks; leave it out"]),
        (["--tasks", "b", "--stride", "3"], ["--stride belongs to --text"]),
        (["--text", "b", "--out", "c"], ["--out belongs to --tasks or --passkey or --needle"]),
        (["--passkey", "--haystack", "x"], ["--haystack belongs to --needle"]),
        (["--passkey", "--depths", "0,1.5"], ["--depths", "depth 1.5"]),
        (["--passkey", "--lengths", "0"], ["--lengths", "'0' must be at least 1"]),
        (["--tasks", "b", "--limit", "1.5"], ["--limit", "a whole number, or a share below 1"]),
        (["--tasks", "b", "--log-samples"], ["--log-samples needs --out DIR"]),
        (["--tasks", "b", "--fewshot-as-multiturn"], ["--fewshot-as-multiturn needs --chat-template"]),
        (["--tasks", " , "], ["--tasks is empty"]),
        (["--text", "nowhere.txt"], ["nowhere.txt: cannot be read: No such file"]),
        (["--passkey", "--out", "/dev/null/x"], ["--out /dev/null/x", "no folder"]),
    ],
)
def test_bad_usage(run, args, parts, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: True)  # lm-eval, which comes later
    assert_error(run("m", *args), *parts)


def test_bad_texts(run, path, text, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert_error(run(path, "--text", tmp_path / "empty.txt"), "empty.txt: is empty")
    assert_error(run(path, "--text", tmp_path / "latin.txt"), "latin.txt: is not UTF-8", "0xe9 at offset 3")
    assert_error(run(path, "--text", text, "--window", 9, "--stride", 10), "--stride 10 is larger", "9")
    assert_error(run(path, "--text", text, "--window", 1000), "window is 1000", "512 positions")


def test_a_length_beyond_the_context_writes_nothing(run, path, tmp_path):
    out = tmp_path / "maps"
    assert_error(run(path, "--needle", "--lengths", "600", "--out", out), "length 600", "512 positions")
    assert not out.exists()


def test_packages_that_are_not_installed(run, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    assert_error(run("m", "--tasks", "hellaswag"), "pip install 'llama-jax[eval]'")
    assert_error(run("m", "--needle", "--out", tmp_path / "x"), "pip install 'llama-jax[plot]'")
    assert not (tmp_path / "x").exists()
