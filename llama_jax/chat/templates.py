"""Where chat templates come from: with a vocabulary, from a file, or built in (Llama 2's, ChatML)."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path

from llama_jax.errors import TokenizerError
from llama_jax.tokenizer import Tokenizer

# The rule of Meta's code (meta-llama/llama, llama/generation.py, chat_completion): every exchange is a text
# of its own between BOS and EOS, and the system prompt is part of the first thing the user says.
LLAMA2 = r"""
{%- set system = '' -%}
{%- set turns = messages -%}
{%- if messages[0].role == 'system' -%}
  {%- set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' -%}
  {%- set turns = messages[1:] -%}
{%- endif -%}
{%- for message in turns -%}
  {%- if message.role != ('assistant' if loop.index0 % 2 else 'user') -%}
    {{ raise_exception('after an optional system message the roles must be user, assistant, user, ...') }}
  {%- endif -%}
  {%- set content = (system if loop.first else '') + message.content -%}
  {%- if message.role == 'user' -%}
    {{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
  {%- else -%}
    {{ ' ' + content.strip() + ' ' + eos_token }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and (not turns or turns[-1].role != 'user') -%}
  {{ raise_exception('the last message must be of the user, whom the assistant is to answer') }}
{%- endif -%}
"""

CHATML = r"""
{%- for message in messages -%}
  {{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{ '<|im_start|>assistant\n' }}
{%- endif -%}
"""

BUILT_IN: Mapping[str, str] = {"llama-2": LLAMA2, "chatml": CHATML}
_LONGEST_SOURCE = 1 << 20  # bytes; the longest templates in use have 20 kB


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """How a conversation becomes one text.

    Attributes:
      source: Jinja, as Hugging Face's transformers understand it.
      name: what errors call it.
      tokens: what the template knows as `bos_token`, `eos_token`, `unk_token` and `pad_token`.
    """

    source: str
    name: str
    tokens: Mapping[str, str]


def chat_template(tokenizer: Tokenizer, choice: str | Path | None = None) -> ChatTemplate:
    """Finds the template for a vocabulary.

    Args:
      tokenizer: the vocabulary.
      choice: `llama-2`, `chatml`, or the path of a file that holds one. None takes the template that came
        with the vocabulary; without one Llama 2's own vocabulary gets `llama-2`, and a vocabulary with the
        token `<|im_start|>` gets `chatml`.

    Raises:
      TokenizerError: if there is none, or the file cannot be read.
    """
    names = {token: name for name, token in tokenizer.special_tokens.items()}
    ids = {f"{role}_token": getattr(tokenizer, f"{role}_id") for role in ("bos", "eos", "unk", "pad")}
    tokens = {role: names[token] for role, token in ids.items() if token in names}
    if choice is None and tokenizer.chat_template is not None:
        return _checked(ChatTemplate(tokenizer.chat_template, "the model's chat template", tokens))
    if choice is None:
        choice = _implied(tokenizer)
    if str(choice) in BUILT_IN:
        return ChatTemplate(BUILT_IN[str(choice)], f"the chat template {choice}", tokens)
    return _checked(ChatTemplate(_read(choice), f"the chat template {choice}", tokens))


def _implied(tokenizer: Tokenizer) -> str:
    if "<|im_start|>" in tokenizer.special_tokens:
        return "chatml"
    # How Llama 2's vocabulary, and those that extend it, spell the mark.
    if tokenizer.encode("[INST]", add_bos=False) == [518, 25580, 29962]:
        return "llama-2"
    raise TokenizerError(
        f"the model came with no chat template; choose one: {', '.join(BUILT_IN)}, or a file in Jinja"
    )


def _read(path: str | Path) -> str:
    try:
        with Path(path).expanduser().open("rb") as file:
            data = file.read(_LONGEST_SOURCE + 1)
        return data.decode()
    except FileNotFoundError:
        close = difflib.get_close_matches(str(path), BUILT_IN, n=1)
        meant = f"; did you mean {close[0]}?" if close else f"; give a file, or one of: {', '.join(BUILT_IN)}"
        raise TokenizerError(f"there is no chat template {str(path)!r}{meant}") from None
    except (OSError, RuntimeError, ValueError) as error:  # the latter: no such home, not UTF-8, NUL in a name
        reason = getattr(error, "strerror", None) or error
        raise TokenizerError(
            f"the chat template {path} cannot be read ({reason}); give a text file in Jinja"
        ) from None


def _checked(template: ChatTemplate) -> ChatTemplate:
    if len(template.source) > _LONGEST_SOURCE:
        raise TokenizerError(
            f"{template.name} has {len(template.source)} characters; at most {_LONGEST_SOURCE} are read"
        )
    return template
