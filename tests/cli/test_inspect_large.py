"""`llama-jax inspect` of a model larger than this machine's memory and disk: it reads only the headers."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

import llama_jax as lj
from llama_jax.cli import main
from llama_jax.weights.write.hf import plan_hf
from llama_jax.weights.write.vocabulary import Vocabulary


class Shapes:
    """A model with shapes and dtypes but no data."""

    stacked = False
    config = lj.presets.LLAMA2_70B

    def dtype(self, leaf, layer):
        return np.dtype("float16")


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face directory of real headers, with 138 GB of tensors as sparse files."""
    plan = plan_hf(Shapes(), None, Vocabulary())
    for piece in plan.blobs:
        (tmp_path / piece.file).write_bytes(piece.data)
    for name, size in plan.files.items():
        os.truncate(tmp_path / name, size)
    for name, data in plan.extras.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_70b_is_inspected_from_its_headers(folder, capsys):
    assert main(["inspect", str(folder), "--json", "--batch", "8", "--length", "4096"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["parameters"] == 68_976_648_192
    assert report["bytes_in_file"] == 2 * report["parameters"]
    assert sum(report["parameters_by_part"].values()) == report["parameters"]
    assert report["weight_bytes"]["bfloat16"] == 2 * report["parameters"]
    # Keys and values: 80 layers, 8 heads, head dim 128, for each of 8 x 4096 positions.
    assert report["kv_cache"]["bytes"]["bfloat16"] == 2 * 80 * 8 * 128 * 8 * 4096 * 2
    counts = {group["name"]: group["count"] for group in report["tensors"]}
    assert counts["model.layers.*.self_attn.q_proj.weight"] == 80
