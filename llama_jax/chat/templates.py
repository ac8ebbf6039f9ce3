"""Chat templates: of the tokenizer, from a file, or built in."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path

from llama_jax.errors import TokenizerError
from llama_jax.storage import as_path
from llama_jax.tokenizer import Tokenizer

# The format of Meta's code (meta-llama/llama, llama/generation.py, chat_completion): each exchange is
# enclosed in BOS and EOS, and the system prompt is part of the first user message.
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
  {{ raise_exception('the last message must be from the user') }}
{%- endif -%}
"""

# The format of Meta's code (meta-llama/llama3, llama/tokenizer.py, ChatFormat).
LLAMA3 = r"""
{{- bos_token -}}
{%- for message in messages -%}
  {{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
  {{- message.content.strip() + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif -%}
"""

# The format of Mistral 7B v0.1 and Mixtral 8x7B (mistralai/mistral-common, InstructTokenizerV1): one BOS, and
# the system prompt is part of the first user message. Later models bring templates of their own.
MISTRAL = r"""
{%- set system = '' -%}
{%- set turns = messages -%}
{%- if messages[0].role == 'system' -%}
  {%- set system = messages[0].content + '\n\n' -%}
  {%- set turns = messages[1:] -%}
{%- endif -%}
{{- bos_token -}}
{%- for message in turns -%}
  {%- if message.role != ('assistant' if loop.index0 % 2 else 'user') -%}
    {{ raise_exception('after an optional system message the roles must be user, assistant, user, ...') }}
  {%- endif -%}
  {%- if message.role == 'user' -%}
    {{ '[INST] ' + (system if loop.first else '') + message.content + ' [/INST]' }}
  {%- else -%}
    {{ ' ' + message.content.strip() + eos_token }}
  {%- endif -%}
{%- endfor -%}
"""

CHATML = r"""
{%- for message in messages -%}
  {{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{ '<|im_start|>assistant\n' }}
{%- endif -%}
"""

BUILT_IN_TEMPLATES: Mapping[str, str] = {
    "llama-2": LLAMA2,
    "llama-3": LLAMA3,
    "mistral": MISTRAL,
    "chatml": CHATML,
}
_MAX_SOURCE_BYTES = 1 << 20  # the longest templates in use have 20 kB


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A template that renders a conversation as one text.

    Attributes:
      source: Jinja source, in the dialect of Hugging Face's transformers.
      name: the template's name in error messages.
      tokens: the template variables `bos_token`, `eos_token`, `unk_token` and `pad_token`.
    """

    source: str
    name: str
    tokens: Mapping[str, str]


def chat_template(tokenizer: Tokenizer, choice: str | Path | None = None) -> ChatTemplate:
    """Returns the chat template for a tokenizer.

    Args:
      tokenizer: the tokenizer.
      choice: `llama-2`, `llama-3`, `mistral`, `chatml`, or the path of a Jinja file. None is the tokenizer's
        own template, or without one `chatml` for a vocabulary with the token `<|im_start|>`, `llama-3` for
        one with `<|start_header_id|>`, and `llama-2` for Llama 2's vocabulary.

    Raises:
      TokenizerError: if there is no template, or the file cannot be read.
    """
    names = {token: name for name, token in tokenizer.special_tokens.items()}
    ids = {f"{role}_token": getattr(tokenizer, f"{role}_id") for role in ("bos", "eos", "unk", "pad")}
    tokens = {role: names[token] for role, token in ids.items() if token in names}
    if choice is None and tokenizer.chat_template is not None:
        return _check_length(ChatTemplate(tokenizer.chat_template, "the model's chat template", tokens))
    if choice is None:
        choice = _default_template(tokenizer)
    if str(choice) in BUILT_IN_TEMPLATES:
        return ChatTemplate(BUILT_IN_TEMPLATES[str(choice)], f"the chat template {choice}", tokens)
    return _check_length(ChatTemplate(_read(choice), f"the chat template {choice}", tokens))


def _default_template(tokenizer: Tokenizer) -> str:
    if "<|im_start|>" in tokenizer.special_tokens:
        return "chatml"
    if "<|start_header_id|>" in tokenizer.special_tokens:
        return "llama-3"
    # The encoding in Llama 2's vocabulary and in those that extend it.
    if tokenizer.encode("[INST]", add_bos=False) == [518, 25580, 29962]:
        return "llama-2"
    raise TokenizerError(
        f"the model has no chat template; choose one: {', '.join(BUILT_IN_TEMPLATES)}, or a Jinja file"
    )


def _read(path: str | Path) -> str:
    try:
        with as_path(path).expanduser().open("rb") as file:
            data = file.read(_MAX_SOURCE_BYTES + 1)
        return data.decode()
    except FileNotFoundError:
        close = difflib.get_close_matches(str(path), BUILT_IN_TEMPLATES, n=1)
        names = ", ".join(BUILT_IN_TEMPLATES)
        hint = f"did you mean {close[0]}?" if close else f"give a Jinja file, or one of: {names}"
        raise TokenizerError(f"there is no chat template {str(path)!r}; {hint}") from None
    except (OSError, RuntimeError, ValueError) as error:  # unknown ~user; not UTF-8, NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise TokenizerError(
            f"the chat template {path} cannot be read ({reason}); give a Jinja file"
        ) from None


def _check_length(template: ChatTemplate) -> ChatTemplate:
    if len(template.source) > _MAX_SOURCE_BYTES:
        raise TokenizerError(
            f"{template.name} has {len(template.source)} characters; the limit is {_MAX_SOURCE_BYTES}, "
            "give a shorter one"
        )
    return template
