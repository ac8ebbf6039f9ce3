"""Biases of projections: zero ones are left out, and only those that config.json announces are read."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import llama_jax as lj
from llama_jax.errors import CheckpointError
from tests import tiny
from tests.random_models import random_model

WIDTHS = {"self_attn.q": 16, "self_attn.k": 8, "self_attn.v": 8, "self_attn.o": 16}
WIDTHS |= {"mlp.gate": 24, "mlp.up": 24, "mlp.down": 16}


def test_zero_biases_are_none_and_trained_ones_are_read(tmp_path):
    config, params = random_model(5, tiny.CONFIG)
    path = lj.save(config, params, tmp_path / "a")
    file, fields = path / "model.safetensors", json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(fields | {"attention_bias": True, "mlp_bias": True}))
    biases = {
        f"model.layers.{layer}.{module}_proj.bias": np.zeros(width, np.float32)
        for layer in range(2)
        for module, width in WIDTHS.items()
    }
    weights = load_file(file)
    save_file(weights | biases, file)
    found, loaded = lj.load_params(path)
    assert found == config
    np.testing.assert_array_equal(loaded["layers"]["attention"]["wq"], params["layers"]["attention"]["wq"])
    biases["model.layers.1.mlp.up_proj.bias"][3] = 1e-6
    save_file(weights | biases, file)
    found, loaded = lj.load_params(path)
    assert found == config.replace(mlp_bias=True)
    assert np.argwhere(loaded["layers"]["feed_forward"]["b_up"]).tolist() == [[1, 3]]
    assert not np.any(loaded["layers"]["feed_forward"]["b_down"])
    del biases["model.layers.0.mlp.down_proj.bias"]
    save_file(weights | biases, file)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.down_proj\.bias"):
        lj.load_params(path)
    (path / "config.json").write_text(json.dumps(fields | {"attention_bias": True}))
    save_file(weights | biases | {"model.layers.1.extra": np.ones(3, np.float32)}, file)
    names = "'model.layers.1.extra', 'model.layers.1.mlp.up_proj.bias'"
    with pytest.warns(UserWarning, match=f"ignored, as by transformers: {names}, which a Llama does not"):
        found, loaded = lj.load_params(path)
    assert found == config
    np.testing.assert_array_equal(loaded["layers"]["attention"]["wq"], params["layers"]["attention"]["wq"])
