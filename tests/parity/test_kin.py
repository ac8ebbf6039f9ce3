"""Live comparison of Llama's kin with transformers: logits, gradients, decoding, files in both directions.

The models are random and small, and of transformers' own classes. Files go through `save_pretrained` and
`from_pretrained`, so that readers and writers are compared as well.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import llama_jax as lj

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

TOLERANCE = 2e-5  # of the largest logit
LENGTH, NEW_TOKENS, BEAMS = 40, 24, 3

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@dataclasses.dataclass(frozen=True)
class Kin:
    """A model of transformers, and what our configuration of it says."""

    name: str
    settings: dict[str, Any]
    expected: dict[str, Any]


KIN = {
    "llama with biases": Kin("Llama", {"attention_bias": True}, {"qkv_bias": True, "out_bias": True}),
    "qwen2": Kin("Qwen2", {"tie_word_embeddings": True}, {"qkv_bias": True, "tie_word_embeddings": True}),
    "qwen2.5 with yarn": Kin(
        "Qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        {"qkv_bias": True},
    ),
    "qwen3": Kin("Qwen3", {"head_dim": 24}, {"qk_norm": True, "head_dim": 24}),
    "qwen3 with biases": Kin(
        "Qwen3", {"head_dim": 16, "attention_bias": True}, {"qk_norm": True, "out_bias": True}
    ),
    "smollm3": Kin("SmolLM3", {}, {"rope_layers": (True, True, True, False)}),
    "smollm3, alternating": Kin(
        "SmolLM3", {"no_rope_layer_interval": 2}, {"rope_layers": (True, False, True, False)}
    ),
}


def make(kin: Kin) -> Any:
    """The random model: every parameter is far from its initial value, norms and biases too."""
    torch.manual_seed(len(kin.name))
    config = getattr(transformers, f"{kin.name}Config")(
        **(COMMON | kin.settings), attn_implementation="eager"
    )
    model = getattr(transformers, f"{kin.name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = name.endswith("norm.weight")
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if is_norm else 0.0))
    return model


@pytest.fixture(scope="module", params=list(KIN))
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of transformers, its folder, and what llama_jax reads from there."""
    kin = KIN[request.param]
    model, folder = make(kin), tmp_path_factory.mktemp("kin")
    model.save_pretrained(folder)
    config, params = lj.load_params(folder)
    for name, value in kin.expected.items():
        assert getattr(config, name) == value
    return model, folder, config, params


def tokens_of(rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, COMMON["vocab_size"], (rows, LENGTH)).astype(np.int32)


def close(ours: Any, theirs: Any) -> None:
    theirs = theirs.detach().numpy() if hasattr(theirs, "detach") else theirs
    assert np.abs(np.asarray(ours) - theirs).max() <= TOLERANCE * np.abs(theirs).max()


def test_logits_and_gradients(loaded: Any) -> None:
    model, _, config, params = loaded
    tokens = tokens_of(2)

    def loss(params: Any) -> Any:
        logits = lj.forward(config, params, tokens)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1)
        return -picked.mean(), logits

    (value, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    model.zero_grad()
    out = model(torch.tensor(tokens, dtype=torch.long), labels=torch.tensor(tokens, dtype=torch.long))
    out.loss.backward()
    close(logits, out.logits)
    assert abs(float(value) - out.loss.item()) <= 1e-5 * out.loss.item()
    attention = gradient["layers"]["attention"]
    for layer, theirs in enumerate(model.model.layers):
        own = theirs.self_attn
        close(attention["wq"][layer].reshape(config.hidden_size, -1).T, own.q_proj.weight.grad)
        close(attention["wk"][layer].reshape(config.hidden_size, -1).T, own.k_proj.weight.grad)
        if config.qkv_bias:
            close(attention["bq"][layer].reshape(-1), own.q_proj.bias.grad)
            close(attention["bv"][layer].reshape(-1), own.v_proj.bias.grad)
        if config.out_bias:
            close(attention["bo"][layer], own.o_proj.bias.grad)
        if config.qk_norm:
            close(attention["q_norm"][layer], own.q_norm.weight.grad)
            close(attention["k_norm"][layer], own.k_norm.weight.grad)


def test_greedy_and_beams(loaded: Any) -> None:
    model, _, config, params = loaded
    tokens = tokens_of(2)
    lengths = np.full(2, LENGTH, np.int32)
    ids = torch.tensor(tokens, dtype=torch.long)
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    with torch.inference_mode():
        greedy = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        beams = model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=BEAMS, **settings)
    key = jax.random.key(0)
    sampling = lj.Sampling(temperature=0.0)
    ours = lj.generate(config, params, tokens, lengths, key, sampling, max_new_tokens=NEW_TOKENS)
    np.testing.assert_array_equal(ours.tokens, greedy[:, LENGTH:].numpy())
    found = lj.beam_search(config, params, tokens, lengths, num_beams=BEAMS, max_new_tokens=NEW_TOKENS)
    np.testing.assert_array_equal(np.asarray(found.tokens)[:, 0], beams[:, LENGTH:].numpy())


def test_files_that_we_write_are_theirs(loaded: Any, tmp_path: Path) -> None:
    model, folder, config, params = loaded
    path = lj.save(config, params, tmp_path / "ours")
    written, original = load_file(path / "model.safetensors"), load_file(folder / "model.safetensors")
    assert written.keys() == original.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(written[name], tensor)
    again = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    assert type(again) is type(model)
    ids = torch.tensor(tokens_of(1), dtype=torch.long)
    with torch.inference_mode():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("format", ["gguf", "orbax"])
def test_other_formats_give_the_same_parameters_back(loaded: Any, format: Any, tmp_path: Path) -> None:
    _, _, config, params = loaded
    if format == "gguf" and ((config.qk_norm and config.qkv_bias) or config.rope_layers == (True, False) * 2):
        with pytest.raises(lj.LlamaJaxError, match="has no place for"):
            lj.save(config, params, tmp_path / "out", format=format)
        return
    path = lj.save(config, params, tmp_path / "out", format=format)
    found, back = lj.load_params(path)
    assert found == config
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_unstacked_layers_and_a_mesh_give_the_same(loaded: Any) -> None:
    _, _, config, params = loaded
    tokens = tokens_of(4)
    forward = jax.jit(partial(lj.forward, config))
    expected = forward(params, tokens)
    close(forward(lj.unstack(params), tokens), np.asarray(expected))
    mesh = lj.make_mesh("fsdp=4,tensor=2")
    with jax.set_mesh(mesh):
        close(np.asarray(forward(lj.shard_params(params, mesh, config), tokens)), np.asarray(expected))


def random_settings(name: str, seed: int) -> dict[str, Any]:
    """The settings of a random small model of a class of transformers."""
    rng = np.random.default_rng([seed, len(name)])
    heads, layers = int(rng.choice([2, 4, 6])), int(rng.integers(2, 5))
    settings = COMMON | {
        "hidden_size": 12 * heads,
        "intermediate_size": 8 * int(rng.integers(4, 12)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": int(rng.choice([1, 2, heads])),
        "rms_norm_eps": float(rng.choice([1e-6, 1e-5])),
        "tie_word_embeddings": bool(rng.integers(2)),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(rng.choice([1e4, 1e6]))},
    }
    if name == "Qwen3":
        settings |= {"head_dim": int(rng.choice([8, 20])), "attention_bias": bool(rng.integers(2))}
    if name == "SmolLM3":
        settings["no_rope_layers"] = [int(flag) for flag in rng.integers(0, 2, layers)]
    if name in ("Qwen2", "Qwen3"):
        kinds = np.array(["full_attention", "sliding_attention"])[rng.integers(0, 2, layers)]
        settings |= {"use_sliding_window": True, "sliding_window": 7, "layer_types": kinds.tolist()}
    if name in ("Mistral", "Mixtral"):
        settings["sliding_window"] = int(rng.integers(4, 20))
    if name == "Mixtral":  # whose products torch computes for multiples of 16 bytes
        experts, chosen = int(rng.integers(2, 6)), int(rng.integers(1, 3))
        settings |= {"num_local_experts": experts, "num_experts_per_tok": chosen, "hidden_size": 16 * heads}
    if name == "Llama":
        settings["attention_bias"] = True
    return settings


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "SmolLM3"])
def test_random_configurations(name: str, seed: int, tmp_path: Path) -> None:
    """The model that transformers saves is read, computes its logits, and is written as it was."""
    model = make(Kin(name, random_settings(name, seed), {}))
    model.save_pretrained(tmp_path / "theirs")
    config, params = lj.load_params(tmp_path / "theirs")
    tokens = tokens_of(2)
    with torch.inference_mode():
        expected = model(torch.tensor(tokens, dtype=torch.long)).logits
    close(jax.jit(partial(lj.forward, config))(params, tokens), expected)
    lj.save(config, params, tmp_path / "ours")
    assert lj.load_params(tmp_path / "ours")[0] == config
    written, original = (load_file(tmp_path / side / "model.safetensors") for side in ("ours", "theirs"))
    assert written.keys() == original.keys()
    for tensor, theirs in original.items():
        np.testing.assert_array_equal(written[tensor], theirs)
