"""Adapters of all experts at once: PEFT's `target_parameters` on transformers 5's tensors of a mixture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from llama_jax.errors import CheckpointError
from llama_jax.weights.adapters import load_adapter

LAYERS, E, D, F, RANK, ALPHA = 2, 3, 8, 6, 4, 6.0
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
FIELDS = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj"]}
FIELDS |= {"target_parameters": [DOWN, GATE_UP], "rank_pattern": {"experts.down_proj": 2}}
PREFIX = "base_model.model.model.layers"
DRAW = np.random.default_rng(0)


def draw(*shape: int) -> np.ndarray:
    return DRAW.normal(size=shape).astype(np.float32)


def tensors() -> dict[str, np.ndarray]:
    """As PEFT writes them: the wrapper of the parameter that comes first in the model is the inner one."""
    found = {}
    for layer in range(LAYERS):
        found[f"{PREFIX}.{layer}.mlp.experts.base_layer.lora_A.weight"] = draw(E * RANK, D)
        found[f"{PREFIX}.{layer}.mlp.experts.base_layer.lora_B.weight"] = draw(2 * F, RANK * E)
        found[f"{PREFIX}.{layer}.mlp.experts.lora_A.weight"] = draw(E * 2, F)
        found[f"{PREFIX}.{layer}.mlp.experts.lora_B.weight"] = draw(D, 2 * E)
        found[f"{PREFIX}.{layer}.self_attn.q_proj.lora_A.weight"] = draw(RANK, D)
        found[f"{PREFIX}.{layer}.self_attn.q_proj.lora_B.weight"] = draw(D, RANK)
    return found


def write(folder: Path, stored: dict[str, np.ndarray], **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(stored, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(FIELDS | changes))
    return folder


def delta(stored: dict[str, np.ndarray], layer: int, level: str) -> np.ndarray:
    """`ParamWrapper.get_delta_weight` of PEFT without its scale: [E, out, in]."""
    a, b = (stored[f"{PREFIX}.{layer}.mlp.experts.{level}lora_{factor}.weight"] for factor in "AB")
    return np.einsum("ore,eri->eoi", b.reshape(b.shape[0], -1, E), a.reshape(E, -1, a.shape[-1]))


def updates(adapter: Any, settings: Any, name: str) -> np.ndarray:
    """[layers, E, out, in]."""
    leaves = adapter["layers"]["feed_forward"][name]
    return settings.scale * np.einsum("leir,lero->leoi", leaves["a"], leaves["b"])


@pytest.mark.parametrize("swapped", [False, True])
def test_each_expert_has_the_update_of_pefts_formula(swapped: bool, tmp_path: Path) -> None:
    """Whichever wrapper is the inner one."""
    stored = tensors()
    names = {name: name for name in stored}
    if swapped:
        names = {
            name: name.replace("base_layer.", "")
            if "base_layer" in name
            else name.replace("experts.", "experts.base_layer.")
            for name in stored
        }
    settings, adapter = load_adapter(write(tmp_path / "a", {names[name]: x for name, x in stored.items()}))
    assert settings.matrices == ("wq", "w_gate", "w_up", "w_down")
    for layer in range(LAYERS):
        gate_up = ALPHA / RANK * delta(stored, layer, "base_layer.")
        down = ALPHA / 2 * delta(stored, layer, "")
        for name, expected in (("w_gate", gate_up[:, :F]), ("w_up", gate_up[:, F:]), ("w_down", down)):
            np.testing.assert_allclose(
                updates(adapter, settings, name)[layer], expected, rtol=1e-5, atol=1e-5
            )


def test_one_parameter_is_named_by_the_settings(tmp_path: Path) -> None:
    stored = {
        name.replace("base_layer.", ""): x
        for name, x in tensors().items()
        if "base_layer" in name or "q_proj" in name
    }
    settings, adapter = load_adapter(
        write(tmp_path / "a", stored, target_parameters=["experts.gate_up_proj"])
    )
    assert settings.matrices == ("wq", "w_gate", "w_up")
    expected = ALPHA / RANK * delta(stored, 1, "")[:, F:]
    np.testing.assert_allclose(updates(adapter, settings, "w_up")[1], expected, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    stored = tensors()

    def refused(pattern: str, stored: dict[str, np.ndarray] = stored, **changes: Any) -> None:
        with pytest.raises(CheckpointError, match=pattern) as caught:
            load_adapter(write(tmp_path / "a", stored, **changes))
        assert "\n" not in str(caught.value)

    refused(
        r"target_parameters has 'mlp\.gate\.weight'; only experts'", target_parameters=["mlp.gate.weight"]
    )
    refused(r"target_parameters is 'x'; it must be a list", target_parameters="x")
    refused(r"missing tensors of the layers' experts", target_parameters=[DOWN])
    refused(
        r"missing tensors of the layers' experts",
        {k: x for k, x in stored.items() if "layers.0.mlp" not in k},
    )
    name = f"{PREFIX}.1.mlp.experts.base_layer.lora_B.weight"
    refused(r"missing tensors of the layers' experts", {k: x for k, x in stored.items() if k != name})
    refused(r"are not of \[2F, D\] and \[D, F\]", {**stored, name: draw(2 * F + 1, RANK * E)})
    refused(r"a whole number of experts of rank 4", {**stored, name: draw(2 * F, RANK * E + 1)})
    refused(r"a whole number of experts of rank 5", r=5)
    refused(r"unexpected tensors", target_parameters=None)
