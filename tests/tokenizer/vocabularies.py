"""Small vocabularies in every format, trained on a few lines, for tests without downloads."""

from __future__ import annotations

import functools
import io
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

SPACE = "\u2581"
TEXT = (
    "the quick brown fox jumps over the lazy dog",
    "hello world, the cat sat on the mat; it's there",
    "there is  the thing that   thinks the other thing",
    "for i in range(10):\n    print(i, 'é', 2 + 2)",
    "la forêt était là, naïve et élégante",
)
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@functools.cache
def sentencepiece_model(**options: Any) -> bytes:
    """A SentencePiece BPE model like Llama's: no normalization, byte fallback; `options` override."""
    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": 340,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 4), model_writer=model, **(settings | options)
    )
    return model.getvalue()


def pieces(model: bytes) -> list[tuple[str, float, int]]:
    """Text, score and type of each piece of a SentencePiece model."""
    loaded = sentencepiece.SentencePieceProcessor(model_proto=model)
    rows = []
    for i in range(loaded.vocab_size()):
        kind = 2 if loaded.is_unknown(i) else 3 if loaded.is_control(i) else 6 if loaded.is_byte(i) else 1
        rows.append((loaded.id_to_piece(i), loaded.get_score(i), kind))
    return rows


def llama2c(rows: Sequence[tuple[str, float, int]]) -> bytes:
    """The `tok.bin` that llama2.c's exporter writes for these pieces."""
    out = bytearray(struct.pack("<i", max(len(text.encode()) for text, _, _ in rows)))
    for i, (text, score, _) in enumerate(rows):
        raw = (f"\n{text}\n" if i in (1, 2) else text.replace(SPACE, " ")).encode()
        out += struct.pack("<fi", score, len(raw)) + raw
    return bytes(out)


def byte_level_json() -> dict[str, Any]:
    """A byte-level BPE `tokenizer.json` with two control tokens and a user-defined one."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    tokenizer.add_tokens([tokenizers.AddedToken("<think here>", normalized=False)])
    return json.loads(tokenizer.to_str())


def llama_json(model: bytes, *, prefix: bool = True) -> dict[str, Any]:
    """The `tokenizer.json` of a SentencePiece model, like Hugging Face's conversion of Llama's."""
    rows = pieces(model)
    ids = {text: i for i, (text, _, _) in enumerate(rows)}
    merges = []
    for text, score, kind in rows:
        if kind == 1:
            pairs = [(text[:i], text[i:]) for i in range(1, len(text))]
            merges += [(-score, ids[a], ids[b], a, b) for a, b in pairs if a in ids and b in ids]
    bpe = models.BPE(
        ids,
        [(a, b) for *_, a, b in sorted(merges)],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = tokenizers.Tokenizer(bpe)
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(name, special=True, normalized=False) for name in ("<unk>", "<s>", "</s>")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return json.loads(tokenizer.to_str())


def spm_fields(model: bytes) -> dict[str, Any]:
    """The GGUF metadata of a SentencePiece model."""
    texts, scores, kinds = zip(*pieces(model), strict=True)
    return {
        "model": "llama",
        "tokens": list(texts),
        "scores": list(scores),
        "token_type": list(kinds),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }


def bpe_fields(content: Mapping[str, Any], pre: str = "gpt-2") -> dict[str, Any]:
    """The GGUF metadata of a byte-level `tokenizer.json`."""
    added = {entry["content"]: entry for entry in content["added_tokens"]}
    vocabulary = dict(content["model"]["vocab"]) | {name: entry["id"] for name, entry in added.items()}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [(3 if added[name]["special"] else 4) if name in added else 1 for name in tokens],
        "merges": [" ".join(merge) for merge in content["model"]["merges"]],
        "eos_token_id": tokens.index("<|im_end|>"),
    }


def write_gguf(path: Path, fields: Mapping[str, Any], template: str | None = None) -> Path:
    """Writes a GGUF file with `tokenizer.ggml.*` fields and no tensors; None omits a field."""
    writer = gguf.GGUFWriter(path, "llama")
    writers: dict[type, Callable[[str, Any], None]] = {
        str: writer.add_string,
        bool: writer.add_bool,
        int: writer.add_uint32,
        list: writer.add_array,
    }
    for key, value in fields.items():
        if value is not None:
            writers[type(value)](f"tokenizer.ggml.{key}", value)
    if template is not None:
        writer.add_chat_template(template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def write_json(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_all(directory: Path) -> dict[str, Path]:
    """Writes one file of each kind; returns the paths by kind."""
    model = sentencepiece_model()
    byte_level = byte_level_json()
    paths = {
        "sentencepiece": directory / "spm" / "tokenizer.model",
        "llama2c": directory / "llama2c" / "tok340.bin",
        "gguf-spm": directory / "gguf-spm" / "spm.gguf",
        "gguf-bpe": directory / "gguf-bpe" / "bpe.gguf",
        "json-bpe": directory / "json-bpe" / "tokenizer.json",
        "json-llama": directory / "json-llama" / "tokenizer.json",
        "spm-trimmed": directory / "spm-trimmed" / "tokenizer.model",
    }
    for path in paths.values():
        path.parent.mkdir()
    paths["sentencepiece"].write_bytes(model)
    paths["spm-trimmed"].write_bytes(
        sentencepiece_model(remove_extra_whitespaces=True, byte_fallback=False, vocab_size=80)
    )
    paths["llama2c"].write_bytes(llama2c(pieces(model)))
    write_gguf(paths["gguf-spm"], spm_fields(model), TEMPLATE)
    write_gguf(paths["gguf-bpe"], bpe_fields(byte_level), TEMPLATE)
    write_json(paths["json-bpe"], byte_level)
    write_json(
        paths["json-bpe"].with_name("tokenizer_config.json"),
        {"eos_token": "<|im_end|>", "chat_template": TEMPLATE},
    )
    write_json(paths["json-llama"], llama_json(model))
    write_json(
        paths["json-llama"].with_name("special_tokens_map.json"),
        {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "unk_token": "<unk>"},
    )
    return paths
