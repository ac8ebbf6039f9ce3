"""What the two models read: a text in token ids, and whether their vocabularies spell it alike."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError, MissingTokenizerError, TokenizerError
from llama_jax.tokenizer import Tokenizer, load_tokenizer

MOST_TOKENS = 512  # of a text are read: enough to tell two models apart, and a moment's work

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
    """The tokens that both models read.

    Attributes:
      what: where they come from, for people.
      ids: the tokens.
      differences: what is not alike in the two vocabularies; None where one of the models has none.
      notes: which has none, and why.
    """

    what: str
    ids: tuple[int, ...]
    differences: tuple[str, ...] | None
    notes: tuple[str, ...]


def choose_text(text: str | None, homes: tuple[Path, Path], configs: tuple[LlamaConfig, LlamaConfig]) -> Text:
    """Puts a text into tokens by A's vocabulary; by B's where A has none, and random ones where neither has.

    Args:
      text: what to read; None is a passage of English that is built in.
      homes: where the vocabularies of A and B are.
      configs: the models.

    Returns:
      At most `MOST_TOKENS` tokens, and no more than the shorter context.

    Raises:
      InputError: for a text without a token.
      TokenizerError: for a given text that neither has a vocabulary for.
    """
    limit = min(MOST_TOKENS, *(config.max_position_embeddings for config in configs))
    size = min(config.vocab_size for config in configs)
    tokenizers: dict[str, Tokenizer] = {}
    notes: list[str] = []
    problems: list[str] = []
    for name, home, config in zip("AB", homes, configs, strict=True):
        try:
            tokenizers[name] = load_tokenizer(home)
        except MissingTokenizerError as error:
            notes.append(f"{name} has no vocabulary to read a text by: {error}")
        except TokenizerError as error:
            problems.append(f"that of {name} cannot be read: {error}")
        else:
            if tokenizers[name].vocab_size != config.vocab_size:
                sizes = f"{tokenizers[name].vocab_size} tokens, its model {config.vocab_size}"
                problems.append(f"that of {name} has {sizes}")
    if not tokenizers and text is not None:
        raise TokenizerError((problems or notes)[0])
    if text is not None and not text:
        raise InputError("the text is empty; give at least a word")
    encoded = {name: each.encode(PASSAGE if text is None else text) for name, each in tokenizers.items()}
    found = {name: ids for name, ids in encoded.items() if max(ids, default=0) < size}
    if len(tokenizers) == 2:
        problems += _differences(tokenizers["A"], tokenizers["B"], encoded["A"], encoded["B"])
    differences = tuple(problems) if problems or len(tokenizers) == 2 else None
    if not found:
        random = np.random.default_rng(0).integers(0, size, min(limit, 256))
        return Text("random tokens", tuple(map(int, random)), differences, tuple(notes))
    by, ids = next(iter(found.items()))
    if not ids:
        raise InputError("the text is empty; give at least a word")
    what = f"{'the built-in text' if text is None else 'the text'} by {by}'s vocabulary"
    return Text(what, tuple(ids[:limit]), differences, tuple(notes))


def _differences(x: Tokenizer, y: Tokenizer, x_ids: list[int], y_ids: list[int]) -> list[str]:
    """Says what is not alike in two vocabularies, a line each: sizes, spellings, roles, the text's ids."""
    lines = []
    if x.vocab_size != y.vocab_size:
        lines.append(f"A has {x.vocab_size} tokens, B {y.vocab_size}")
    both = range(min(x.vocab_size, y.vocab_size))
    unlike = [token for token in both if x.piece(token) != y.piece(token)]
    # Some files say how an unknown token is shown, and not only what it is called.
    if unlike := [token for token in unlike if not token == x.unk_id == y.unk_id]:
        first = unlike[0]
        lines.append(
            f"{len(unlike)} tokens are not spelled alike, the first {first}: "
            f"{x.piece(first)!r} in A, {y.piece(first)!r} in B"
        )
    roles = ((role, getattr(x, role), getattr(y, role)) for role in ("bos_id", "eos_id"))
    lines += [f"{role} is {in_a} in A, {in_b} in B" for role, in_a, in_b in roles if in_a != in_b]
    if x_ids != y_ids:
        apart = (at for at, pair in enumerate(zip(x_ids, y_ids, strict=False)) if pair[0] != pair[1])
        at = next(apart, min(len(x_ids), len(y_ids)))
        lines.append(f"the text is {len(x_ids)} tokens in A, {len(y_ids)} in B, and the first {at} are alike")
    return lines
