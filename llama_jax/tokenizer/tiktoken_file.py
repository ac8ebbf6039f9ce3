"""Llama 3's `tokenizer.model`, as Meta ships it: byte pieces with ranks, in tiktoken's format.

Each line is a piece's bytes in base64, a space, and its rank, which is also its id (tiktoken, `load.py`). The
control tokens follow, as in Meta's code (meta-llama/llama3, llama/tokenizer.py); those that Llama 3.1 has put
to use have its names.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Tokenizer, decoders, models

from llama_jax.errors import TokenizerError
from llama_jax.tokenizer.base import DecodeTable, TokenizerSettings
from llama_jax.tokenizer.byte_level import BYTE_OF
from llama_jax.tokenizer.files import MAX_IDS, one_line
from llama_jax.tokenizer.hf_config import read_hf_config
from llama_jax.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from llama_jax.tokenizer.tokenizer_json import HuggingFaceTokenizer

_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d{1,9}")
_PRE = "llama-bpe"
_CONTROL_TOKENS = 256
_NAMED = {
    0: "begin_of_text",
    1: "end_of_text",
    4: "finetune_right_pad_id",
    6: "start_header_id",
    7: "end_header_id",
    8: "eom_id",
    9: "eot_id",
    10: "python_tag",
}
_CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}


def is_tiktoken(data: bytes) -> bool:
    """Whether a file begins with a line of tiktoken's format."""
    return _LINE.fullmatch(data[:4096].partition(b"\n")[0].rstrip(b"\r")) is not None


def load(path: Path, data: bytes) -> HuggingFaceTokenizer:
    """Loads the vocabulary from `data`, the bytes of `path`; `encode` prepends BOS, as Meta's code does.

    Raises:
      TokenizerError: if the file is malformed.
    """
    ranks = _ranks(path, data)
    pieces = sorted(ranks, key=ranks.__getitem__)
    texts = ["".join(map(_CHARACTER_OF.__getitem__, piece)) for piece in pieces]
    pre = PRE_TOKENIZERS[_PRE]
    try:
        model = models.BPE(
            {text: token for token, text in enumerate(texts)}, _merges(ranks), ignore_merges=pre.ignore_merges
        )
    except Exception as error:  # the library raises bare Exceptions
        raise TokenizerError(f"{path} cannot be used ({one_line(error)}); take a fresh copy") from None
    backend: tokenizers.Tokenizer = Tokenizer(model)
    backend.pre_tokenizer = pre.build()
    backend.decoder = decoders.ByteLevel()
    special = {name: len(pieces) + i for i, name in enumerate(_control_names())}
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    table = DecodeTable([*pieces, *map(str.encode, special)], special)
    settings = TokenizerSettings(
        bos_id=special["<|begin_of_text|>"], eos_id=special["<|end_of_text|>"], add_bos=True
    )
    settings = read_hf_config(path).apply(settings, special, len(table.pieces))
    return HuggingFaceTokenizer(backend, table, settings, str(path), gguf_pre=_PRE)


def _ranks(path: Path, data: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line:
            continue
        try:
            if not _LINE.fullmatch(line):
                raise ValueError
            text, rank = line.split()
            ranks[base64.b64decode(text, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise TokenizerError(
                f"{path}:{number}: is not a piece in base64 and its rank; take a fresh copy"
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) > MAX_IDS:
        raise TokenizerError(
            f"{path}: its {len(ranks)} pieces do not have the ranks 0 to {len(ranks) - 1}; take a fresh copy"
        )
    if missing := [byte for byte in range(256) if bytes((byte,)) not in ranks]:
        raise TokenizerError(f"{path}: has no piece for byte {missing[0]}; take a fresh copy")
    return ranks


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[str, str]]:
    """Returns the merges that are equivalent to the ranks, as transformers' TikTokenConverter does."""
    merges = []
    for piece, rank in ranks.items():
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += [(rank, ranks[a], ranks[b], a, b) for a, b in splits if a in ranks and b in ranks]
    text = lambda piece: "".join(map(_CHARACTER_OF.__getitem__, piece))  # noqa: E731
    return [(text(a), text(b)) for _, _, _, a, b in sorted(merges)]


def _control_names() -> list[str]:
    names, reserved = [], 0
    for i in range(_CONTROL_TOKENS):
        if i not in _NAMED:
            names.append(f"<|reserved_special_token_{reserved}|>")
            reserved += 1
        else:
            names.append(f"<|{_NAMED[i]}|>")
    return names
