"""Live comparison of mixtures of experts with transformers' Mixtral: losses of the router, adapters, verify.

Logits, gradients, decoding and files of mixtures are compared in `test_kin.py`.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

import llama_jax as lj

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.parity.kin import LENGTH, Loaded, close, compare_training, make, tokens_of  # noqa: E402

pytestmark = pytest.mark.parity

SETTINGS = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "head_dim": 16,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.3,
    "sliding_window": None,
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    found = make("Mixtral", SETTINGS, tmp_path_factory.mktemp("mixtral"))
    config = found.config
    assert (config.num_experts, config.num_experts_per_tok, config.sliding_window) == (6, 2, None)
    return found


def test_the_load_balancing_loss(loaded: Loaded, tmp_path: Path) -> None:
    found, out = compare_training(loaded, tmp_path, custom_vjp=True)
    assert float(found.router.balance / found.count) == pytest.approx(out.aux_loss.item(), rel=1e-6)
    assert out.aux_loss.item() > 2.01  # not even, so that the gradient has a part of it


def test_the_loss_leaves_out_padding_as_an_attention_mask_does(loaded: Loaded) -> None:
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


def test_verify_runs_both_sides(loaded: Loaded, tmp_path: Path) -> None:
    from llama_jax.eval.verify import compare

    _, folder, _, _ = loaded
    report = compare(folder, folder, b_backend="transformers", outputs=False)
    assert report.same and any(".experts." in tensor.name for tensor in report.tensors)


def test_we_read_pefts_adapters_of_all_experts_and_compute_the_same(loaded: Loaded, tmp_path: Path) -> None:
    from llama_jax.adapters import lora
    from llama_jax.weights.adapters import load_adapter

    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(loaded.folder, attn_implementation="eager")
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern={"experts.down_proj": 2},
        alpha_pattern={"experts.gate_up_proj": 9},
    )
    model = peft.get_peft_model(base, settings).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(0.1 * torch.randn_like(weight))
    model.save_pretrained(tmp_path)
    tokens = tokens_of(2)
    with torch.inference_mode():
        theirs = model(torch.tensor(tokens, dtype=torch.long)).logits
    found, adapter = load_adapter(tmp_path)
    ours = lj.forward(loaded.config, lora.attach(found, loaded.params, adapter), tokens)
    assert np.abs(ours - lj.forward(loaded.config, loaded.params, tokens)).max() > 0.1
    close(ours, theirs)


def test_peft_reads_our_adapters_of_experts_and_computes_the_same(loaded: Loaded, tmp_path: Path) -> None:
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
