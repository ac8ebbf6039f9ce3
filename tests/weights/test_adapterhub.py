"""Bottleneck adapters in AdapterHub's format: golden logits, round trips, and files that are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import llama_jax as lj
from llama_jax.adapters import bottleneck
from llama_jax.errors import CheckpointError
from llama_jax.weights import load_params, open_source
from llama_jax.weights.adapters import load_adapter
from llama_jax.weights.write.adapters import save_adapter
from tests.adapters.adapted import CONFIG, base_params, random_adapter

GOLDEN = Path(__file__).parents[1] / "golden" / "bottleneck"
KINDS = {
    "both": bottleneck.Bottleneck(8),
    "one": bottleneck.Bottleneck(5, target_modules=("attention",), activation="relu"),
    "wide": bottleneck.Bottleneck(48, activation="gelu"),
}


@pytest.mark.parametrize("name", ["houlsby", "feed_forward"])
def test_adapterhub_golden_logits(name):
    golden = np.load(GOLDEN / "logits.npz")
    source = open_source(GOLDEN / "base")
    params = load_params(source, dtype=np.dtype(np.float32))
    settings, adapter = load_adapter(GOLDEN / name)
    logits = lj.forward(source.config, bottleneck.attach(settings, params, adapter), golden["tokens"])
    assert np.abs(golden[name] - golden["plain"]).max() > 0.1
    np.testing.assert_allclose(logits, golden[name], atol=2e-5 * np.abs(golden[name]).max())


def test_written_files_match_adapterhubs(tmp_path):
    settings, adapter = load_adapter(GOLDEN / "houlsby")
    config = open_source(GOLDEN / "base").config
    save_adapter(tmp_path / "a", settings, adapter, config, base_model="base")
    theirs, ours = (
        load_file(GOLDEN / "houlsby" / "adapter.safetensors"),
        load_file(tmp_path / "a/adapter.safetensors"),
    )
    renamed = {name.replace(".llama_jax.", ".houlsby."): array for name, array in ours.items()}
    jax.tree.map(np.testing.assert_array_equal, renamed, theirs)
    described = json.loads((GOLDEN / "houlsby" / "adapter_config.json").read_text())
    found = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert found["config"].items() <= described["config"].items()
    same = {"hidden_size", "model_class", "model_type", "version"}
    assert {key: found[key] for key in same} == {key: described[key] for key in same}


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_bitwise(kind, tmp_path):
    adapter = random_adapter(KINDS[kind], base_params())
    save_adapter(tmp_path / "a", KINDS[kind], adapter, CONFIG)
    settings, again = load_adapter(tmp_path / "a")
    assert (settings.size, settings.sublayers, settings.activation) == (
        KINDS[kind].size,
        KINDS[kind].sublayers,
        KINDS[kind].activation,
    )
    jax.tree.map(np.testing.assert_array_equal, again, adapter)
    factor = json.loads((tmp_path / "a/adapter_config.json").read_text())["config"]["reduction_factor"]
    assert int(CONFIG.hidden_size // factor) == settings.size  # as AdapterHub computes it


def altered(folder: Path, fields=None, tensors=None) -> Path:
    """A copy of the golden adapter with other fields in its `config`, or other tensors."""
    shutil.copytree(GOLDEN / "houlsby", folder)
    description = json.loads((folder / "adapter_config.json").read_text())
    description["config"] |= fields or {}
    (folder / "adapter_config.json").write_text(json.dumps(description))
    if tensors is not None:
        save_file(tensors(load_file(folder / "adapter.safetensors")), folder / "adapter.safetensors")
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "lora"}, "architecture is 'lora'; only AdapterHub's bottleneck adapters"),
        ({"non_linearity": "tanh"}, "non_linearity is 'tanh'; it must be one of swish, silu, gelu, relu"),
        ({"non_linearity": None}, "non_linearity is 'None'"),
        ({"original_ln_before": True}, "original_ln_before is 'True'; only False, as in double_seq_bn"),
        ({"is_parallel": True}, "is_parallel is 'True'; only False"),
        ({"phm_layer": True}, "phm_layer is 'True'"),
        ({"leave_out": [1]}, "leave_out is '[1]'; only []"),
        ({"scaling": "learned"}, "scaling is 'learned'; it must be a number"),
        ({"scaling": float("nan")}, "scaling is 'nan'"),
        ({"mh_adapter": False, "output_adapter": False}, "it or mh_adapter must be true"),
        (
            {"mh_adapter": False},
            "unexpected tensors according to adapter_config.json: 'model.layers.0.attention",
        ),
    ],
    ids=str,
)
def test_unsupported_configs_are_refused(fields, message, tmp_path):
    with pytest.raises(CheckpointError) as error:
        load_adapter(altered(tmp_path / "a", fields))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


FIRST = "model.layers.0.output_adapters.adapters.houlsby.adapter_up.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {k: v for k, v in t.items() if k != FIRST},
            "missing tensors: layers.0.output_adapters",
        ),
        (
            lambda t: {**t, "extra": np.zeros(3, np.float32)},
            "unexpected tensor 'extra'; the file must hold",
        ),
        (
            lambda t: {**t, FIRST.replace("houlsby", "other"): t[FIRST]},
            "other.adapter_up.weight'; the file must hold exactly one",
        ),
        (lambda t: {**t, FIRST: t[FIRST][:, :3].copy()}, "wrong shapes: model.layers.0.output_adapters"),
        (lambda t: {k: v[:0].copy() for k, v in t.items()}, "wrong shapes"),
    ],
)
def test_unsupported_tensors_are_refused(change, message, tmp_path):
    with pytest.raises(CheckpointError) as error:
        load_adapter(altered(tmp_path / "a", tensors=change))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_pickles_are_refused(tmp_path):
    folder = altered(tmp_path / "a")
    (folder / "adapter.safetensors").rename(folder / "pytorch_adapter.bin")
    with pytest.raises(CheckpointError, match=r"only pytorch_adapter\.bin, a pickle: save it with"):
        load_adapter(folder)
