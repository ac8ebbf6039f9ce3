"""The input text of a comparison as token ids, and the differences of the two vocabularies."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError, MissingTokenizerError, TokenizerError
from llama_jax.tokenizer import Tokenizer, load_tokenizer
from llama_jax.tokenizer.base import BaseTokenizer
from llama_jax.tokenizer.fit import fit_vocabulary

_MAX_PROBES = 300
MAX_TOKENS = 512  # enough to tell two models apart, and fast

PASSAGE = """\
The mill at Harrow Bend had not ground a sack of flour for thirty years, yet the wheel still turned. Every \
spring, when the snow left the hills, the river rose to the third stone of the bank and pushed the old oak \
paddles round, slowly at first and then so fast that the whole house hummed. Children came down from the \
village to hear it. "Put your ear to the door," the oldest would say to the youngest, "and it will tell you \
your name." It never did, of course; but each of them walked home certain of having heard something.

In the year of the great flood (1911, by the church register) the miller's daughter, Agnes Pell, measured \
the water twice a day with a notched rod and wrote the numbers in a ledger: 4 feet 2 inches on Monday, 5 \
feet exactly on Tuesday, 7 feet and rising on Wednesday at noon. Because of those numbers the village moved \
its cattle to the upper field in time. Nobody thanked her for it until much later, when an engineer who had \
come to plan the dam asked whether anyone had kept a record. "Forty-one years of it," she said, and put \
nine volumes on the table.

What makes a good record? It is not only that the figures are right. They must be taken in the same place, \
at the same hour, with the same rod; whoever takes them must say what was done when the rod broke, or when \
illness kept the house for a week; and a stranger must be able to read them without asking. The engineer \
turned the pages and found all of this: the dates, the hours, a drawing of the rod, even a note, in smaller \
letters, about the day on which a swan had been sitting on the third stone and would not leave. He smiled, \
copied the note as well, and began to add up the columns.

The dam was never built. But if you walk along the river today, past the car park and the two new bridges, \
you can still find the stone. There is a line cut into it, and beside the line a date; and when the snow \
melts, the water comes up, touches the line, and goes back down to the sea.
"""


@dataclasses.dataclass(frozen=True)
class Text:
    """The input tokens of both models.

    Attributes:
      what: a description of the text.
      ids: the token ids.
      differences: the differences of the two vocabularies; None if a model has no tokenizer.
      notes: which model has no tokenizer, and why.
    """

    what: str
    ids: tuple[int, ...]
    differences: tuple[str, ...] | None
    notes: tuple[str, ...]


def encode_text(
    text: str | None, tokenizer_dirs: tuple[Path, Path], configs: tuple[LlamaConfig, LlamaConfig]
) -> Text:
    """Tokenizes a text with A's tokenizer, or with B's if A has none; random tokens if neither has one.

    Args:
      text: the text; None is a built-in passage of English.
      tokenizer_dirs: paths of the tokenizers of A and B.
      configs: configurations of A and B.

    Returns:
      At most `MAX_TOKENS` tokens, and at most the shorter context.

    Raises:
      InputError: for a text without tokens.
      TokenizerError: if `text` is given and neither model has a tokenizer.
    """
    limit = min(MAX_TOKENS, *(config.max_position_embeddings for config in configs))
    size = min(config.vocab_size for config in configs)
    tokenizers: dict[str, Tokenizer] = {}
    notes: list[str] = []
    problems: list[str] = []
    for name, path, config in zip("AB", tokenizer_dirs, configs, strict=True):
        try:
            tokenizers[name] = fit_vocabulary(load_tokenizer(path), config.vocab_size)
        except MissingTokenizerError as error:
            notes.append(f"{name} has no tokenizer: {error}")
        except TokenizerError as error:
            problems.append(f"the tokenizer of {name} cannot be used: {error}")
    if not tokenizers and text is not None:
        raise TokenizerError((problems or notes)[0])
    if text is not None and not text:
        raise InputError("the text is empty; give at least one word")
    passage = PASSAGE if text is None else text
    encoded = {name: tokenizer.encode(passage) for name, tokenizer in tokenizers.items()}
    usable = {name: ids for name, ids in encoded.items() if max(ids, default=0) < size}
    if len(tokenizers) == 2:
        problems += _differences(tokenizers["A"], tokenizers["B"], encoded["A"], encoded["B"])
    differences = tuple(problems) if problems or len(tokenizers) == 2 else None
    if not usable:
        random = np.random.default_rng(0).integers(0, size, min(limit, 256))
        return Text("random tokens", tuple(map(int, random)), differences, tuple(notes))
    name, ids = next(iter(usable.items()))
    if not ids:
        raise InputError("the text is empty; give at least one word")
    what = f"{'the built-in text' if text is None else 'the text'} with {name}'s tokenizer"
    return Text(what, tuple(ids[:limit]), differences, tuple(notes))


def _differences(a: Tokenizer, b: Tokenizer, a_ids: list[int], b_ids: list[int]) -> list[str]:
    """Differences of two tokenizers, one line each.

    Sizes, pieces, special tokens, tokens that end a text, chat templates, and the ids of the text and of
    texts with each of the added tokens.
    """
    lines = []
    if a.vocab_size != b.vocab_size:
        lines.append(f"A has {a.vocab_size} tokens, B {b.vocab_size}")
    common = range(min(a.vocab_size, b.vocab_size))
    different = [token for token in common if a.piece(token) != b.piece(token)]
    # Ignore the unknown token: some formats store its surface form instead of its name.
    if different := [token for token in different if not token == a.unk_id == b.unk_id]:
        first = different[0]
        lines.append(
            f"{len(different)} tokens have different pieces, the first {first}: "
            f"{a.piece(first)!r} in A, {b.piece(first)!r} in B"
        )
    special = ((name, getattr(a, name), getattr(b, name)) for name in ("bos_id", "eos_id"))
    lines += [f"{name} is {in_a} in A, {in_b} in B" for name, in_a, in_b in special if in_a != in_b]
    unknown = {a.unk_id, b.unk_id}  # some formats do not count it as a control token
    control = [{(n, id) for n, id in t.special_tokens.items() if id not in unknown} for t in (a, b)]
    if different_tokens := sorted(control[0] ^ control[1], key=lambda item: item[1]):
        name, id = different_tokens[0]
        owner = "A" if (name, id) in control[0] else "B"
        lines.append(
            f"{len(different_tokens)} control tokens differ, the first {name!r}, {id}, which only {owner} has"
        )
    ends = [sorted({*tokenizer.eos_ids}) for tokenizer in (a, b)]
    if ends[0] != ends[1]:
        lines.append(f"a text ends with {ends[0]} in A, {ends[1]} in B")
    if a.chat_template != b.chat_template:
        missing = [name for name, t in zip("AB", (a, b), strict=True) if t.chat_template is None]
        lines.append(f"{missing[0]} has no chat template" if missing else "the chat templates differ")
    for probe in dict.fromkeys([*_probes(a), *_probes(b)]):
        ids = [tokenizer.encode(probe, parse_special=True) for tokenizer in (a, b)]
        if ids[0] != ids[1]:
            lines.append(f"{probe!r} is {ids[0]} in A, {ids[1]} in B")
            break
    if a_ids != b_ids:
        pairs = enumerate(zip(a_ids, b_ids, strict=False))
        equal = next((i for i, (x, y) in pairs if x != y), min(len(a_ids), len(b_ids)))
        lines.append(f"the text has {len(a_ids)} tokens in A, {len(b_ids)} in B; the first {equal} are equal")
    return lines


def _probes(tokenizer: Tokenizer) -> list[str]:
    """Short texts with each added token, up to a few hundred, with and without a space before it."""
    added = sorted(tokenizer.added_ids)[:_MAX_PROBES] if isinstance(tokenizer, BaseTokenizer) else []
    pieces = [tokenizer.piece(token).strip() for token in added if token < tokenizer.vocab_size]
    return [text for piece in pieces if piece for text in (f"a {piece} b", f"a{piece}b")]
