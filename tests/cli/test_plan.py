"""`llama-jax plan` on the command line: output, bad input, files written whole."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from llama_jax import cli

FAST = ("llama2_70b", "--topology", "v5p:4x4x4", "--fast")


@pytest.fixture
def run(capsys):
    """Runs one command line: (status, stdout, stderr)."""

    def run(*args):
        status = cli.main(["plan", *map(str, args)])
        return (status, *capsys.readouterr())

    return run


def assert_error(done, *parts):
    status, out, err = done
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert str(part) in err


def test_tables_of_memory_time_traffic_and_cost(run):
    status, out, err = run(*FAST)
    assert status == 0, err
    for shown in (
        "activations",
        "capacity",
        "attention",
        "all-gather over fsdp",
        "tokens/s",
        "chip-hours; $",
    ):
        assert shown in out
    assert "batch of 256 sequences: as many per chip as 1024 on v5p:8x8x4" in err


def test_arithmetic_imports_nothing_that_it_does_not_need():
    """The whole command takes less than a second, most of it importing JAX."""
    code = (
        f"import sys; from llama_jax import cli; cli.main({['plan', *FAST]}); "
        "heavy = {'grain', 'optax', 'orbax', 'libtpu', 'jax.experimental.pallas'} & set(sys.modules); "
        "sys.exit(f'imports {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_json_agrees_with_itself(run):
    status, out, _ = run(*FAST, "--json", "--tokens", "1T", "--price", "2")
    assert status == 0
    plan = json.loads(out)
    assert plan["chips"] == 64
    assert plan["step_seconds"] == pytest.approx(
        plan["compute_seconds"] + plan["exposed_seconds"] + plan["launch_seconds"]
    )
    assert plan["run"]["dollars"] == pytest.approx(2 * plan["run"]["chip_hours"])
    assert plan["run"]["tokens"] == pytest.approx(1e12, rel=1e-5)
    assert plan["memory"]["fits"]
    assert 0.4 < plan["mfu"] < plan["mfu_without_waiting"] < 1


def test_explain_and_page(run, tmp_path):
    path = tmp_path / "plan.html"
    status, out, err = run(*FAST, "--explain", "--html", path)
    assert status == 0, err
    assert "bound by matrix units" in out
    assert "llama2_70b on v5p:4x4x4" in path.read_text()
    assert [path] == list(tmp_path.iterdir())


def test_too_little_memory_is_an_answer_with_what_fits(run):
    status, out, _ = run(*FAST, "--train.remat", "none")
    assert status == 0
    assert "DOES NOT FIT" in out
    assert "a chip more than there is. By arithmetic these fit:" in out
    assert "--train.remat" in out
    plan = json.loads(run(*FAST, "--train.remat", "none", "--json")[1])
    assert not plan["memory"]["fits"]
    assert plan["alternatives"]
    assert all(one["peak_bytes"] <= plan["memory"]["capacity"] for one in plan["alternatives"])


def test_slices_cross_data(run):
    plan = json.loads(run(*FAST, "--slices", 2, "--json")[1])
    assert (plan["chips"], plan["mesh"]["data"]) == (128, 2)
    assert [one["axes"] for one in plan["traffic"] if one["network"] == "dcn"] == ["data"]


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (("llama2_70b", "--topology", "v5q:4x4x4", "--fast"), ("v5q", "v5p")),
        (("llama2_70b", "--topology", "v5p-7", "--fast"), ("v5p-7",)),
        (("llama2_70b", "--topology", "v5p:4x4x4", "--fast", "--mesh.fsdp", "3"), ("mesh", "64")),
        ((*FAST, "--train.global_batch_size", "65"), ("65",)),
        ((*FAST, "--train.remt", "full"), ("train.remat",)),
        (("llama2_71b",), ("llama2_7",)),
        ((*FAST, "--price", "-1"), ("--price", "0 or more")),
        ((*FAST, "--tokens", "lots"), ("--tokens",)),
        ((*FAST, "--batch", "4"), ("--batch is for --decode",)),
        ((*FAST, "--out", "x.toml"), ("--out is for --search",)),
        ((*FAST, "--html", "missing/plan.html"), ("missing", "create it")),
        (("smollm2-135m", "--decode"), ("--topology",)),
        (("smollm2-135m", "--decode", "--topology", "v5e:2x2", "--search"), ("--search plans training",)),
        (("tiny_cpu",), ("--topology",)),
        ((*FAST, "--fsat"), ("--fast",)),
    ],
)
def test_bad_input_is_one_line(run, args, parts):
    assert_error(run(*args), *parts)
