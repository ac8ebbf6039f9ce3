"""Training a SentencePiece vocabulary of Llama's kind: byte-pair encoding with bytes to fall back on."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from llama_jax.errors import TokenizerError
from llama_jax.tokenizer.files import one_line

MAX_BYTES = 20_000_000
_LEAST = 3 + 256  # <unk>, <s>, </s>, and the bytes
_MOST = 1 << 20
_SENTENCE_BYTES = 4000  # the trainer's own limit is 4192


def train_sentencepiece(
    texts: Iterable[str], out: Path, *, vocab_size: int, max_bytes: int = MAX_BYTES
) -> Path:
    """Learns a vocabulary from texts and writes it as a SentencePiece `.model` file.

    The settings are those of Llama's tokenizer (arXiv 2302.13971, section 2.1): BPE (arXiv 1508.07909),
    digits apart, bytes for characters that have no piece, no normalisation. Unlike there, no space is put
    before a text and runs of spaces and newlines have pieces, as code wants: `decode(encode(text))` is
    `text`, but that U+2581, SentencePiece's own mark, becomes a space. The same texts give the same file.

    Args:
      texts: documents.
      out: the file, whose name ends in `.model`; written beside and renamed.
      vocab_size: V, with 3 control tokens and 256 bytes among them.
      max_bytes: about how much text to learn from; of more, an even sample is taken.

    Returns:
      `out`.

    Raises:
      TokenizerError: if the texts are empty or too few for `vocab_size`, it is too small for their
        characters, or `out` cannot be written.
    """
    if out.suffix != ".model":
        raise TokenizerError(f"{out} must be named .model, as SentencePiece files are; choose {out}.model")
    if not _LEAST < vocab_size <= _MOST:
        raise TokenizerError(
            f"vocab_size is {vocab_size}; it must be above {_LEAST} (3 control tokens and 256 bytes) and at "
            f"most {_MOST}"
        )
    sample = _evenly(_sentences(texts), max_bytes)
    if not sample:
        raise TokenizerError("there is no text to learn a vocabulary from; give files that hold some")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,  # more save nothing, and the file would say how many
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise TokenizerError(_explain(str(error), vocab_size)) from None
    _write(out, model.getvalue())
    return out


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Cuts texts at line ends into what the trainer accepts.

    It passes over sentences that are long or hold a tab or NUL, which it uses as marks (a tab is then the
    token of its byte), and takes off newlines at a sentence's end: the next one begins with them.
    """
    for text in texts:
        for part in re.split(r"[\t\0]+", text.encode("utf-8", "replace").decode()):
            sentence, used = "", 0
            for line in re.findall(r"\n+[^\n]*|[^\n]+", part):
                length = len(line.encode())
                if sentence and used + length > _SENTENCE_BYTES:
                    yield sentence
                    sentence, used = "", 0
                sentence, used = sentence + line, used + length
                while used > _SENTENCE_BYTES:
                    yield sentence[: _SENTENCE_BYTES // 4]
                    sentence = sentence[_SENTENCE_BYTES // 4 :]
                    used = len(sentence.encode())
            if sentence:
                yield sentence


def _evenly(sentences: Iterable[str], max_bytes: int) -> list[str]:
    """Returns every k-th sentence, for the smallest power of two k that keeps them within `max_bytes`."""
    kept: list[str] = []
    size, every = 0, 1
    for i, sentence in enumerate(sentences):
        if i % every:
            continue
        kept.append(sentence)
        size += len(sentence)
        while size > max_bytes and len(kept) > 1:
            kept, every = kept[::2], every * 2
            size = sum(map(len, kept))
    return kept


def _explain(message: str, vocab_size: int) -> str:
    """Returns what to do about what the trainer says."""
    if found := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", message):
        return f"vocab_size is {vocab_size}; this text makes at most {found[1]}: ask for that, or add text"
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return f"vocab_size is {vocab_size}; the characters of this text alone take {found[1]}: ask for more"
    return f"the vocabulary cannot be trained ({one_line(RuntimeError(message))})"


def _write(out: Path, data: bytes) -> None:
    beside = out.with_name(f"{out.name}.{os.getpid()}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_bytes(data)
            beside.replace(out)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise TokenizerError(
            f"{out} cannot be written ({error.strerror or error}); write it elsewhere"
        ) from None
