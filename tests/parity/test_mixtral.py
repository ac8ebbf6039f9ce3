"""Live comparison of mixtures of experts with transformers' Mixtral: logits, losses, decoding, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import llama_jax as lj
from llama_jax.forward_options import ForwardOptions

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

TOLERANCE = 2e-5  # of the largest logit
LENGTH, NEW_TOKENS, BEAMS, COEFFICIENT = 40, 24, 3, 0.3


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random Mixtral, its folder, and what llama_jax reads from there."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        num_local_experts=6,
        num_experts_per_tok=2,
        router_aux_loss_coef=COEFFICIENT,
        sliding_window=None,
        attn_implementation="eager",
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    )
    model = transformers.MixtralForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = name.endswith("norm.weight")
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if is_norm else 0.0))
    folder = tmp_path_factory.mktemp("mixtral")
    model.save_pretrained(folder)
    ours, params = lj.load_params(folder)
    assert (ours.num_experts, ours.num_experts_per_tok, ours.sliding_window) == (6, 2, None)
    return model, folder, ours, params


def tokens_of(rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 96, (rows, LENGTH)).astype(np.int32)


def close(ours: Any, theirs: Any) -> None:
    theirs = theirs.detach().numpy() if hasattr(theirs, "detach") else theirs
    assert np.abs(np.asarray(ours) - theirs).max() <= TOLERANCE * np.abs(theirs).max()


@pytest.mark.parametrize("custom_vjp", [False, True])
def test_logits_loss_and_gradients(loaded: Any, custom_vjp: bool) -> None:
    model, _, config, params = loaded
    tokens = tokens_of(2)

    def loss(params: Any) -> Any:
        found = lj.next_token_loss(
            config,
            params,
            tokens,
            router_aux_loss=COEFFICIENT,
            options=ForwardOptions(custom_vjp=custom_vjp),
        )
        return found.mean, found

    (value, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    model.zero_grad()
    ids = torch.tensor(tokens, dtype=torch.long)
    out = model(ids, labels=ids, output_router_logits=True)
    out.loss.backward()
    close(lj.forward(config, params, tokens), out.logits)
    assert float(value) == pytest.approx(out.loss.item(), rel=1e-6)
    assert float(found.router.balance / found.count) == pytest.approx(out.aux_loss.item(), rel=1e-6)
    assert out.aux_loss.item() > 2.01  # not even, so that the gradient below has a part of it
    experts = gradient["layers"]["feed_forward"]
    for layer, theirs in enumerate(model.model.layers):
        block = theirs.mlp
        close(experts["router"][layer].T, block.gate.weight.grad)
        gate, up = block.experts.gate_up_proj.grad.chunk(2, dim=1)
        close(experts["w_gate"][layer].swapaxes(1, 2), gate)
        close(experts["w_up"][layer].swapaxes(1, 2), up)
        close(experts["w_down"][layer].swapaxes(1, 2), block.experts.down_proj.grad)


def test_the_loss_leaves_out_padding_as_an_attention_mask_does(loaded: Any) -> None:
    model, _, config, params = loaded
    tokens = tokens_of(2)
    is_token = np.arange(LENGTH) < np.array([[LENGTH], [25]])
    found = lj.next_token_loss(config, params, tokens, segment_ids=is_token.astype(np.int32))
    with torch.inference_mode():
        out = model(
            torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.tensor(is_token, dtype=torch.long),
            output_router_logits=True,
        )
    assert found.router is not None
    assert float(found.router.balance / found.count) == pytest.approx(out.aux_loss.item(), rel=1e-6)


def test_greedy_and_beams(loaded: Any) -> None:
    model, _, config, params = loaded
    tokens, lengths = tokens_of(2), np.full(2, LENGTH, np.int32)
    ids = torch.tensor(tokens, dtype=torch.long)
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    with torch.inference_mode():
        greedy = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        beams = model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=BEAMS, **settings)
    key, sampling = jax.random.key(0), lj.Sampling(temperature=0.0)
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


def test_verify_runs_both_sides(loaded: Any, tmp_path: Path) -> None:
    from llama_jax.eval.verify import compare

    _, folder, _, _ = loaded
    report = compare(folder, folder, b_backend="transformers", outputs=False)
    assert report.same and any(".experts." in tensor.name for tensor in report.tensors)


def test_peft_reads_our_adapters_of_experts_and_computes_the_same(loaded: Any, tmp_path: Path) -> None:
    """In the names of transformers 4, which PEFT converts to those of 5: a tensor for all experts."""
    from llama_jax.adapters import lora
    from llama_jax.weights.write.adapters import save_adapter

    peft = pytest.importorskip("peft")
    _, folder, config, params = loaded
    settings = lora.Lora(rank=4, alpha=6)
    adapter = lora.init(settings, params, jax.random.key(0))
    draw = np.random.default_rng(3)
    adapter = jax.tree.map(lambda x: x + draw.normal(size=x.shape, scale=0.1).astype(np.float32), adapter)
    save_adapter(tmp_path / "adapter", settings, adapter, config)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    tokens = tokens_of(2)
    with torch.inference_mode():
        theirs = model(torch.tensor(tokens, dtype=torch.long)).logits
    ours = lj.forward(config, lora.attach(settings, params, adapter), tokens)
    assert np.abs(ours - lj.forward(config, params, tokens)).max() > 0.1
    close(ours, theirs)
