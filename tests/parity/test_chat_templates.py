"""Chat templates against Hugging Face's transformers, live: the text that they render, and its ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llama_jax.chat import BUILT_IN_TEMPLATES, ChatTemplate, chat_template, encode_chat, render_chat
from llama_jax.errors import LlamaJaxError
from llama_jax.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer import corpus, make_golden

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers", reason="needs the `parity` extra")
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def conversations(lines: list[str], count: int) -> list[list[dict[str, str]]]:
    """Conversations of every length up to five messages, with and without a system prompt."""
    found = []
    for i in range(count):
        roles = ["system"] * (i % 2) + ["user", "assistant", "user", "assistant", "user"][: 1 + i % 5]
        texts = lines[7 * i : 7 * i + len(roles)]
        found.append([{"role": r, "content": text} for r, text in zip(roles, texts, strict=True)])
    return found


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return [line for line in corpus.lines() if "<|" not in line]


@pytest.fixture(scope="module")
def ours(smollm2_path: Path) -> Tokenizer:
    return load_tokenizer(smollm2_path)


@pytest.fixture(scope="module")
def theirs(smollm2_path: Path) -> Any:
    return make_golden.hugging_face(smollm2_path)


@pytest.mark.parametrize("choice", [None, "chatml"])
def test_smollm2s_ids(ours: Tokenizer, theirs: Any, lines: list[str], choice: str | None) -> None:
    template = chat_template(ours, choice)
    for conversation in conversations(lines, 300):
        for prompt in (True, False):
            wanted = theirs.apply_chat_template(
                conversation,
                chat_template=template.source,
                add_generation_prompt=prompt,
                return_dict=False,
            )
            assert encode_chat(ours, template, conversation, prompt) == wanted, conversation


SOURCES = {
    **BUILT_IN_TEMPLATES,
    "blocks and blanks": (
        "{% if messages %}\n  {% for m in messages %}\n    {{- m.role }}:\n    {{ m['content'] | trim }}\n"
        "    {%- if not loop.last %} | {% endif %}\n  {% endfor %}\n{% endif %}\n\n"
    ),
    "namespaces and breaks": (
        "{% set found = namespace(text='', count=0) %}{% for m in messages[::-1] %}"
        "{% set found.count = found.count + 1 %}{% if m.role == 'user' %}{% set found.text = m.content %}"
        "{% break %}{% endif %}{% endfor %}{{ found.count }}{{ found.text }}{{ found.nothing }}"
    ),
    "json": (
        "{{ messages | tojson }}{{ messages | tojson(indent=2) }}"
        "{{ {'é': '<&>', 'a': 1} | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}"
    ),
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
        "{% endgeneration %}{% else %}{{ bos_token + m.content }}{% endif %}\n{% endfor %}"
    ),
    "strings": (
        "{% for m in messages %}{{ m.content.split('e')[0] }}{{ m.content.replace('a', '') | upper }}"
        "{{ '%-9s|' | format(m.role) }}{{ m.content[:3] }}{{ m.content | length }}{% endfor %}"
    ),
    "no such filter": "{{ messages | map('attempt') | list }}",
    "macros": (
        "{% macro say(m, mark='*') %}{{ mark }}{{ m.content }}{% endmacro %}"
        "{% for m in messages %}{{ say(m) }}{{ say(m, mark='-') }}{% endfor %}"
    ),
    "what is defined": (
        "{{ tools is defined }}{{ tools is none }}{{ documents is none }}{{ pad_token is defined }}"
        "{{ pad_token }}{{ bos_token }}{{ add_generation_prompt }}{{ messages[0].name is defined }}"
    ),
    "refusing": "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x",
    "undefined": "{{ pad_token + 'x' }}",
    "unsafe": "{{ messages.append(1) }}",
    "syntax": "{% for %}",
}


def dialogs() -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Conversations with tools, calls, reasoning and names, and the template's other variables."""
    parameters = {"type": "object", "properties": {"city": {"type": "string", "description": "é <b>"}}}
    function = {"name": "weather", "description": "Tells it.", "parameters": parameters}
    tools = [{"type": "function", "function": function}]
    user = {"role": "user", "content": "In Rome?"}
    answer = {"role": "assistant", "content": "Sunny."}
    found: list[tuple[list[dict[str, Any]], dict[str, Any]]] = []
    for arguments in ({"city": "Rome", "days": 2}, '{"city": "Rome"}'):
        call = {
            "id": "abcdef123",
            "type": "function",
            "function": {"name": "weather", "arguments": arguments},
        }
        calls = {"role": "assistant", "content": None, "tool_calls": [call]}
        result = {"role": "tool", "tool_call_id": "abcdef123", "name": "weather", "content": "sun"}
        found += [
            ([user, calls, result], {"tools": tools}),
            ([user, calls, result, answer], {"tools": tools}),
        ]
        found += [([user, {**calls, "content": "Let me see."}, result, answer, user], {})]
    thought = {**answer, "reasoning_content": "It is May."}
    found += [([user, thought, user], {}), ([user, {**answer, "thinking": "Hm."}], {})]
    found += [([user, {**answer, "content": "<think>\nHm.\n</think>\n\nSun."}, user, answer], {})]
    found += [([{**user, "name": "ann"}, answer, user], {"enable_thinking": False})]
    found += [
        ([user], {"documents": [{"title": "T", "text": "t"}]}),
        ([{"role": "developer", "content": "d"}], {}),
    ]
    return found


def test_published_templates() -> None:
    """Those that TRL comes with, of many models: the same text, or an error here as there."""
    trl = pytest.importorskip("trl")
    render = transformers.utils.chat_template_utils.render_jinja_template
    rendered = 0
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja")):
        if "training" in path.name:
            continue
        template = ChatTemplate(path.read_text(), path.name, TOKENS)
        for messages, variables in dialogs():
            present = [{name: value for name, value in m.items() if value is not None} for m in messages]
            try:
                (wanted,), _ = render(
                    [present],
                    chat_template=template.source,
                    add_generation_prompt=True,
                    **TOKENS,
                    **variables,
                )
            except Exception:
                with pytest.raises(LlamaJaxError):
                    render_chat(template, messages, **variables)
            else:
                assert render_chat(template, messages, **variables) == wanted, path.name
                rendered += 1
    assert rendered > 300


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_texts(source: str, lines: list[str]) -> None:
    render = transformers.utils.chat_template_utils.render_jinja_template
    template = ChatTemplate(source, "the template", TOKENS)
    for conversation in conversations(lines, 25):
        for prompt in (True, False):
            try:
                (wanted,), _ = render(
                    [conversation], chat_template=source, add_generation_prompt=prompt, **TOKENS
                )
            except Exception:
                with pytest.raises(LlamaJaxError):
                    render_chat(template, conversation, prompt)
            else:
                assert render_chat(template, conversation, prompt) == wanted
