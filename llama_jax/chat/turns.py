"""Encodes a whole conversation as token ids with a loss mask over the assistant's turns.

No template syntax is interpreted: a turn begins after the prompt that `encode_chat` gives for it, and ends
with the first end token after that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_jax.chat.encode import encode_chat, render_chat
from llama_jax.chat.messages import Messages, content_text, validate_messages, validate_variables
from llama_jax.chat.templates import ChatTemplate
from llama_jax.errors import InputError
from llama_jax.tokenizer import Tokenizer

Encoded = tuple[list[int], list[int]]


class TurnsDifferError(InputError):
    """A template renders a turn otherwise once other messages follow it."""


class PromptDiffersError(InputError):
    """A turn does not begin with the prompt that `encode_chat` gives for it."""


def encode_turns(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Messages,
    *,
    first: int = 0,
    max_prompt: int | None = None,
    exact: bool = True,
    **variables: Any,
) -> Encoded:
    """Encodes a conversation for training: its ids, and a loss mask over the assistant's turns.

        ids = encode_chat(messages, add_generation_prompt=False)
        prompt_i = encode_chat(messages[:i], add_generation_prompt=True) is a prefix of ids, and
        mask = 1 from len(prompt_i) to the end token of turn i, inclusive, for each assistant's turn i

    So a model is trained on exactly the prompts of `generate`, and to stop. The headers that the template
    writes before a turn, its text after the end token, and its default system prompt are masked out; so are
    turns whose `weight` is 0, and an answer that is the first message.

    Args:
      tokenizer: the tokenizer.
      template: from `chat_template`.
      messages: as for `encode_chat`.
      first: only turns from messages[first] on are in the mask.
      max_prompt: turns whose prompt has at least this many ids are left out of the mask; None is no limit.
        Saves time on truncated conversations, since the prompt of each turn is encoded separately.
      exact: whether a turn must begin with its prompt. If not, one that does not is in the mask from the
        first token that differs, as in TRL.
      **variables: the template's other variables, as for `encode_chat`.

    Returns:
      (ids, mask), lists of int of the same length; mask is all 0 if no turn is the assistant's.

    Raises:
      InputError: for malformed messages, or messages that the template refuses; if the only answer is the
        first message; and if a turn has no end token.
      PromptDiffersError: if a turn does not begin with its prompt, and `exact`.
      TurnsDifferError: if the template renders a turn, or what precedes it, otherwise once others follow, as
        those of reasoning models do. `encode_each_turn` has no such limit.
      TokenizerError: for a template that does not render, or exceeds the limits on time or memory.
    """
    checked, variables = validate_messages(messages), validate_variables(variables)
    ids = encode_chat(tokenizer, template, checked, add_generation_prompt=False, **variables)
    mask = [0] * len(ids)
    for i in _learned(checked, first):
        turn, start, end = _turn(tokenizer, template, checked, i, variables, exact=exact, whole=ids)
        if max_prompt is not None and start >= max_prompt:
            break
        if turn[:end] != ids[:end]:
            raise TurnsDifferError(
                f"{template.name} renders messages[{i}], or what precedes it, otherwise once other messages "
                "follow, so it cannot be learned within the whole conversation; end the conversation there, "
                "or give another template"
            )
        mask[start:end] = [1] * (end - start)
    return ids, mask


def encode_each_turn(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Messages,
    *,
    first: int = 0,
    max_prompt: int | None = None,
    exact: bool = True,
    **variables: Any,
) -> list[Encoded]:
    """Encodes each of the assistant's turns with the messages before it, as `encode_turns` does the last.

    The context of a turn is rendered as when it was generated: without what the template writes only once
    other messages follow.

    Returns:
      (ids, mask) of each turn; of one at least, if there are any, even with a prompt of `max_prompt` ids.

    Raises:
      As `encode_turns`, without TurnsDifferError.
    """
    checked, variables = validate_messages(messages), validate_variables(variables)
    sequences: list[Encoded] = []
    for i in _learned(checked, first):
        turn, start, end = _turn(tokenizer, template, checked, i, variables, exact=exact)
        if sequences and max_prompt is not None and start >= max_prompt:
            break
        sequences.append((turn, [int(start <= t < end) for t in range(len(turn))]))
    return sequences


def _learned(messages: Sequence[dict[str, Any]], first: int) -> list[int]:
    """Returns the indices of the assistant's turns that are trained on; the first message has no prompt.

    Raises:
      InputError: if that is the only one.
    """
    turns = [i for i, message in enumerate(messages) if i >= first and message["role"] == "assistant"]
    learned = [i for i in turns if messages[i].get("weight", 1)]
    if learned == [0]:
        raise InputError(
            "messages[0] has the role assistant, and no other answer follows; begin with a message of "
            "another role"
        )
    return [i for i in learned if i]


def _turn(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: list[dict[str, Any]],
    i: int,
    variables: dict[str, Any],
    *,
    exact: bool,
    whole: list[int] | None = None,
) -> tuple[list[int], int, int]:
    """Returns the ids of a conversation up to turn `i`, and where that turn begins and ends in them.

    `whole` are the ids of all messages, if they are known.
    """
    prompt = encode_chat(tokenizer, template, messages[:i], **variables)
    if whole is not None and i + 1 == len(messages):
        ids = whole
    else:
        ids = encode_chat(tokenizer, template, messages[: i + 1], add_generation_prompt=False, **variables)
    start = next((t for t, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
    start = min(start, len(ids))
    if start < len(prompt):
        _check_prompt(template, messages, i, variables, exact)
    eos_ids = frozenset(tokenizer.eos_ids)
    end = next((t + 1 for t in range(start, len(ids)) if ids[t] in eos_ids), None)
    if end is None:
        names = [name for name, token in tokenizer.special_tokens.items() if token in eos_ids]
        raise InputError(
            f"{template.name} writes no end token after messages[{i}], so a model would never learn to stop; "
            f"give a template that ends the assistant's turns with {' or '.join(names) or 'an end token'}"
        )
    return ids, start, end


def _check_prompt(
    template: ChatTemplate,
    messages: list[dict[str, Any]],
    i: int,
    variables: dict[str, Any],
    exact: bool,
) -> None:
    """Raises the error for a turn that does not begin with its prompt, if it must, or more differs."""
    turn = render_chat(template, messages[: i + 1], add_generation_prompt=False, **variables)
    if not turn.startswith(render_chat(template, messages[:i], add_generation_prompt=False, **variables)):
        raise InputError(
            f"{template.name} renders the messages before messages[{i}] otherwise once it follows, so it "
            "cannot be learned; give another template"
        )
    if not exact:
        return
    if turn.startswith(render_chat(template, messages[:i], **variables)):
        raise PromptDiffersError(
            f"messages[{i}]: the beginning of the answer, {content_text(messages[i])[:8]!r}, merges into one "
            "token with the end of the prompt; remove its leading whitespace, or give a template whose "
            "prompts do not end with whitespace"
        )
    raise PromptDiffersError(
        f"{template.name} renders messages[{i}] after other text than its generation prompt, so the prompts "
        "of training and generation would differ; give another template"
    )
