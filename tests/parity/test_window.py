"""Live comparison of sliding windows with transformers: Mistral, and Qwen3 with layers of two kinds."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest

import llama_jax as lj
from llama_jax.adapters import prefix
from tests.golden.beams import Setting
from tests.random_models import normal

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.golden import make_beams  # noqa: E402  (needs torch)
from tests.parity import hf  # noqa: E402

pytestmark = pytest.mark.parity

WINDOW, LENGTH, NEW = 8, 40, 24
CONFIG = lj.LlamaConfig(
    vocab_size=72,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    sliding_window=WINDOW,
)
MIXED = CONFIG.replace(window_layers=(True, False, True), qk_norm=True)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, LENGTH))


def reference(ours: lj.LlamaConfig, params: Any) -> Any:
    """Mistral, or with norms of queries and keys Qwen3, in f32 and with plain attention."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps")
    given: dict[str, Any] = {name: getattr(ours, name) for name in names}
    given |= {"rope_parameters": {"rope_type": "default", "rope_theta": ours.rope_theta}}
    given |= {"sliding_window": WINDOW, "tie_word_embeddings": False, "attn_implementation": "eager"}
    given |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    state = hf.state_dict(params)
    if ours.qk_norm:
        kinds = ["sliding_attention" if kind.window else "full_attention" for kind in ours.layer_kinds]
        config = transformers.Qwen3Config(**given, use_sliding_window=True, layer_types=kinds)
        model = transformers.Qwen3ForCausalLM(config)
        for i in range(ours.num_hidden_layers):
            for name in ("q_norm", "k_norm"):
                scale = params["layers"]["attention"][name][i]
                state[f"model.layers.{i}.self_attn.{name}.weight"] = np.asarray(scale)
    else:
        model = transformers.MistralForCausalLM(transformers.MistralConfig(**given))
    model.load_state_dict({name: torch.tensor(np.asarray(array)) for name, array in state.items()})
    return model.eval()


@pytest.mark.parametrize("ours", [CONFIG, MIXED], ids=["mistral", "qwen3"])
def test_logits_greedy_texts_and_beams(ours: lj.LlamaConfig) -> None:
    config, shapes = ours, jax.eval_shape(functools.partial(lj.init, ours), jax.random.key(0))
    params = normal(0, shapes, 0.2, {"scale": 1.0})
    theirs = reference(config, params)
    with torch.inference_mode():
        logits = theirs(torch.from_numpy(TOKENS), use_cache=False).logits.numpy()
    for backend in ("xla", "blockwise"):
        found = lj.forward(config, params, TOKENS, attention_backend=backend)
        np.testing.assert_allclose(found, logits, atol=2e-4)
    without = lj.forward(config.replace(sliding_window=None, window_layers=()), params, TOKENS)
    assert np.abs(np.asarray(without) - logits).max() > 0.1

    lengths = np.array([LENGTH, 5], np.int32)
    prompts = [row[:length].tolist() for row, length in zip(TOKENS, lengths, strict=True)]
    key, greedy = jax.random.key(0), lj.Sampling(temperature=0.0)
    out = lj.generate(config, params, TOKENS, lengths, key, greedy, max_new_tokens=NEW)
    beams = lj.beam_search(config, params, TOKENS, lengths, 3, max_new_tokens=NEW, num_return_sequences=3)
    for row, prompt in enumerate(prompts):
        assert out.tokens[row].tolist() == hf.generate(theirs, prompt, NEW)
        tokens, _, scores = make_beams.search(theirs, prompt, Setting(3, False, 1.0, (), {}), NEW)
        np.testing.assert_array_equal(beams.tokens[row], tokens)
        np.testing.assert_allclose(beams.scores[row], scores, rtol=1e-4)


def test_the_window_passes_over_a_prefix_as_in_peft() -> None:
    peft = pytest.importorskip("peft")
    shapes = jax.eval_shape(functools.partial(lj.init, CONFIG), jax.random.key(0))
    params, length = normal(0, shapes, 0.2, {"scale": 1.0}), 5
    settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length)
    theirs = peft.get_peft_model(reference(CONFIG, params), settings).eval()
    table = theirs.prompt_encoder["default"].embedding.weight
    values = np.random.default_rng(3).standard_normal(table.shape).astype(np.float32)
    with torch.inference_mode():
        table.copy_(torch.from_numpy(values))
        ones = torch.ones(TOKENS.shape, dtype=torch.long)
        logits = theirs(input_ids=torch.from_numpy(TOKENS), attention_mask=ones).logits.numpy()
    # [P, L, 2, K, H] -> keys and values [L, K, P, H]
    shape = length, CONFIG.num_hidden_layers, 2, CONFIG.num_key_value_heads, CONFIG.head_dim
    keys, stored = np.transpose(values.reshape(shape), (2, 1, 3, 0, 4))
    adapter = {"layers": {"attention": {"k": keys, "v": stored}}}
    attached = prefix.attach(prefix.Prefix(length), params, adapter)
    for backend in ("xla", "blockwise"):
        found = lj.forward(CONFIG, attached, TOKENS, attention_backend=backend)
        np.testing.assert_allclose(found, logits, atol=2e-4)
