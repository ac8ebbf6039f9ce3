"""Live comparison of sliding windows with transformers: attention's backends, and a prefix beside a window.

Gradients, decoding and files of models with windows are compared in `test_kin.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_jax as lj
from llama_jax.adapters import prefix

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.parity.kin import close, make, tokens_of  # noqa: E402  (needs torch)

pytestmark = pytest.mark.parity

MISTRAL = {"num_hidden_layers": 3, "sliding_window": 8, "head_dim": 16}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
QWEN3 = MISTRAL | {"use_sliding_window": True, "layer_types": KINDS}


@pytest.mark.parametrize(("name", "settings"), [("Mistral", MISTRAL), ("Qwen3", QWEN3)])
def test_every_backend_of_attention(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model, _, config, params = make(name, settings, tmp_path)
    tokens = tokens_of(2)
    with torch.inference_mode():
        logits = model(torch.tensor(tokens, dtype=torch.long), use_cache=False).logits.numpy()
    for backend in ("xla", "blockwise"):
        close(lj.forward(config, params, tokens, attention_backend=backend), logits)
    without = lj.forward(config.replace(sliding_window=None, window_layers=()), params, tokens)
    assert np.abs(np.asarray(without) - logits).max() > 0.1


def test_the_window_passes_over_a_prefix_as_in_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, _, config, params = make("Mistral", MISTRAL, tmp_path)
    length, tokens = 5, tokens_of(2)
    settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length)
    theirs = peft.get_peft_model(model, settings).eval()
    table = theirs.prompt_encoder["default"].embedding.weight
    values = np.random.default_rng(3).standard_normal(table.shape).astype(np.float32)
    with torch.inference_mode():
        table.copy_(torch.from_numpy(values))
        ones = torch.ones(tokens.shape, dtype=torch.long)
        logits = theirs(input_ids=torch.tensor(tokens, dtype=torch.long), attention_mask=ones).logits.numpy()
    # [P, L, 2, K, H] -> keys and values [L, K, P, H]
    shape = length, config.num_hidden_layers, 2, config.num_key_value_heads, config.head_dim
    keys, stored = np.transpose(values.reshape(shape), (2, 1, 3, 0, 4))
    adapter = {"layers": {"attention": {"k": keys, "v": stored}}}
    attached = prefix.attach(prefix.Prefix(length), params, adapter)
    for backend in ("xla", "blockwise"):
        found = lj.forward(config, attached, tokens, attention_backend=backend)
        np.testing.assert_allclose(found, logits, atol=2e-4)
