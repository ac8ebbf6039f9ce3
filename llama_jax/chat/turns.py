"""Encodes a whole conversation as token ids with a loss mask over the assistant's turns.

No template syntax is interpreted: a turn begins after the prompt that `encode_chat` gives for it, and ends
with the first end token after that.
"""

from __future__ import annotations

from llama_jax.chat.encode import Messages, encode_chat, render_chat, validate_messages
from llama_jax.chat.templates import ChatTemplate
from llama_jax.errors import InputError
from llama_jax.tokenizer import Tokenizer


def encode_turns(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Messages,
    *,
    first: int = 0,
    max_prompt: int | None = None,
) -> tuple[list[int], list[int]]:
    """Encodes a conversation for training: its ids, and a loss mask over the assistant's turns.

        ids = encode_chat(messages, add_generation_prompt=False)
        prompt_i = encode_chat(messages[:i], add_generation_prompt=True) is a prefix of ids, and
        mask = 1 from len(prompt_i) to the end token of turn i, inclusive, for each assistant's turn i

    So a model is trained on exactly the prompts of `generate`, and to stop. The headers that the template
    writes before a turn, its text after the end token, and its default system prompt are masked out.

    Args:
      tokenizer: the tokenizer.
      template: from `chat_template`.
      messages: each with a role (system, user or assistant) and a content.
      first: only turns from messages[first] on are in the mask.
      max_prompt: turns whose prompt has at least this many ids are left out of the mask; None is no limit.
        Saves time on truncated conversations, since the prompt of each turn is encoded separately.

    Returns:
      (ids, mask), lists of int of the same length; mask is all 0 if no turn is the assistant's.

    Raises:
      InputError: for malformed messages, or messages that the template refuses; for a conversation that
        begins with the assistant; and if a prompt is not a prefix of the ids, or a turn has no end token.
      TokenizerError: for a template that does not render, or exceeds the limits on time or memory.
    """
    messages = validate_messages(messages)
    ids = encode_chat(tokenizer, template, messages, add_generation_prompt=False)
    mask = [0] * len(ids)
    for i in range(first, len(messages)):
        if messages[i]["role"] != "assistant":
            continue
        start = _turn_start(tokenizer, template, messages, i, ids)
        if max_prompt is not None and start >= max_prompt:
            break
        end = _turn_end(tokenizer, template, messages, i, ids, start)
        mask[start:end] = [1] * (end - start)
    return ids, mask


def _turn_start(
    tokenizer: Tokenizer, template: ChatTemplate, messages: list[dict[str, str]], i: int, ids: list[int]
) -> int:
    """Returns the length of the prompt of turn `i`, which is a prefix of `ids`."""
    if not i:
        raise InputError("messages[0] has the role assistant; a conversation must begin with another role")
    prompt = encode_chat(tokenizer, template, messages[:i])
    if ids[: len(prompt)] == prompt:
        return len(prompt)
    rendered = render_chat(template, messages, add_generation_prompt=False)
    if rendered.startswith(render_chat(template, messages[:i])):
        raise InputError(
            f"messages[{i}]: the beginning of the answer, {messages[i]['content'][:8]!r}, merges into one "
            "token with the end of the prompt; remove its leading whitespace, or give a template whose "
            "prompts do not end with whitespace"
        )
    raise InputError(
        f"{template.name} renders messages[{i}] after other text than its generation prompt, so the prompts "
        "of training and generation would differ; give another template"
    )


def _turn_end(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: list[dict[str, str]],
    i: int,
    ids: list[int],
    start: int,
) -> int:
    """Returns the end of turn `i` in `ids`, after its end token."""
    eos_ids = frozenset(tokenizer.eos_ids)
    end = next((j + 1 for j in range(start, len(ids)) if ids[j] in eos_ids), None)
    if end is not None and i + 1 < len(messages):  # the end token may belong to a later message
        turn = encode_chat(tokenizer, template, messages[: i + 1], add_generation_prompt=False)
        end = end if turn[:end] == ids[:end] else None
    if end is None:
        names = [name for name, token in tokenizer.special_tokens.items() if token in eos_ids]
        raise InputError(
            f"{template.name} writes no end token after messages[{i}], so a model would never learn to stop; "
            f"give a template that ends the assistant's turns with {' or '.join(names) or 'an end token'}"
        )
    return end
