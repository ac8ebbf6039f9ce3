"""Writes smollm2_golden.json: the ids of Hugging Face's SmolLM2 tokenizer for corpus.py.

Run as `python -m tests.tokenizer.make_golden PATH_OF_SMOLLM2.gguf`; needs transformers.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.tokenizer import corpus

GOLDEN = Path(__file__).with_name("smollm2_golden.json")
BLOCK = 100  # lines per digest
STEP = 60  # the ids of every 60th line are stored


def digest(rows: Sequence[Sequence[int]]) -> str:
    """Returns a short digest of the ids of some lines."""
    return hashlib.sha256(json.dumps([list(row) for row in rows]).encode()).hexdigest()[:16]


def blocks(rows: Sequence[Sequence[int]]) -> list[str]:
    return [digest(rows[i : i + BLOCK]) for i in range(0, len(rows), BLOCK)]


def corpus_digest(lines: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def hugging_face(gguf: Path) -> Any:
    """Returns transformers' conversion of the vocabulary, with the pre-tokenizer of SmolLM2's tokenizer.json.

    The conversion reads tokens, merges and control tokens, but uses GPT-2's pre-tokenizer for this family, so
    that "x  1" would differ from the published tokenizer. It is replaced by the published `pre_tokenizer`,
    HuggingFaceTB/SmolLM2-135M, tokenizer.json.
    """
    import transformers
    from tokenizers import pre_tokenizers

    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return tokenizer


def main() -> None:
    lines = corpus.lines()
    rows = hugging_face(Path(sys.argv[1]))(lines, add_special_tokens=False)["input_ids"]
    golden = {
        "corpus": corpus_digest(lines),
        "blocks": blocks(rows),
        "rows": {str(i): rows[i] for i in range(0, len(rows), STEP)},
    }
    GOLDEN.write_text(json.dumps(golden, separators=(",", ":")).replace('],"', '],\n"') + "\n")


if __name__ == "__main__":
    main()
