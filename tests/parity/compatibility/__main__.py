"""Writes docs/compatibility.md: `python -m tests.parity.compatibility [NAME ...]`.

With names, only the variants whose names contain one are compared, and nothing is written.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import torch

from tests.parity.compatibility.compare import LINES, NEW_TOKENS, TOLERANCE, Comparison, compare
from tests.parity.compatibility.variants import VARIANTS

PAGE = Path(__file__).parents[3] / "docs" / "compatibility.md"
PACKAGES = ("transformers", "peft", "tokenizers", "sentencepiece", "gguf", "xllamacpp", "jax")
HEAD = """# Compatibility

{count} small random checkpoints, written by transformers, tokenizers, PEFT, sentencepiece and gguf, then
read here and by the program that they are for. `make parity` compares them again;
`python -m tests.parity.compatibility`, in an environment with the `parity` extra, writes this page.
Versions: {versions}.

- **ids**: of {texts} texts in many scripts, with control tokens and odd spaces.
- **logits**: the greatest difference in f32, relative to the largest logit; at most {tolerance:.0e} passes.
- **text**: the greedy continuation of a prompt, by {new_tokens} tokens or to an end token.
- **chat**: the ids of a conversation of four messages, where there is a template.

Where other programs differ from each other, and llama_jax from one of them:

- A BOS that a text spells at its start is not prepended once more (transformers and llama.cpp double it).
- Bytes that are not UTF-8 become one U+FFFD each, as in sentencepiece; the tokenizers library replaces the
  valid characters next to them as well, llama.cpp leaves the bytes.
- A `tokenizer.json` is run as it is. The class `LlamaTokenizer` of transformers 5 replaces its normalizer and
  pre-tokenizer, so that text after a control token has no prefix space, whatever the file says.
- In a conversation, control tokens that a message spells are text. transformers makes tokens of them.
- Rows of an embedding beyond the vocabulary are never sampled; transformers may sample them.
- llama.cpp leaves out the Unicode normalization (NFC) of Qwen 2's tokenizer.
"""


def row(name: str, result: Comparison) -> str:
    """One line of the table."""
    ids = "same" if not result.lines else f"{len(result.lines)} differ"
    text = "same" if result.text == result.reference_text else "differs"
    chat = {None: "", True: "same", False: "differs"}[result.chat]
    return f"| {name} | {result.program} | {ids} | {result.error:.0e} | {text} | {chat} |"


def page(results: dict[str, Comparison]) -> str:
    """The whole page."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    lines = HEAD.format(
        count=len(results), versions=versions, texts=len(LINES), tolerance=TOLERANCE, new_tokens=NEW_TOKENS
    ).splitlines()
    for group in dict.fromkeys(VARIANTS[name].group for name in results):
        lines += ["", f"## {group[0].upper()}{group[1:]}", ""]
        lines += ["| variant | beside | ids | logits | text | chat |", "|---|---|---|---|---|---|"]
        lines += [row(name, result) for name, result in results.items() if VARIANTS[name].group == group]
    return "\n".join(lines) + "\n"


def main() -> int:
    torch.set_num_threads(1)
    chosen = [name for name in VARIANTS if not sys.argv[1:] or any(part in name for part in sys.argv[1:])]
    results = {}
    for name in chosen:
        results[name] = compare(VARIANTS[name])
        print(row(name, results[name]), file=sys.stderr, flush=True)
    if not sys.argv[1:]:
        PAGE.write_text(page(results), encoding="utf-8")
    return int(not all(result.same for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
