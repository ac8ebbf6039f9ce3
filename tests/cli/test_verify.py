"""`llama-jax verify`: exit status, tables, JSON output and one-line errors."""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from llama_jax import cli
from tests import tiny
from tests.weights.writers import CONFIG, random_params, write_gguf, write_hf

LAYERS = CONFIG.num_hidden_layers


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs one command line and returns its status, stdout and stderr."""

    def run(*args):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"")))
        status = cli.main(["verify", *map(str, args)])
        return SimpleNamespace(status=status, **dict(zip(("out", "err"), capsys.readouterr(), strict=True)))

    return run


def assert_error(done, *parts):
    """Asserts exit status 2, an empty stdout, and one line on stderr that contains these parts."""
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    for part in parts:
        assert str(part) in done.err


@pytest.fixture(scope="module")
def a(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("model") / "a", CONFIG, random_params())


@pytest.fixture(scope="module")
def gguf(a):
    return write_gguf(a.parent / "b.gguf", CONFIG, random_params(), kind="BF16")


@pytest.fixture(scope="module")
def corrupted(a):
    params = random_params()
    params["layers"]["attention"]["wq"][1, 0, 0, 0] = np.nan
    return write_hf(a.parent / "corrupted", CONFIG, params, rms_norm_eps=1e-3)


def test_same_model(run, a, gguf):
    done = run(a, gguf)
    assert done.status == 0
    lines = done.out.splitlines()
    assert lines[:2] == [f"A  {a}  hf", f"B  {gguf}  gguf"]
    assert lines[-1] == "The same model, value for value."
    (row,) = (line.split() for line in lines if "q_proj" in line)
    assert row == ["model.layers.*.self_attn.q_proj.weight", "F32", "/", "BF16", str(LAYERS), "equal"]
    assert "config" not in done.out
    assert "residual stream" not in done.out
    assert "random tokens" in done.out
    assert run(a, a, "--tensors-only").out.splitlines()[-1] == "The same model, bit for bit."


def test_different_model(run, a, corrupted):
    done = run(a, corrupted)
    assert done.status == 1
    assert done.err == ""
    lines = done.out.splitlines()
    (field,) = (line.split() for line in lines if line.startswith("rms_norm_eps"))
    assert field == ["rms_norm_eps", "3e-06", "0.001"]
    (row,) = (line for line in lines if line.startswith("model.layers.*.self_attn.q_proj"))
    assert f"{LAYERS - 1} equal, 1 different" in row
    assert row.split()[-3:] == ["inf", "inf", "1"]
    name = "model.layers.1.self_attn.q_proj.weight"
    assert f"{name} has NaN or infinite values: 0 in A, 1 in B" in lines
    assert sum(line.startswith("layer ") for line in lines) == LAYERS
    assert lines[-2] == "The residual streams diverge at layer 0; none of its tensors differs."
    assert lines[-1].startswith("Not the same model: the configurations differ in rms_norm_eps; 1 of ")


def test_json(run, a, gguf, corrupted):
    done = run(a, gguf, "--json")
    found = json.loads(done.out)
    assert (done.status, done.err, done.out.count("\n")) == (0, "", 1)
    assert (found["same"], found["problems"], found["parted"]) == (True, [], None)
    assert found["b"] == {"path": str(gguf), "format": "gguf"}
    assert {tensor["verdict"] for tensor in found["tensors"]} == {"equal"}
    assert found["outputs"]["mean_kl"] == 0
    assert found["outputs"]["tokens"] == len(found["text"]["ids"])

    done = run(a, corrupted, "--json")
    found = json.loads(done.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert done.status == 1
    assert found["same"] is False
    assert found["outputs"]["mean_kl"] is None
    assert found["fields"] == [{"name": "rms_norm_eps", "values": [3e-6, 1e-3], "matters": True}]
    assert found["parted"]["layer"] == 0
    (tensor,) = (tensor for tensor in found["tensors"] if tensor["verdict"] != "equal")
    assert (tensor["layer"], tensor["max_difference"], tensor["not_finite"]) == (1, None, [0, 1])


def test_options_are_passed_to_the_comparison(run, a, tmp_path):
    params = random_params()
    params["layers"]["attention"]["wv"] *= 1.01
    other = write_hf(tmp_path, CONFIG, params)
    assert run(a, other).status == 1
    assert run(a, other, "--tolerance", "0.02", "--tensors-only").status == 0
    done = run(a, other, "--tolerance", "0.02", "--max-kl", "100")
    assert done.status == 0
    assert done.out.splitlines()[-1] == "The same model, within the tolerance."
    assert run(a, other, "--tolerance", "0.02", "--dtype", "bfloat16", "--max-kl", "0").status == 1


def test_text_file(run, tmp_path):
    path = tiny.write_model(tmp_path)
    file = tmp_path / "text"
    file.write_text("ab a")
    given = json.loads(run(path, path, "--prompt", "ab a", "--json").out)["text"]
    assert json.loads(run(path, path, "--text", file, "--json").out)["text"] == given
    assert len(given["ids"]) < tiny.CONFIG.max_position_embeddings
    file.write_bytes(b"a" + "é".encode() * (1 << 16))  # truncated within a character
    assert run(path, path, "--text", file).status == 0
    file.write_bytes(b"ab\xff")
    assert_error(run(path, path, "--text", file), file, "UTF-8", "0xff", "offset 2")
    assert_error(run(path, path, "--text", tmp_path / "none"), tmp_path / "none", "cannot be read")
    assert_error(run(path, path, "--text", "nul\0"), "cannot be read")


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ([], ["missing", "MODEL"]),
        (["{a}"], ["missing OTHER", "--with transformers"]),
        (["{a}", "{a}", "--with", "torch"], ["--with", "torch", "transformers"]),
        (["{a}", "{a}", "--prompt", "x", "--text", "y"], ["--prompt", "--text"]),
        (["{a}", "{a}", "--tolerance", "-1"], ["--tolerance", "-1", "at least 0"]),
        (["{a}", "{a}", "--max-kl", "nan"], ["--max-kl", "nan", "at least 0"]),
        (["{a}", "{a}", "--dtype", "int3"], ["--dtype", "int3", "bfloat16"]),
        (["{a}", "nothing.gguf"], ["nothing.gguf", "neither"]),
        (["{a}", "{a}", "--prompt", "x"], ["A has no tokenizer"]),
    ],
)
def test_bad_input(run, a, args, parts):
    assert_error(run(*(arg.format(a=a) for arg in args)), *parts)


def test_truncated_checkpoint(run, a, tmp_path):
    path = tiny.write_model(tmp_path)
    path.write_bytes(path.read_bytes()[:-1000])
    assert_error(run(a, path), path)


def test_help_lists_the_exit_statuses(run):
    done = run("--help")
    assert done.status == 0
    assert "llama-jax verify" in done.out.partition("examples:")[2]
    assert "exit status: 0 the same model; 1 not the same; 2 bad input" in done.out
