"""What comparisons of Llama's kin with transformers share: random small models of its classes, and what of
them is compared. Files go through `save_pretrained` and `from_pretrained`, so that readers and writers are
compared as well.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

import llama_jax as lj
from llama_jax.forward_options import ForwardOptions
from tests.golden import beams, make_beams
from tests.golden.beams import Setting
from tests.parity import hf

TOLERANCE = 2e-5  # of the largest value
GRADIENT_TOLERANCE = 5e-5  # both sides round in f32
LENGTH, NEW_TOKENS, BEAMS = 40, 16, 3
PROMPTS = np.array([LENGTH, 5], np.int32)

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


class Loaded(NamedTuple):
    """A model of transformers, its folder, and what llama_jax reads from there."""

    model: Any
    folder: Path
    config: lj.LlamaConfig
    params: Any


def make(name: str, settings: dict[str, Any], folder: Path) -> Loaded:
    """A random model: every parameter is far from its initial value, norms and biases too.

    Args:
      name: the prefix of its classes in transformers.
      settings: of its configuration, beside `COMMON`.
      folder: where it is saved.
    """
    torch.manual_seed(len(name))
    config = getattr(transformers, f"{name}Config")(**(COMMON | settings), attn_implementation="eager")
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_norm = parameter_name.endswith("norm.weight")
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if is_norm else 0.0))
    model.save_pretrained(folder)
    return Loaded(model, folder, *lj.load_params(folder))


def tokens_of(rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, COMMON["vocab_size"], (rows, LENGTH)).astype(np.int32)


def close(ours: Any, theirs: Any, tolerance: float = TOLERANCE) -> None:
    theirs = theirs.detach().numpy() if hasattr(theirs, "detach") else np.asarray(theirs)
    assert np.abs(np.asarray(ours) - theirs).max() <= tolerance * np.abs(theirs).max()


def compare_training(loaded: Loaded, scratch: Path, *, custom_vjp: bool) -> Any:
    """Compares logits, the loss, with a mixture's load-balancing part, and the gradient of every parameter.

    Their gradient is saved as a checkpoint, and read as one is.

    Returns:
      Our loss and transformers' output, for what else they hold.
    """
    model, _, config, params = loaded
    tokens = tokens_of(2)
    coefficient = model.config.router_aux_loss_coef if config.num_experts else 0.0

    def loss(params: Any) -> Any:
        options = ForwardOptions(custom_vjp=custom_vjp)
        found = lj.next_token_loss(config, params, tokens, router_aux_loss=coefficient, options=options)
        return found.mean, (found, lj.forward(config, params, tokens))

    (value, (found, logits)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    model.zero_grad()
    ids = torch.tensor(tokens, dtype=torch.long)
    router = {"output_router_logits": True} if config.num_experts else {}
    out = model(ids, labels=ids, **router)
    out.loss.backward()
    close(logits, out.logits)
    assert abs(float(value) - out.loss.item()) <= 1e-6 * out.loss.item()

    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
        model.save_pretrained(scratch / "gradient")
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    _, theirs = lj.load_params(scratch / "gradient")
    jax.tree.map(partial(close, tolerance=GRADIENT_TOLERANCE), gradient, theirs)
    return found, out


def compare_decoding(loaded: Loaded) -> None:
    """Compares greedy texts and all beams with their scores, of a long and a short prompt."""
    model, _, config, params = loaded
    tokens = tokens_of(len(PROMPTS))
    key, greedy = jax.random.key(0), lj.Sampling(temperature=0.0)
    texts = lj.generate(config, params, tokens, PROMPTS, key, greedy, max_new_tokens=NEW_TOKENS)
    setting = Setting(BEAMS, False, 1.0, ())
    found = beams.run(config, params, tokens, PROMPTS, setting, NEW_TOKENS)
    for row, length in enumerate(PROMPTS):
        prompt = tokens[row, :length].tolist()
        assert texts.tokens[row].tolist() == hf.generate(model, prompt, NEW_TOKENS)
        expected, _, scores = make_beams.search(model, prompt, setting, NEW_TOKENS)
        np.testing.assert_array_equal(found.tokens[row], expected)
        np.testing.assert_allclose(found.scores[row], scores, rtol=beams.TOLERANCE)


def compare_files(loaded: Loaded, scratch: Path) -> None:
    """Compares the files that we write with theirs, tensor by tensor, and reads them in transformers."""
    model, folder, config, params = loaded
    path = lj.save(config, params, scratch / "ours")
    assert lj.load_params(path)[0] == config
    written, original = load_file(path / "model.safetensors"), load_file(folder / "model.safetensors")
    assert written.keys() == original.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(written[name], tensor)
    again = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    ids = torch.tensor(tokens_of(1), dtype=torch.long)
    with torch.inference_mode():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)
