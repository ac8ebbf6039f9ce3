"""The variants of the compatibility matrix: each a checkpoint, and the program that it is read with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors

import llama_jax as lj
from tests.parity.compatibility import checkpoints as make
from tests.parity.compatibility.references import (
    Reference,
    from_llama_cpp,
    from_peft,
    from_sentencepiece,
    from_tokenizers,
    from_transformers,
)
from tests.tokenizer import vocabularies

VARIANTS: dict[str, Variant] = {}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass
class Made:
    """A checkpoint on disk: what `lj.load` is given, and the reference."""

    path: Path
    reference: Reference
    adapter: Path | None = None


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the matrix; `make` writes the checkpoint to an empty folder."""

    name: str
    group: str
    make: Callable[[Path], Made]


def variant(group: str, name: str) -> Callable[[Callable[[Path], Made]], Callable[[Path], Made]]:
    def add(function: Callable[[Path], Made]) -> Callable[[Path], Made]:
        assert name not in VARIANTS
        VARIANTS[name] = Variant(name, group, function)
        return function

    return add


def checkpoint(group: str, name: str, **options: Any) -> None:
    """A variant that differs from a plain checkpoint in the options of `directory` alone."""

    @variant(group, name)
    def _(folder: Path) -> Made:
        return Made(directory(folder, **options), from_transformers(folder))


def directory(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    saving: dict[str, Any] | None = None,
    tokenizer: Callable[[Path], Any] = make.byte_level,
    after: Callable[[Path], None] = lambda _: None,
    **architecture: Any,
) -> Path:
    """A Hugging Face directory; `after` changes its files."""
    make.model(**architecture).to(dtype).save_pretrained(folder, **(saving or {}))
    tokenizer(folder)
    after(folder)
    return folder


# Architectures

checkpoint("architecture", "grouped-query attention, untied")
checkpoint("architecture", "multi-head attention", num_key_value_heads=4)
checkpoint("architecture", "multi-query attention", num_key_value_heads=1)
checkpoint("architecture", "tied embeddings", tie_word_embeddings=True)
checkpoint("architecture", "head_dim apart from the width", head_dim=24)
checkpoint("architecture", "rms_norm_eps 1e-3, rope_theta 500000", rms_norm_eps=1e-3, rope_theta=5e5)
for name, rope in {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}.items():
    checkpoint(
        "architecture",
        f"rope scaling: {name}",
        rope_parameters={"rope_type": name, "rope_theta": 1e4, **rope},
    )


def own_head(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    head = np.random.default_rng(1).normal(size=state["model.embed_tokens.weight"].shape) * 0.1
    save_file(
        state | {"lm_head.weight": head.astype(np.float32)},
        folder / "model.safetensors",
        {"format": "pt"},
    )


checkpoint(
    "architecture", "tie_word_embeddings with a head of its own", tie_word_embeddings=True, after=own_head
)
checkpoint(
    "architecture",
    "config.json of transformers 4: rope_scaling with type, torch_dtype",
    after=lambda folder: make.edit(
        folder / "config.json",
        rope_parameters=None,
        dtype=None,
        rope_theta=20_000.0,
        rope_scaling={"type": "linear", "factor": 2.0},
        torch_dtype="float32",
    ),
)
checkpoint(
    "architecture",
    "config.json without what has a default",
    num_key_value_heads=4,
    after=lambda folder: make.edit(
        folder / "config.json",
        **dict.fromkeys(
            ("rope_parameters", "head_dim", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings")
        ),
    ),
)
checkpoint("architecture", "attention_bias and mlp_bias, all zero", attention_bias=True, mlp_bias=True)


# Files


def pickled(folder: Path, shards: int) -> None:
    """`pytorch_model.bin`, which transformers 5 reads and no longer writes, in one file or in shards."""
    state = {name: torch.tensor(array) for name, array in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    if shards == 1:
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # as old files hold it
        torch.save(state, folder / "pytorch_model.bin")
        return
    files = {name: f"pytorch_model-{i % shards + 1:05}-of-{shards:05}.bin" for i, name in enumerate(state)}
    for file in set(files.values()):
        torch.save({name: state[name] for name in files if files[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def bare(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state = {name.removeprefix("model."): array for name, array in state.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def padded(folder: Path) -> Any:
    return make.byte_level(folder, size=350)


def longer(folder: Path) -> Any:
    made = make.byte_level(folder)
    made.add_tokens([AddedToken(f"<|never {i}|>", special=True) for i in range(3)])
    made.save_pretrained(folder)
    return made


checkpoint("files", "bfloat16", dtype=torch.bfloat16)
checkpoint("files", "float16", dtype=torch.float16)
checkpoint("files", "float64", dtype=torch.float64)
checkpoint("files", "safetensors in shards, with an index", saving={"max_shard_size": "60KB"})
checkpoint("files", "pytorch_model.bin with rotary tables", after=lambda folder: pickled(folder, 1))
checkpoint("files", "pytorch_model.bin in shards", after=lambda folder: pickled(folder, 3))
checkpoint("files", "names without model., tied", tie_word_embeddings=True, after=bare)
checkpoint("files", "more rows than the tokenizer has tokens", tokens=350, tokenizer=padded)
checkpoint("files", "a tokenizer with tokens beyond the rows", tokenizer=longer)

# Tokenizers


def bpe(name: str, **options: Any) -> None:
    checkpoint("tokenizer", name, tokenizer=lambda folder: make.byte_level(folder, **options))


def spm(name: str, **options: Any) -> None:
    checkpoint("tokenizer", name, tokenizer=lambda folder: make.llama_tokenizer(folder, **options))


def adding(*tokens: AddedToken | str) -> Callable[[Any], None]:
    return lambda made: made.add_tokens([*tokens])


ADDED = {
    "added tokens: normalized words": ("hello world", AddedToken("cat", normalized=True)),
    "added tokens: lstrip, rstrip, single_word": (
        AddedToken("thing", lstrip=True, normalized=False),
        AddedToken("the", single_word=True, normalized=False),
        AddedToken("over", rstrip=True, normalized=False),
    ),
    "added tokens: special": (
        AddedToken("<|im_start|>", special=True),
        AddedToken("<|im_end|>", special=True),
    ),
}


def digits_first(made: Any) -> None:
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def prefix_space(made: Any) -> None:
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def end_too(made: Any) -> None:
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )


def nfc(made: Any) -> None:
    made.normalizer = normalizers.NFC()


bpe("byte-level BPE (GPT-2)")
bpe("byte-level BPE, BOS by its post-processor (Llama 3)", pattern=LLAMA3, ignore_merges=True, bos=True)
bpe("byte-level BPE, digits one by one (SmolLM)", prepare=digits_first)
bpe("byte-level BPE, add_prefix_space", prepare=prefix_space)
bpe("byte-level BPE, NFC", prepare=nfc)
bpe("post-processor that appends EOS", prepare=end_too)
for name, tokens in ADDED.items():
    size = make.VOCAB - len(tokens)
    bpe(f"byte-level BPE, {name}", size=size, prepare=adding(*tokens))
spm("LlamaTokenizer", legacy=False)
spm("LlamaTokenizer, no BOS", legacy=False, add_bos_token=False)
spm("LlamaTokenizer, BOS and EOS", legacy=False, add_eos_token=True)
spm("LlamaTokenizer, add_prefix_space false", legacy=False, add_prefix_space=False)
spm("LlamaTokenizer, tokenizer.model beside tokenizer.json", legacy=False, keep_model=True)
for name, tokens in ADDED.items():

    def with_added(folder: Path, tokens: Any = tokens) -> Any:
        made = make.llama_tokenizer(folder, size=make.VOCAB - len(tokens), legacy=False)
        made.add_tokens([*tokens])
        made.save_pretrained(folder)
        return made

    checkpoint("tokenizer", f"LlamaTokenizer, {name}", tokenizer=with_added)


@variant("tokenizer", "LlamaTokenizer, legacy")
def _(folder: Path) -> Made:
    def legacy(folder: Path) -> Any:
        return make.llama_tokenizer(folder, legacy=True)

    return Made(directory(folder, tokenizer=legacy), from_tokenizers(folder))


@variant("tokenizer", "tokenizer.json of transformers 4, with Prepend and Replace")
def _(folder: Path) -> Made:
    def older(folder: Path) -> None:
        content = vocabularies.llama_json(vocabularies.sentencepiece_model(vocab_size=make.VOCAB))
        vocabularies.write_json(folder / "tokenizer.json", content)
        fields = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
        make.edit(folder / "tokenizer_config.json", legacy=False, add_bos_token=True, **fields)

    return Made(directory(folder, tokenizer=older), from_tokenizers(folder))


@variant("tokenizer", "tokenizer.model alone (sentencepiece)")
def _(folder: Path) -> Made:
    return Made(directory(folder, tokenizer=make.pieces), from_sentencepiece(folder))


@variant("tokenizer", "tokenizer.model, unigram, with sentencepiece's own normalization")
def _(folder: Path) -> Made:
    def trained(folder: Path) -> Path:
        options = {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc"}
        return make.pieces(folder, size=320, remove_extra_whitespaces=True, **options)

    return Made(directory(folder, tokens=320, tokenizer=trained), from_sentencepiece(folder))


@variant("tokenizer", "tokenizer.model without a prefix space")
def _(folder: Path) -> Made:
    def trained(folder: Path) -> Path:
        return make.pieces(folder, add_dummy_prefix=False)

    return Made(directory(folder, tokenizer=trained), from_sentencepiece(folder))


@variant("tokenizer", "tokenizer.model with user-defined symbols")
def _(folder: Path) -> Made:
    def trained(folder: Path) -> Path:
        return make.pieces(folder, user_defined_symbols=("<sep>", "the cat"))

    return Made(directory(folder, tokenizer=trained), from_sentencepiece(folder))


# Chat templates and generation settings


def templated(folder: Path) -> Any:
    return make.byte_level(folder, chat_template=make.TEMPLATE)


def in_config(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    make.edit(folder / "tokenizer_config.json", chat_template=make.TEMPLATE)


def named(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    templates = {"tool_use": "{{ 'tools' }}", "default": make.TEMPLATE}
    rows = [{"name": name, "template": source} for name, source in templates.items()]
    make.edit(folder / "tokenizer_config.json", chat_template=rows)


def ends(folder: Path) -> None:
    """The third new token of the greedy continuation, and an id of another vocabulary, end a text."""
    reference = from_transformers(folder)
    third = reference.generate(reference.encode(PROMPT), 3)[-1]
    make.edit(folder / "generation_config.json", eos_token_id=[third, 2, 300_000])


PROMPT = "the cat sat on"  # of every greedy text

checkpoint("chat", "chat_template.jinja", tokenizer=templated)
checkpoint("chat", "chat_template in tokenizer_config.json", tokenizer=templated, after=in_config)
checkpoint("chat", "named templates", tokenizer=templated, after=named)
checkpoint(
    "chat",
    "chat_template.jinja beside an older field",
    tokenizer=templated,
    after=lambda folder: make.edit(folder / "tokenizer_config.json", chat_template="{{ 'older' }}"),
)
checkpoint(
    "chat",
    "a template over SentencePiece ids",
    tokenizer=lambda folder: make.llama_tokenizer(folder, legacy=False, chat_template=make.TEMPLATE),
)
checkpoint("chat", "a list of end tokens in generation_config.json", after=ends)

# Adapters

LORA: dict[str, dict[str, Any]] = {
    "LoRA of q and v": {"target_modules": ["q_proj", "v_proj"]},
    "LoRA, all-linear, rsLoRA": {"target_modules": "all-linear", "use_rslora": True},
    "DoRA": {"target_modules": "all-linear", "use_dora": True},
    "LoRA with rank and alpha patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 7, "layers.1.mlp.up_proj": 1},
        "alpha_pattern": {"down_proj": 5, "^model.layers.0.self_attn.q_proj": 3},
    },
    "LoRA of one layer": {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]},
    "LoRA by an expression": {"target_modules": r".*\.(v|o|gate)_proj"},
    "LoRA without some modules": {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    "LoRA on embeddings and head": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "LoRA with modules_to_save": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
    },
    "LoRA begun with PiSSA": {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": "pissa"},
    "LoRA with trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 300, 301]},
    "LoRA with trained norms": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "norm"]},
}


def adapted(folder: Path, config: Any, *, pickle: bool = False, added: int = 0) -> Made:
    """An adapter, each of whose tensors is away from where it began, with so many tokens added for it."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    directory(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if added:
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        tokenizer.add_tokens([AddedToken(f"<|added {i}|>", special=True) for i in range(added)])
        tokenizer.save_pretrained(adapter)
        model.resize_token_embeddings(len(tokenizer))
    torch.manual_seed(1)
    made = peft.get_peft_model(model, config)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn_like(weight)
    made.save_pretrained(adapter)
    if pickle:
        state = load_file(adapter / "adapter_model.safetensors")
        torch.save({k: torch.tensor(v) for k, v in state.items()}, adapter / "adapter_model.bin")
        (adapter / "adapter_model.safetensors").unlink()
    return Made(base, from_peft(base, adapter), adapter)


for name, options in LORA.items():

    @variant("adapter", name)
    def _(folder: Path, options: dict[str, Any] = options) -> Made:
        return adapted(folder, peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options))


@variant("adapter", "adapter_model.bin")
def _(folder: Path) -> Made:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return adapted(folder, config, pickle=True)


@variant("adapter", "tokens added for the adapter, its tokenizer beside it")
def _(folder: Path) -> Made:
    modules = ["embed_tokens", "lm_head"]
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=modules, task_type="CAUSAL_LM")
    return adapted(folder, config, added=2)


@variant("adapter", "an adapter under its own name")
def _(folder: Path) -> Made:
    made = adapted(folder, peft.LoraConfig(r=4, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    named = folder / "named"
    named.mkdir()
    (folder / "adapter").rename(named / "mine")
    return dataclasses.replace(made, adapter=named)


@variant("adapter", "prefix tuning")
def _(folder: Path) -> Made:
    return adapted(folder, peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"))


# GGUF


def gguf_variant(name: str, kind: str = "F32", byte_level: bool = False, **architecture: Any) -> None:
    @variant("GGUF", name)
    def _(folder: Path) -> Made:
        vocabulary = make.gguf_fields()
        if byte_level:
            make.byte_level(folder)
            vocabulary = make.gguf_fields(json.loads((folder / "tokenizer.json").read_text()))
        source = make.model(**architecture)
        path = make.write_gguf(folder / "model.gguf", source, vocabulary, kind)
        ours = {field.name for field in dataclasses.fields(lj.LlamaConfig)}
        shared = ours & set(source.config.to_dict()) - {"rope_scaling", "rope_theta", "labels"}
        config = lj.LlamaConfig(
            **{name: getattr(source.config, name) for name in shared},
            rope_theta=source.config.rope_parameters["rope_theta"],
        )
        return Made(path, from_llama_cpp(path, config))


gguf_variant("SentencePiece vocabulary, F32")
gguf_variant("byte-level vocabulary, F32", byte_level=True)
gguf_variant("tied embeddings, F16", "F16", tie_word_embeddings=True)
for kind in ("BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"):
    gguf_variant(kind, kind)
