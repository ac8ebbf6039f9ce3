"""Trains a SentencePiece vocabulary like Llama's: BPE with byte fallback."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from llama_jax.errors import TokenizerError
from llama_jax.storage.atomic import atomic_file
from llama_jax.tokenizer.files import one_line

MAX_BYTES = 20_000_000
_NUM_RESERVED = 3 + 256  # <unk>, <s>, </s>, and the bytes
_MAX_VOCAB_SIZE = 1 << 20
_SENTENCE_BYTES = 4000  # SentencePiece's limit is 4192


def train_sentencepiece(
    texts: Iterable[str], out: Path, *, vocab_size: int, max_bytes: int = MAX_BYTES
) -> Path:
    """Trains a vocabulary on texts and writes it as a SentencePiece `.model` file.

    The settings are those of Llama's tokenizer (arXiv 2302.13971, section 2.1): BPE (arXiv 1508.07909),
    split digits, byte fallback, no normalization. Unlike Llama's, it prepends no space to a text, and has
    pieces for runs of spaces and newlines, for code: `decode(encode(text))` equals `text`, except that
    U+2581, SentencePiece's space character, becomes a space. Deterministic.

    Args:
      texts: documents.
      out: the output file, named `*.model`; written to a temporary file and renamed.
      vocab_size: V, including 3 control tokens and 256 bytes.
      max_bytes: approximate amount of text to train on; larger corpora are subsampled evenly.

    Returns:
      `out`.

    Raises:
      TokenizerError: if there is no text, or too little for `vocab_size`; if `vocab_size` is too small for
        the characters of the texts; or if `out` cannot be written.
    """
    if out.suffix != ".model":
        raise TokenizerError(f"{out} must be named .model, as SentencePiece files are; use {out}.model")
    if not _NUM_RESERVED < vocab_size <= _MAX_VOCAB_SIZE:
        raise TokenizerError(
            f"vocab_size is {vocab_size}; it must be above {_NUM_RESERVED} (3 control tokens and 256 bytes) "
            f"and at most {_MAX_VOCAB_SIZE}"
        )
    sample = _subsample(_sentences(texts), max_bytes)
    if not sample:
        raise TokenizerError("there is no text to train a vocabulary on; give files that are not empty")
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
            num_threads=1,  # more threads are not faster, and the file would record their number
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise TokenizerError(_describe_failure(str(error), vocab_size)) from None
    try:
        with atomic_file(out) as partial:
            partial.write_bytes(model.getvalue())
    except OSError as error:
        raise TokenizerError(
            f"{out} cannot be written ({error.strerror or error}); write it elsewhere"
        ) from None
    return out


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Splits texts at line ends into sentences that SentencePiece's trainer accepts.

    The trainer skips sentences that are too long or contain a tab or NUL, its separators (a tab is encoded as
    its byte), and strips newlines at the end of a sentence, so each is put at the start of the next one.
    """
    for text in texts:
        for part in re.split(r"[\t\0]+", text.encode("utf-8", "replace").decode()):
            sentence, size = "", 0
            for line in re.findall(r"\n+[^\n]*|[^\n]+", part):
                length = len(line.encode())
                if sentence and size + length > _SENTENCE_BYTES:
                    yield sentence
                    sentence, size = "", 0
                sentence, size = sentence + line, size + length
                while size > _SENTENCE_BYTES:
                    yield sentence[: _SENTENCE_BYTES // 4]
                    sentence = sentence[_SENTENCE_BYTES // 4 :]
                    size = len(sentence.encode())
            if sentence:
                yield sentence


def _subsample(sentences: Iterable[str], max_bytes: int) -> list[str]:
    """Returns every k-th sentence, for the smallest power of two k that keeps them within `max_bytes`."""
    sample: list[str] = []
    size, stride = 0, 1
    for i, sentence in enumerate(sentences):
        if i % stride:
            continue
        sample.append(sentence)
        size += len(sentence)
        while size > max_bytes and len(sample) > 1:
            sample, stride = sample[::2], stride * 2
            size = sum(map(len, sample))
    return sample


def _describe_failure(message: str, vocab_size: int) -> str:
    """Returns an error message with what to do, from SentencePiece's message."""
    if match := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", message):
        return f"vocab_size is {vocab_size}; this text allows at most {match[1]}: reduce it, or add text"
    if match := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return f"vocab_size is {vocab_size}; the characters of this text alone need {match[1]}: increase it"
    return f"the vocabulary cannot be trained ({one_line(RuntimeError(message))}); check the texts"
