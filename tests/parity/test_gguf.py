"""Live comparison with llama.cpp: what we write it loads, encodes the same, and continues the same."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax as lj
from llama_jax.config import RopeScaling
from llama_jax.decoding.arguments import pad_right
from llama_jax.tokenizer import Tokenizer, load_tokenizer
from llama_jax.tokenizer.export import export_vocabulary
from llama_jax.weights.tensors import ParamsTensors
from llama_jax.weights.write.gguf import plan_gguf
from llama_jax.weights.write.run import write
from tests.golden import text
from tests.random_models import random_model
from tests.tokenizer import corpus, vocabularies
from tests.tokenizer.test_sentencepiece_model import goldens

xllamacpp = pytest.importorskip("xllamacpp", reason="needs the `parity` extra")

pytestmark = pytest.mark.parity

TOP = 10  # most likely tokens whose log-probabilities are compared


class LlamaCpp:
    """llama.cpp with a GGUF file loaded, in f32 as far as it goes."""

    def __init__(self, path: Path):
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 512, 1, False, -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(params)

    def ask(self, what: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.server.listening_address}/{what}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return dict(json.load(answer))

    def encode(self, line: str, *, add_bos: bool, parse_special: bool = False) -> list[int]:
        return list(
            self.ask("tokenize", content=line, add_special=add_bos, parse_special=parse_special)["tokens"]
        )

    def continue_(self, ids: Sequence[int], count: int) -> tuple[list[int], dict[int, float]]:
        """The greedy continuation, and the log-probabilities of the likeliest first tokens."""
        answer = self.ask(
            "completion",
            prompt=list(ids),
            n_predict=count,
            temperature=0,
            samplers=["temperature"],
            ignore_eos=True,
            cache_prompt=False,
            return_tokens=True,
            n_probs=TOP,
        )
        first = answer["completion_probabilities"][0]["top_logprobs"]
        return list(answer["tokens"]), {entry["id"]: entry["logprob"] for entry in first}


def written(model: lj.Model, path: Path, dtype: str | None = None) -> Path:
    tensors = ParamsTensors(model.config, model.params)
    write(plan_gguf(tensors, dtype, export_vocabulary(model.tokenizer, "gguf")), tensors, path)
    return path


def ours(model: lj.Model, prompts: Sequence[Sequence[int]], count: int) -> list[tuple[list[int], np.ndarray]]:
    """Of each prompt the greedy continuation, and the log-probabilities of all first tokens."""
    tokens, lengths = pad_right(prompts)
    sampling = lj.Sampling(temperature=0.0)
    out = lj.generate(
        model.config, model.params, tokens, lengths, jax.random.key(0), sampling, max_new_tokens=count
    )
    last = logprobs(model.config, model.params, tokens)[np.arange(len(prompts)), np.asarray(lengths) - 1]
    return [(ids.tolist(), first) for ids, first in zip(np.asarray(out.tokens), last, strict=True)]


def logprobs(config: lj.LlamaConfig, params: Any, tokens: Any) -> np.ndarray:
    """The log-probabilities of every next token, [B, T, V]."""
    logits = jax.jit(partial(lj.forward, config))(params, jnp.where(tokens < config.vocab_size, tokens, 0))
    return np.asarray(jax.nn.log_softmax(logits))


def error(theirs: dict[int, float], ours: np.ndarray) -> float:
    assert len(theirs) == TOP
    return float(max(abs(value - ours[token]) for token, value in theirs.items()))


Continued = list[tuple[list[int], list[int], np.ndarray]]  # prompt, continuation, log-probabilities


@pytest.fixture(scope="module")
def continued(smollm2: lj.Model) -> Continued:
    prompts = [smollm2.tokenizer.encode(prompt) for prompt in text.PROMPTS]
    return [(prompt, *found) for prompt, found in zip(prompts, ours(smollm2, prompts, 16), strict=True)]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (None, 1e-3),
        ("float16", 0.05),
        ("q8_0", 0.5),  # weights and activations are rounded to 8 bits
    ],
)
def test_smollm2_continues_the_same(
    dtype: str | None, tolerance: float, smollm2: lj.Model, continued: Continued, tmp_path: Path
) -> None:
    llama_cpp = LlamaCpp(written(smollm2, tmp_path / "a.gguf", dtype))
    for prompt, ids, first in continued:
        theirs, likeliest = llama_cpp.continue_(prompt, 16)
        assert error(likeliest, first) < tolerance
        assert theirs == ids or dtype is not None  # near ties may go either way


SCALINGS = {
    "none": None,
    "linear": RopeScaling("linear", 4.0),
    "ntk": RopeScaling("ntk", 4.0),
    "yarn": RopeScaling("yarn", 8.0, 32),
    "yarn with a factor": RopeScaling("yarn", 8.0, 32, attention_factor=0.9),
    "llama3": RopeScaling("llama3", 8.0, 32),
}


@pytest.mark.parametrize(
    ("scaling", "heads"), [("none", (4, 4, 16)), *((scaling, (6, 2, 24)) for scaling in SCALINGS)]
)
def test_a_random_llama_continues_the_same(
    scaling: str, heads: tuple[int, int, int], shared_data: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(shared_data / "llama2" / "tokenizer.model")
    config = lj.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=heads[2],
        max_position_embeddings=256,
        rope_theta=50_000.0,
        rope_scaling=SCALINGS[scaling],
        tie_word_embeddings=heads[0] == 4,
    )
    config, params = random_model(1, config)
    model = lj.Model(config, params, tokenizer, tmp_path)
    prompt = tokenizer.encode((shared_data / "text" / "tinyshakespeare.txt").read_text()[:600])
    ((ids, first),) = ours(model, [prompt], 24)
    theirs, likeliest = LlamaCpp(written(model, tmp_path / "a.gguf")).continue_(prompt, 24)
    assert error(likeliest, first) < 2e-3
    assert theirs == ids
    if scaling != "none":  # which would else go unnoticed
        plain = logprobs(config.replace(rope_scaling=None), params, np.array([prompt]))[0, -1]
        assert error(likeliest, plain) > 0.05


KIN: dict[str, dict[str, Any]] = {
    "llama with biases": {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
    "qwen2": {"qkv_bias": True, "tie_word_embeddings": True},
    "qwen3": {"qk_norm": True, "head_dim": 32},
    "smollm3": {"rope_layers": (True, True, True, False)},
    "mixtral": {"num_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("kind", KIN)
def test_random_kin_continue_the_same(kind: str, shared_data: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "llama2" / "tokenizer.model")
    config = lj.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    ).replace(**({"head_dim": 16} | KIN[kind]))
    model = lj.Model(*random_model(1, config), tokenizer, tmp_path)
    prompt = tokenizer.encode((shared_data / "text" / "tinyshakespeare.txt").read_text()[:600])
    ((ids, first),) = ours(model, [prompt], 24)
    theirs, likeliest = LlamaCpp(written(model, tmp_path / "a.gguf")).continue_(prompt, 24)
    assert error(likeliest, first) < 2e-3
    assert theirs == ids
    assert lj.load_params(tmp_path / "a.gguf")[0] == config


# Vocabularies


@pytest.mark.parametrize(
    "name",
    ["tekken", "gpt-4o", "deepseek-llm", "deepseek-coder", "deepseek-v3", "falcon", "viking", "superbpe"],
)
def test_llama_cpp_pre_tokenizes_as_we_do(name: str, tmp_path: Path) -> None:
    content = vocabularies.byte_level_json()
    tokenizer = load_tokenizer(
        vocabularies.write_gguf(tmp_path / "v.gguf", vocabularies.bpe_fields(content, name))
    )
    config = lj.presets.TINY.replace(vocab_size=tokenizer.vocab_size, num_hidden_layers=1)
    path = lj.save(*random_model(0, config), tmp_path / "a.gguf", tokenizer=tokenizer)
    llama_cpp = LlamaCpp(path)
    for line in [*vocabularies.TEXT, *corpus.lines()[::60], "fooBar ÉcoleParis 12345.678 你好世界，かな"]:
        assert llama_cpp.encode(line, add_bos=False) == tokenizer.encode(line, add_bos=False), line


def test_llama_cpp_encodes_as_we_do(tokenizer: Tokenizer, shared_data: Path, tmp_path: Path) -> None:
    config = lj.presets.TINY.replace(vocab_size=tokenizer.vocab_size, num_hidden_layers=1)
    model = lj.Model(*random_model(0, config), tokenizer, tmp_path)
    llama_cpp = LlamaCpp(written(model, tmp_path / "a.gguf"))
    lines = [*vocabularies.TEXT, *corpus.lines()[::20], *(line for line, _ in goldens(shared_data))]
    for line in lines:
        assert llama_cpp.encode(line, add_bos=True) == tokenizer.encode(line), line
    for name, token in list(tokenizer.special_tokens.items())[:5]:
        assert llama_cpp.encode(name, add_bos=False, parse_special=True) == [token]
    spoken = tokenizer.encode("Once upon a time", add_bos=False)
    said = llama_cpp.ask("detokenize", tokens=spoken)["content"]
    assert said.removeprefix(" ") == tokenizer.decode(spoken)
