"""Exports a tokenizer as the files or metadata fields of a checkpoint format."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, processors

from llama_jax.errors import TokenizerError
from llama_jax.tokenizer.base import BaseTokenizer, Tokenizer
from llama_jax.tokenizer.export_gguf import gguf_fields
from llama_jax.tokenizer.pieces import extract_pieces
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
from llama_jax.tokenizer.tokenizer_json import HuggingFaceTokenizer
from llama_jax.weights.names import Format
from llama_jax.weights.write.vocabulary import Vocabulary


def export_vocabulary(tokenizer: Tokenizer, format: Format, *, pad_id: int | None = None) -> Vocabulary:
    """Returns the files and fields of a tokenizer in a checkpoint format.

    - hf: `tokenizer.json`, `tokenizer_config.json`, and `tokenizer.model` for a SentencePiece model.
      transformers 5 loads `tokenizer.json` unchanged, but encodes spaces differently from SentencePiece
      with a `tokenizer.model`.
    - meta, orbax: `tokenizer.model`, or `tokenizer.json` for a vocabulary that is not a SentencePiece model,
      and `tokenizer_config.json`.
    - gguf: fields, see `export_gguf`.
    - llama2c: `tokenizer.bin`.

    Args:
      tokenizer: from `load_tokenizer`.
      format: the checkpoint format.
      pad_id: the padding token; None is the tokenizer's own.

    Raises:
      TokenizerError: if the format cannot represent the vocabulary, so that programs that read it would
        encode text differently.
    """
    if not isinstance(tokenizer, BaseTokenizer):
        raise TokenizerError(f"a {type(tokenizer).__name__} cannot be exported; use load_tokenizer")
    if len(tokenizer.prefix_ids) > (format == "gguf") and format != "hf":
        names = " ".join(map(tokenizer.id_to_token, tokenizer.prefix_ids))
        raise TokenizerError(
            f"the vocabulary of {tokenizer.origin} prepends {names} to every text, which {format} cannot "
            "represent; write hf"
        )
    if tokenizer.suffix_ids not in ((), (tokenizer.eos_id,)[: format != "llama2c"]) and format != "hf":
        names = " ".join(map(tokenizer.id_to_token, tokenizer.suffix_ids))
        raise TokenizerError(
            f"the vocabulary of {tokenizer.origin} appends {names} to every text, which {format} cannot "
            "represent; write hf"
        )
    files: Mapping[str, bytes] = {}
    fields: Mapping[str, Any] = {}
    if format == "gguf":
        fields = gguf_fields(tokenizer)
    elif format == "llama2c":
        files = {"tokenizer.bin": _llama2c_bin(tokenizer)}
    else:
        files = _files(tokenizer, format, pad_id)
    pad_id = tokenizer.pad_id if pad_id is None else pad_id
    return Vocabulary(files, fields, tokenizer.bos_id, tokenizer.eos_ids, pad_id)


def classifier_pad_id(tokenizer: Tokenizer) -> int | None:
    """Returns the id of a padding token for classifiers, or None if there is none.

    transformers applies the classification head at the last non-padding token, so the padding token must not
    be one that ends a text.
    """
    candidates = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id)
    return next((id for id in candidates if id is not None and id not in tokenizer.eos_ids), None)


def _files(tokenizer: BaseTokenizer, format: Format, pad_id: int | None) -> dict[str, bytes]:
    files = {}
    backend = tokenizer.copy_backend() if isinstance(tokenizer, HuggingFaceTokenizer) else None
    model = tokenizer.proto if isinstance(tokenizer, SentencePieceTokenizer) else None
    if format == "hf" and backend is None:
        backend = _to_backend(tokenizer)
    if format == "meta" and model is None:
        model = _to_sentencepiece_proto(tokenizer)
    if model is not None:
        files["tokenizer.model"] = model
    if backend is not None and (format == "hf" or model is None):
        _set_bos(backend, tokenizer)
        files["tokenizer.json"] = backend.to_str(pretty=True).encode()
    if "tokenizer.json" in files:
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}  # loads the file unchanged
    else:  # legacy: a prefix space after control tokens too, as in Meta's code
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": True}
    config |= _tokenizer_config(tokenizer)
    if pad_id is not None:
        config["pad_token"] = tokenizer.id_to_token(pad_id)
    files["tokenizer_config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def _tokenizer_config(tokenizer: BaseTokenizer) -> dict[str, Any]:
    """Returns the special tokens, BOS rule and chat template for tokenizer_config.json."""
    config: dict[str, Any] = {
        "add_eos_token": bool(tokenizer.suffix_ids),
        "clean_up_tokenization_spaces": False,
    }
    if not tokenizer.prefix_ids:  # else the post-processor says what is prepended
        config["add_bos_token"] = tokenizer.add_bos
    for name in ("bos", "eos", "unk", "pad"):
        token = getattr(tokenizer, f"{name}_id")
        if token is not None:
            config[f"{name}_token"] = tokenizer.id_to_token(token)
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    return config


def _set_bos(backend: tokenizers.Tokenizer, tokenizer: BaseTokenizer) -> None:
    """Sets the post-processor to prepend BOS if `tokenizer.add_bos`, and otherwise nothing."""
    if tokenizer.prefix_ids:
        return
    added = backend.encode("").ids
    begins = bool(added) and added[0] == tokenizer.bos_id
    if begins == tokenizer.add_bos and added[int(begins) :] == list(tokenizer.suffix_ids):
        return
    ids = [tokenizer.bos_id] if tokenizer.bos_id is not None and tokenizer.add_bos else []
    bos, eos = (list(map(tokenizer.id_to_token, added)) for added in (ids, tokenizer.suffix_ids))
    backend.post_processor = processors.TemplateProcessing(
        single=[*bos, "$A", *eos],
        pair=[*bos, "$A", *eos, *bos, "$B", *eos],
        special_tokens=list(dict(zip([*bos, *eos], [*ids, *tokenizer.suffix_ids], strict=True)).items()),
    )


def _to_backend(tokenizer: BaseTokenizer) -> tokenizers.Tokenizer | None:
    """Converts a SentencePiece vocabulary like Hugging Face; None if the result would encode differently."""
    try:
        vocabulary = extract_pieces(tokenizer, "tokenizer.json")
        merges = vocabulary.merges()
    except ValueError:  # includes TokenizerError
        return None
    if any(piece.kind == USER_DEFINED for piece in vocabulary.pieces):
        return None
    unknown = next(piece.text for piece in vocabulary.pieces if piece.kind == UNKNOWN)
    backend = tokenizers.Tokenizer(
        models.BPE(
            {piece.text: token for token, piece in enumerate(vocabulary.pieces)},
            merges,
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=any(piece.kind == BYTE for piece in vocabulary.pieces),
        )
    )
    prepend = [normalizers.Prepend(SPACE)] if vocabulary.space_prefix else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if vocabulary.space_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    backend.add_special_tokens(
        [tokenizers.AddedToken(name, normalized=False) for name in tokenizer.special_tokens]
    )
    return backend


def _to_sentencepiece_proto(tokenizer: BaseTokenizer) -> bytes | None:
    """Converts a tokenizer.json that came from a SentencePiece model back to the model; None for others."""
    try:
        vocabulary = extract_pieces(tokenizer, "tokenizer.model")
    except TokenizerError:
        return None
    model = build_model(vocabulary.pieces, tokenizer.origin, add_space_prefix=vocabulary.space_prefix)
    return model.serialized_model_proto()


def _llama2c_bin(tokenizer: BaseTokenizer) -> bytes:
    """Returns the file that llama2.c's tokenizer.py writes for a SentencePiece model; see `llama2c_vocab`."""
    vocabulary = extract_pieces(tokenizer, "llama2.c")
    # Hard-coded in llama2.c: the ids of BOS, EOS and the bytes, and the prefix space.
    expected = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
    kinds = [piece.kind for piece in vocabulary.pieces]
    mismatch = kinds[: len(expected)] != expected or set(kinds[len(expected) :]) - {NORMAL}
    if mismatch or (tokenizer.bos_id, tokenizer.eos_id) != (1, 2) or not vocabulary.space_prefix:
        raise TokenizerError(
            f"the vocabulary of {tokenizer.origin} does not have the layout of llama2.c: unknown, BOS and "
            "EOS, the 256 bytes, then pieces of text, and a prefix space before every text; write another "
            "format"
        )
    texts = [piece.text.replace(SPACE, " ") for piece in vocabulary.pieces]
    for token in (1, 2):
        texts[token] = f"\n{texts[token]}\n"
    # run.c reads one entry, which must not be empty, for each row of the embedding.
    entries = [(piece.score, text.encode()) for piece, text in zip(vocabulary.pieces, texts, strict=True)]
    entries += [(0.0, f"[PAD{token}]".encode()) for token in tokenizer.unused_ids]
    out = bytearray(struct.pack("<i", max(len(raw) for _, raw in entries)))
    for score, raw in entries:
        out += struct.pack("<fi", score, len(raw)) + raw
    return bytes(out)
