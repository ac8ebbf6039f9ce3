"""A whole conversation as token ids, and which of them the assistant is to learn.

Nothing is guessed from how a template looks: what a turn must begin after is what `encode_chat` gives as its
prompt, and what ends it is the first end token that follows.
"""

from __future__ import annotations

from llama_jax.chat.encode import Messages, checked_messages, encode_chat, render_chat
from llama_jax.chat.templates import ChatTemplate
from llama_jax.errors import InputError
from llama_jax.tokenizer import Tokenizer


def encode_turns(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Messages,
    *,
    first: int = 0,
    most: int | None = None,
) -> tuple[list[int], list[int]]:
    """Turns a conversation into the ids to train on and a mask of those that the assistant writes.

        ids = encode_chat(messages, add_generation_prompt=False)
        prompt_i = encode_chat(messages[:i], add_generation_prompt=True) is a prefix of ids, and
        mask = 1 from len(prompt_i) to the end token of turn i, inclusive, for each assistant's turn i

    So a model is trained to go on from exactly what `generate` gives it, and to stop. What the template
    writes before a turn, and after its end token, is not learned; nor is a system prompt of its own.

    Args:
      tokenizer: the vocabulary.
      template: from `chat_template`.
      messages: each with a role (system, user or assistant) and a content.
      first: only turns from messages[first] on are learned.
      most: turns that begin after so many ids are left out of the mask; None is all of them. A
        conversation costs the encoding of a prompt for each of its turns.

    Returns:
      (ids, mask), lists of int of one length; mask is all 0 where no turn is the assistant's.

    Raises:
      InputError: for malformed messages, or ones that the template refuses; for a conversation that the
        assistant begins; and where template or vocabulary do not let a turn be told from its prompt.
      TokenizerError: for a template that does not render, or takes too much time or memory.
    """
    messages = checked_messages(messages)
    ids = encode_chat(tokenizer, template, messages, add_generation_prompt=False)
    mask = [0] * len(ids)
    for i in range(first, len(messages)):
        if messages[i]["role"] != "assistant":
            continue
        start = _start(tokenizer, template, messages, i, ids)
        if most is not None and start >= most:
            break
        end = _end(tokenizer, template, messages, i, ids, start)
        mask[start:end] = [1] * (end - start)
    return ids, mask


def _start(
    tokenizer: Tokenizer, template: ChatTemplate, messages: list[dict[str, str]], i: int, ids: list[int]
) -> int:
    """Returns the length of the prompt that turn `i` answers, a prefix of `ids`."""
    if not i:
        raise InputError("messages[0] is the assistant's, which answers nothing; begin with the user's")
    prompt = encode_chat(tokenizer, template, messages[:i])
    if ids[: len(prompt)] == prompt:
        return len(prompt)
    whole = render_chat(template, messages, add_generation_prompt=False)
    if whole.startswith(render_chat(template, messages[:i])):
        raise InputError(
            f"messages[{i}]: how the answer begins, {messages[i]['content'][:8]!r}, makes one token with the "
            "end of what the template writes before it; begin it without white space, or give a template "
            "whose prompts end without"
        )
    raise InputError(
        f"{template.name} asks for an answer with other text than it writes before messages[{i}], which is "
        "one, so a model would learn to go on from another prompt than it will get; give another template"
    )


def _end(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: list[dict[str, str]],
    i: int,
    ids: list[int],
    start: int,
) -> int:
    """Returns where turn `i` ends in `ids`, after its end token."""
    ends = frozenset(tokenizer.eos_ids)
    end = next((at + 1 for at in range(start, len(ids)) if ids[at] in ends), None)
    if end is not None and i + 1 < len(messages):  # is it this turn's, or one of a later message?
        turn = encode_chat(tokenizer, template, messages[: i + 1], add_generation_prompt=False)
        end = end if turn[:end] == ids[:end] else None
    if end is None:
        named = [name for name, token in tokenizer.special_tokens.items() if token in ends]
        raise InputError(
            f"{template.name} writes no token that ends messages[{i}], the assistant's, so a model would "
            f"never learn to stop; give a template that ends it with {' or '.join(named) or 'an end token'}"
        )
    return end
