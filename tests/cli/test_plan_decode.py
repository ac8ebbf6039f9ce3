"""`llama-jax plan --decode`: the table of batches, JSON, bad input."""

from __future__ import annotations

import json

import pytest

from llama_jax import cli


@pytest.fixture
def run(capsys):
    """Runs one command line: (status, stdout, stderr)."""

    def run(*args):
        status = cli.main(["plan", *map(str, args), "--decode"])
        return (status, *capsys.readouterr())

    return run


def plans(done):
    status, out, err = done
    assert status == 0, err
    return json.loads(out)


def test_batches_up_to_the_largest_that_fits(run):
    found = plans(run("llama2_70b", "--topology", "v5e:4x4", "--bits", 8, "--json"))
    batches = [one["batch"] for one in found["plans"]]
    assert batches == sorted(batches)
    assert batches[-1] == found["largest_batch"]
    assert all(one["fits"] for one in found["plans"])
    over = plans(
        run("llama2_70b", "--topology", "v5e:4x4", "--bits", 8, "--batch", batches[-1] + 8, "--json")
    )
    assert not over["plans"][0]["fits"]


def test_fewer_bytes_are_faster(run):
    def seconds(*args):
        done = run("llama2_7b", "--topology", "v5e:2x2", "--batch", 8, "--json", *args)
        return plans(done)["plans"][0]["step_seconds"]

    assert seconds("--bits", 4) < seconds("--bits", 8) < seconds()
    assert seconds("--cache-dtype", "fp8") == seconds("--cache-dtype", "int8") < seconds()


def test_the_table_says_what_does_not_fit(run):
    status, out, err = run("llama2_70b", "--topology", "v5e:2x2")
    assert status == 0, err
    assert "none: the weights do not fit" in out
    assert "DOES NOT FIT" in out


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (("llama2_71b", "--topology", "v5e:2x2"), "give a preset: "),
        (("llama2_7b", "--topology", "v5e:2x2", "--mesh", "tensor=3"), "mesh tensor 3"),
        (("llama2_7b", "--topology", "v5e:2x2", "--bits", 5), "invalid choice"),
        (("llama2_7b", "--topology", "v5e:2x2", "--train.steps", 5), "is a setting of training"),
    ],
)
def test_bad_input_is_one_line(run, args, part):
    status, out, err = run(*args)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert part in err
