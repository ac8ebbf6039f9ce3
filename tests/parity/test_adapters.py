"""Live comparison with PEFT: its adapters give the same logits here, and ours the same there."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import llama_jax as lj
from llama_jax.adapters import lora, prefix
from llama_jax.decoding.arguments import pad_right
from llama_jax.weights.adapters import load_adapter
from llama_jax.weights.write.adapters import save_adapter
from tests.golden import text
from tests.golden.cases import Draw, relative_error
from tests.golden.training import MODEL, params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tests.parity import hf  # noqa: E402  (needs torch)

pytestmark = pytest.mark.parity

TOLERANCE = 2e-5  # relative to the largest logit
NEW_TOKENS = 16
TOKENS = Draw(3).integers(0, MODEL.vocab_size, 48).reshape(2, 24)
THEIRS = {
    "every matrix": {"target_modules": "all-linear"},
    "a list": {"target_modules": ["q_proj", "k_proj", "mlp.down_proj"]},
    "an expression": {"target_modules": r".*\.(v|o|gate)_proj"},
    "rslora": {"target_modules": ["q_proj", "up_proj"], "use_rslora": True},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "dora, rslora": {"target_modules": ["k_proj", "o_proj"], "use_dora": True, "use_rslora": True},
    "ranks and alphas": {
        "target_modules": "all-linear",
        "use_rslora": True,
        "rank_pattern": {"q_proj": 7, "layers.1.mlp.up_proj": 1},
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 3, "down_proj": 5, "mlp.gate_proj": 1},
    },
    "started elsewhere": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian", "lora_dropout": 0.3},
}
OURS = {
    "lora": lora.Lora(rank=4, alpha=6.5),
    "rslora": lora.Lora(rank=3, alpha=5, rslora=True, target_modules=("attention.*",)),
    "dora": lora.Lora(rank=4, alpha=8, dora=True, target_modules=("wk", "w_*")),
}


def away(adapter: Any, by: float = 0.1, seed: int = 4) -> Any:
    """An adapter whose every leaf is away from where it began."""
    draw = Draw(seed)
    return jax.tree.map(lambda x: x + draw.uniform(x.shape, std=by), adapter)


def our_logits(weights: Any) -> np.ndarray:
    return np.asarray(jax.jit(partial(lj.forward, MODEL))(weights, TOKENS))


def their_logits(model: Any) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor(TOKENS, dtype=torch.int64)).logits.numpy()


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, torch.float32) for kind in THEIRS), ("dora", torch.bfloat16)], ids=str
)
def test_adapters_that_peft_made(kind: str, dtype: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **THEIRS[kind])
    model = peft.get_peft_model(hf.model(MODEL, params()), config).eval()
    plain = their_logits(model)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn_like(weight)
                weight.copy_(weight.to(dtype))
    model.to(dtype).save_pretrained(tmp_path)
    settings, adapter = load_adapter(tmp_path)
    # The base has been rounded too: PEFT gets its own files again.
    model = peft.PeftModel.from_pretrained(hf.model(MODEL, params()), tmp_path).eval()
    expected = their_logits(model)
    assert relative_error(plain, expected) > 0.01
    attached = lora.attach(settings, params(), adapter)
    assert relative_error(our_logits(attached), expected) <= TOLERANCE
    assert relative_error(our_logits(lora.merge(attached)), expected) <= TOLERANCE
    assert relative_error(our_logits(attached), their_logits(model.merge_and_unload())) <= TOLERANCE


MERGED = {
    "both tables": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "both tied": {"target_modules": ["q_proj", "lm_head", "embed_tokens"], "ensure_weight_tying": True},
    "embedding alone": {"target_modules": ["embed_tokens"]},
    "dora": {"target_modules": ["v_proj", "lm_head", "embed_tokens"], "use_dora": True},
    "dora of one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1], "use_dora": True},
    "expressions": {
        "target_modules": ["q_proj", "v_proj", "lm_head"],
        "rank_pattern": {"lm_head": 3, r".*layers\.[1-9]\..*(q|v)_proj": 2},
        "alpha_pattern": {r"layers\.\d+\.self_attn\.v_proj": 3},
    },
    "saved tables": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved embedding, tied": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved norms": {"target_modules": "all-linear", "modules_to_save": ["norm", "input_layernorm"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 1, 7]},
    "tokens of each": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [3, 1, 7], "lm_head": [2, 4]},
    },
    "full names": {"target_modules": ["model.layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"]},
    "pissa": {"target_modules": ["q_proj", "up_proj", "lm_head"], "init_lora_weights": "pissa"},
    "olora": {"target_modules": ["k_proj", "down_proj"], "init_lora_weights": "olora", "use_rslora": True},
    "larger": {"target_modules": ["q_proj"]},
    "larger, adapted": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "larger, saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "larger, tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 63]},
}


@pytest.mark.filterwarnings("ignore::UserWarning:peft")  # about tied and resized tables
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", MERGED)
def test_adapters_that_change_more_than_projections(kind: str, tied: bool, tmp_path: Path) -> None:
    """On a base that is saved first, so that PEFT sees whether its vocabulary was resized."""
    weights = {name: leaf for name, leaf in params().items() if not (tied and name == "lm_head")}
    hf.model(MODEL.replace(tie_word_embeddings=tied), weights).save_pretrained(tmp_path / "base")

    def base() -> Any:
        torch.manual_seed(5)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        if kind.startswith("larger"):
            model.resize_token_embeddings(MODEL.vocab_size + 5, mean_resizing=False)
        return model

    config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **MERGED[kind])
    model = peft.get_peft_model(base(), config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn_like(weight)
    model.save_pretrained(tmp_path / "a", safe_serialization=kind != "embedding alone")
    expected = their_logits(peft.PeftModel.from_pretrained(base(), tmp_path / "a").eval())
    merged, found = lj.load_params(tmp_path / "a")
    logits = np.asarray(lj.forward(merged, found, TOKENS))
    assert relative_error(logits, expected) <= TOLERANCE
    assert (
        relative_error(their_logits(base())[..., : MODEL.vocab_size], logits[..., : MODEL.vocab_size]) > 0.01
    )


@pytest.mark.parametrize("kind", OURS)
def test_adapters_that_peft_reads(kind: str, tmp_path: Path) -> None:
    settings, base = OURS[kind], params()
    adapter = away(lora.init(settings, base, jax.random.key(0)))
    save_adapter(tmp_path / "a", settings, adapter, MODEL)
    model = peft.PeftModel.from_pretrained(hf.model(MODEL, base), tmp_path / "a").eval()
    expected = our_logits(lora.attach(settings, base, adapter))
    assert relative_error(our_logits(base), expected) > 0.01
    assert relative_error(their_logits(model), expected) <= TOLERANCE


def test_what_peft_writes_of_what_it_read_is_the_same(tmp_path: Path) -> None:
    settings = OURS["dora"]
    adapter = away(lora.init(settings, params(), jax.random.key(0)))
    save_adapter(tmp_path / "a", settings, adapter, MODEL)
    model = peft.PeftModel.from_pretrained(hf.model(MODEL, params()), tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    found, again = load_adapter(tmp_path / "b")
    assert (found.scale, found.matrices, found.dora) == (settings.scale, settings.matrices, settings.dora)
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("projected", [False, True])
def test_prefixes_that_peft_made(dtype: Any, projected: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    more = {"prefix_projection": True, "encoder_hidden_size": 12} if projected else {}
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, **more)
    model = peft.get_peft_model(hf.model(MODEL, params()), config).eval()
    model.to(dtype).save_pretrained(tmp_path)
    settings, adapter = load_adapter(tmp_path)
    model = peft.PeftModel.from_pretrained(hf.model(MODEL, params()), tmp_path).eval()
    expected = their_logits(model)
    assert relative_error(our_logits(params()), expected) > 0.01
    assert relative_error(our_logits(prefix.attach(settings, params(), adapter)), expected) <= TOLERANCE


def test_prefixes_that_peft_reads(tmp_path: Path) -> None:
    settings, base = prefix.Prefix(7), params()
    adapter = away(prefix.init(settings, MODEL, base, jax.random.key(0)))
    save_adapter(tmp_path / "a", settings, adapter, MODEL)
    model = peft.PeftModel.from_pretrained(hf.model(MODEL, base), tmp_path / "a").eval()
    attached = prefix.attach(settings, base, adapter)
    assert relative_error(their_logits(model), our_logits(attached)) <= TOLERANCE
    asked = (TOKENS, np.full(2, 24), jax.random.key(0), lj.Sampling(temperature=0.0))
    out = lj.generate(MODEL, lj.unstack(attached), *asked, max_new_tokens=8)
    for row, found in zip(TOKENS.tolist(), np.asarray(out.tokens).tolist(), strict=True):
        assert found == hf.generate(model, row, 8)
    model.save_pretrained(tmp_path / "b")
    _, again = load_adapter(tmp_path / "b")
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


def test_smollm2_with_our_adapter_writes_the_same_in_peft(
    smollm2: lj.Model, smollm2_path: Path, tmp_path: Path
) -> None:
    config, settings = smollm2.config, lora.Lora(rank=8, alpha=16)
    adapter = away(lora.init(settings, smollm2.params, jax.random.key(1)), by=0.02)
    save_adapter(tmp_path / "a", settings, adapter, config)
    model = lj.load(smollm2_path, adapter=tmp_path / "a", scan_layers=False)
    reference = peft.PeftModel.from_pretrained(hf.load_gguf(smollm2_path, config), tmp_path / "a").eval()
    prompts = [model.encode_prompt(prompt) for prompt in text.PROMPTS[:2]]
    asked = (*pad_right(prompts), jax.random.key(0), lj.Sampling(temperature=0.0))
    out = lj.generate(config, model.params, *asked, max_new_tokens=NEW_TOKENS)
    ours = np.asarray(out.tokens).tolist()
    assert ours == [hf.generate(reference, prompt, NEW_TOKENS) for prompt in prompts]
    row = np.array(prompts[0] + ours[0])[None]
    with torch.inference_mode():
        expected = reference(torch.tensor(row)).logits.numpy()
        with reference.disable_adapter():
            plain = reference(torch.tensor(row)).logits.numpy()
    assert (plain.argmax(-1) != expected.argmax(-1)).any()
    logits = np.asarray(jax.jit(partial(lj.forward, config))(model.params, row))
    assert relative_error(logits, expected) <= TOLERANCE
