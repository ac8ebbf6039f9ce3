"""Small random checkpoints, written by transformers, tokenizers, sentencepiece and gguf themselves."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from tests.tokenizer import corpus, vocabularies

VOCAB = 384  # of every model, so that most variants share compiled programs
ARCHITECTURE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # far from ties between the likeliest tokens
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NAMES = ("<unk>", "<s>", "</s>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content | trim + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def edit(path: Path, **fields: Any) -> None:
    """Changes fields of a JSON file; None removes one."""
    content = (json.loads(path.read_text()) if path.exists() else {}) | fields
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def model(seed: int = 0, tokens: int = VOCAB, **fields: Any) -> Any:
    """A random Llama of transformers, which answers in pieces longer than a byte and below `tokens`."""
    torch.manual_seed(seed)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(ARCHITECTURE | fields))).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
        # Bytes that are not UTF-8 are decoded to one U+FFFD or to several, by the program.
        made.get_output_embeddings().weight[: len(NAMES) + 256] *= 0.01
        made.get_output_embeddings().weight[tokens:] *= 0.01
    return made


# Tokenizers


@functools.cache
def _byte_level(pattern: str | None, ignore_merges: bool, size: int) -> str:
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.decoder = decoders.ByteLevel()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern:
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[*NAMES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator([*vocabularies.TEXT * 4, *corpus.lines()[:600]], trainer)
    return str(made.to_str())


def byte_level(
    folder: Path,
    *,
    pattern: str | None = None,
    ignore_merges: bool = False,
    bos: bool = False,
    size: int = VOCAB,
    prepare: Callable[[Any], None] = lambda _: None,
    **fields: Any,
) -> Any:
    """A byte-level BPE tokenizer, as GPT-2's and Llama 3's; `prepare` changes the `tokenizers.Tokenizer`."""
    made = tokenizers.Tokenizer.from_str(_byte_level(pattern, ignore_merges, size))
    if bos:
        made.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", 1)]
                ),
            ]
        )
    prepare(made)
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **(names | fields))
    fast.save_pretrained(folder)
    return fast


def pieces(folder: Path, *, size: int = VOCAB, **options: Any) -> Path:
    """`tokenizer.model`, as sentencepiece trains it."""
    path = folder / "tokenizer.model"
    path.write_bytes(vocabularies.sentencepiece_model(vocab_size=size, **options))
    return path


def llama_tokenizer(folder: Path, *, size: int = VOCAB, keep_model: bool = False, **fields: Any) -> Any:
    """`tokenizer.json` of a SentencePiece model, as transformers' LlamaTokenizer converts it."""
    vocabulary = folder / "vocabulary"
    vocabulary.mkdir()
    pieces(vocabulary, size=size)
    edit(vocabulary / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", **fields)
    made = transformers.AutoTokenizer.from_pretrained(vocabulary)
    made.save_pretrained(folder)
    if keep_model:
        shutil.copy(vocabulary / "tokenizer.model", folder)
    shutil.rmtree(vocabulary)
    return made


# GGUF


def gguf_fields(content: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The vocabulary's metadata: of a `tokenizer.json`, or of the SentencePiece model."""
    if content is None:
        return vocabularies.spm_fields(vocabularies.sentencepiece_model(vocab_size=VOCAB))
    added = {entry["content"] for entry in content["added_tokens"]}
    tokens = sorted(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__)
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [3 if name in added else 1 for name in tokens],
        "merges": [" ".join(merge) for merge in content["model"]["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def write_gguf(path: Path, source: Any, vocabulary: Mapping[str, Any], kind: str = "F32") -> Path:
    """Writes transformers' model with the `gguf` package, as llama.cpp's converter does.

    Args:
      path: the file.
      source: the model.
      vocabulary: the fields under `tokenizer.ggml`.
      kind: the type of matrices; norms are F32.
    """
    config = source.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    adders: dict[type, Callable[[str, Any], None]] = {
        str: writer.add_string,
        bool: writer.add_bool,
        int: writer.add_uint32,
        list: writer.add_array,
    }
    for name, value in vocabulary.items():
        adders[type(value)](f"tokenizer.ggml.{name}", value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in source.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.float().numpy()
        if count := next((count for each, count in heads.items() if each in name), None):
            # The rotated halves of a head become neighbouring rows.
            array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        stored = gguf.GGMLQuantizationType.F32 if array.ndim == 1 else gguf.GGMLQuantizationType[kind]
        data = gguf.quants.quantize(np.ascontiguousarray(array), stored)
        writer.add_tensor(f"{names.get_name(name.removesuffix('.weight'))}.weight", data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
