"""A loaded tokenizer as the files and fields that each checkpoint format holds it in."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, processors

from llama_jax.errors import TokenizerError
from llama_jax.tokenizer.base import TableTokenizer, Tokenizer
from llama_jax.tokenizer.export_gguf import gguf_fields
from llama_jax.tokenizer.pieces import sentence_pieces
from llama_jax.tokenizer.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceTokenizer,
    build_model,
)
from llama_jax.tokenizer.tokenizer_json import LibraryTokenizer
from llama_jax.weights.names import Format
from llama_jax.weights.write.vocabulary import Vocabulary


def vocabulary_of(tokenizer: Tokenizer, format: Format, *, pad_id: int | None = None) -> Vocabulary:
    """Returns what a checkpoint of one format says of its tokenizer.

    `pad_id` is the token to pad with, where it is not the tokenizer's own.

    - hf: `tokenizer.json`, `tokenizer_config.json`, and the `tokenizer.model` if there is one. transformers
      5 takes `tokenizer.json` as it is, but reads a `tokenizer.model` with rules that differ from
      SentencePiece's at spaces.
    - meta, orbax: `tokenizer.model`, or `tokenizer.json` for vocabularies that are no SentencePiece model,
      and `tokenizer_config.json`.
    - gguf: fields, see `export_gguf`.
    - llama2c: `tokenizer.bin`.

    Raises:
      TokenizerError: if the format cannot hold the vocabulary, so that programs that read it would encode
        text differently.
    """
    if not isinstance(tokenizer, TableTokenizer):
        raise TokenizerError(f"a {type(tokenizer).__name__} cannot be written; load one with load_tokenizer")
    files: Mapping[str, bytes] = {}
    fields: Mapping[str, Any] = {}
    if format == "gguf":
        fields = gguf_fields(tokenizer)
    elif format == "llama2c":
        files = {"tokenizer.bin": _llama2c(tokenizer)}
    else:
        files = _files(tokenizer, format, pad_id)
    pad_id = tokenizer.pad_id if pad_id is None else pad_id
    return Vocabulary(files, fields, tokenizer.bos_id, tokenizer.eos_ids, pad_id)


def classifier_pad(tokenizer: Tokenizer) -> int | None:
    """Returns a token to pad a classifier's texts with, or None where there is none.

    transformers reads the head at the last token that is another, so it must be none that a text ends with.
    """
    candidates = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id)
    return next((id for id in candidates if id is not None and id not in tokenizer.eos_ids), None)


def _files(tokenizer: TableTokenizer, format: Format, pad_id: int | None) -> dict[str, bytes]:
    files = {}
    library = tokenizer.library() if isinstance(tokenizer, LibraryTokenizer) else None
    model = tokenizer.proto if isinstance(tokenizer, SentencePieceTokenizer) else None
    if format == "hf" and library is None:
        library = _as_library(tokenizer)
    if format == "meta" and model is None:
        model = _as_model(tokenizer)
    if model is not None:
        files["tokenizer.model"] = model
    if library is not None and (format == "hf" or model is None):
        _begin_with_bos(library, tokenizer)
        files["tokenizer.json"] = library.to_str(pretty=True).encode()
    if "tokenizer.json" in files:
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}  # which takes it as it is
    else:  # legacy: a prefix space after control tokens too, as Meta's code has it
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": True}
    config |= _settings(tokenizer)
    if pad_id is not None:
        config["pad_token"] = tokenizer.spelling(pad_id)
    files["tokenizer_config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def _settings(tokenizer: TableTokenizer) -> dict[str, Any]:
    """What tokenizer_config.json says of roles, BOS and chats."""
    settings: dict[str, Any] = {
        "add_bos_token": tokenizer.add_bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    for role in ("bos", "eos", "unk", "pad"):
        token = getattr(tokenizer, f"{role}_id")
        if token is not None:
            settings[f"{role}_token"] = tokenizer.spelling(token)
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    return settings


def _begin_with_bos(library: tokenizers.Tokenizer, tokenizer: TableTokenizer) -> None:
    """Makes the library put BOS before a text where the tokenizer does, and nowhere else."""
    first = next(iter(library.encode("").ids), None)
    if (first is not None and first == tokenizer.bos_id) == tokenizer.add_bos:
        return
    bos = [tokenizer.spelling(tokenizer.bos_id)] if tokenizer.bos_id is not None and tokenizer.add_bos else []
    library.post_processor = processors.TemplateProcessing(
        single=[*bos, "$A"],
        pair=[*bos, "$A", *bos, "$B"],
        special_tokens=[(name, tokenizer.bos_id) for name in bos],
    )


def _as_library(tokenizer: TableTokenizer) -> tokenizers.Tokenizer | None:
    """A SentencePiece vocabulary as Hugging Face's conversion has it; None if it cannot be one."""
    try:
        vocabulary = sentence_pieces(tokenizer, "tokenizer.json")
        merges = vocabulary.merges()
    except ValueError:  # TokenizerError among them
        return None
    if any(piece.kind == USER_DEFINED for piece in vocabulary.pieces):
        return None
    unknown = next(piece.text for piece in vocabulary.pieces if piece.kind == UNKNOWN)
    library = tokenizers.Tokenizer(
        models.BPE(
            {piece.text: token for token, piece in enumerate(vocabulary.pieces)},
            merges,
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=any(piece.kind == BYTE for piece in vocabulary.pieces),
        )
    )
    prepend = [normalizers.Prepend(SPACE)] if vocabulary.space_prefix else []
    library.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if vocabulary.space_prefix else []
    library.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    library.add_special_tokens(
        [tokenizers.AddedToken(name, normalized=False) for name in tokenizer.special_tokens]
    )
    return library


def _as_model(tokenizer: TableTokenizer) -> bytes | None:
    """A tokenizer.json that was converted from a SentencePiece model as that model; None for others."""
    try:
        vocabulary = sentence_pieces(tokenizer, "tokenizer.model")
    except TokenizerError:
        return None
    model = build_model(vocabulary.pieces, tokenizer.origin, add_space_prefix=vocabulary.space_prefix)
    return model.serialized_model_proto()


def _llama2c(tokenizer: TableTokenizer) -> bytes:
    """The file that llama2.c's tokenizer.py makes of a SentencePiece model; see `llama2c_vocab`."""
    vocabulary = sentence_pieces(tokenizer, "llama2.c")
    # Built into llama2.c: the ids of BOS, EOS and the bytes, and the space before every text.
    expected = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
    kinds = [piece.kind for piece in vocabulary.pieces]
    wrong = kinds[: len(expected)] != expected or set(kinds[len(expected) :]) - {NORMAL}
    if wrong or (tokenizer.bos_id, tokenizer.eos_id) != (1, 2) or not vocabulary.space_prefix:
        raise TokenizerError(
            f"the vocabulary of {tokenizer.origin} is not laid out as llama2.c's programs expect: unknown, "
            "BOS and EOS first, then the 256 bytes, then pieces of text, and a space before every text; "
            "write another format"
        )
    spelled = [piece.text.replace(SPACE, " ") for piece in vocabulary.pieces]
    for token in (1, 2):
        spelled[token] = f"\n{spelled[token]}\n"
    data = [text.encode() for text in spelled]
    out = bytearray(struct.pack("<i", max(map(len, data))))
    for piece, raw in zip(vocabulary.pieces, data, strict=True):
        out += struct.pack("<fi", piece.score, len(raw)) + raw
    return bytes(out)
