"""Chats with tools, contents in parts, reasoning and other fields, handed to templates as by transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from llama_jax.chat import chat_template, encode_chat, encode_turns, render_chat
from llama_jax.errors import InputError
from llama_jax.tokenizer import Tokenizer, load_tokenizer
from tests.messages import assistant, jinja, system, user

# In the manner of Hermes and Qwen.
TOOLS = jinja(
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}{{ ' (' ~ m.name ~ ')' if m.name }}\n"
    "{{ m.content }}{% for call in m.tool_calls %}<tool_call>{{ call.function.name }} "
    "{% if call.function.arguments is string %}{{ call.function.arguments }}{% else %}"
    "{{ call.function.arguments | tojson }}{% endif %}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}},
}


def call(arguments: object) -> dict:
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        ],
    }


RESULT = {"role": "tool", "tool_call_id": "1", "name": "weather", "content": "sun"}
DIALOG = [user("In Rome?"), call({"city": "Rome"}), RESULT, assistant("Sunny.")]


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Tokenizer:
    return load_tokenizer(smollm2_path)


def control_ids(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [token for token in ids if token in tokenizer.special_tokens.values()]


@pytest.mark.parametrize("tools", [[WEATHER], json.dumps([WEATHER])])
@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}'])
def test_tools_and_calls_reach_the_template(tokenizer, tools, arguments):
    dialog = [DIALOG[0], call(arguments), *DIALOG[2:]]
    text = render_chat(TOOLS, dialog, False, tools=tools)
    assert text == (
        f"<|im_start|>system\n{json.dumps(WEATHER)}\n<|im_end|>\n<|im_start|>user\nIn Rome?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>weather {"city": "Rome"}</tool_call><|im_end|>\n'
        "<|im_start|>tool (weather)\nsun<|im_end|>\n<|im_start|>assistant\nSunny.<|im_end|>\n"
    )
    ids = encode_chat(tokenizer, TOOLS, dialog, False, tools=tools)
    assert ids == tokenizer.encode(text, add_bos=False, parse_special=True)


def test_calls_and_answers_are_learned(tokenizer):
    ids, mask = encode_turns(tokenizer, TOOLS, DIALOG, tools=[WEATHER])
    learned = tokenizer.decode([t for t, m in zip(ids, mask, strict=True) if m], skip_special_tokens=False)
    assert learned == '<tool_call>weather {"city": "Rome"}</tool_call><|im_end|>Sunny.<|im_end|>'
    weighed = [*DIALOG[:3], {**DIALOG[3], "weight": 0}]
    again, mask = encode_turns(tokenizer, TOOLS, weighed, tools=[WEATHER])
    assert again == ids  # no template sees the weight
    learned = tokenizer.decode([t for t, m in zip(ids, mask, strict=True) if m], skip_special_tokens=False)
    assert learned == '<tool_call>weather {"city": "Rome"}</tool_call><|im_end|>'


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools(tools):
    assert render_chat(TOOLS, [user("a")], tools=tools) == render_chat(TOOLS, [user("a")])


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"tools": "{"}, "tools is '{', which is not JSON"),
        ({"tools": {"name": "f"}}, "it must be a list of JSON schemas, one a tool"),
        ({"tools": ["f"]}, "it must be a list of JSON schemas, one a tool"),
        ({"tools": [{"a": "\ud800"}]}, "tools[0] has a lone surrogate"),
        ({"continue_final_message": True}, "'continue_final_message' is not a variable of the chat template"),
    ],
)
def test_bad_tools(variables, message):
    with pytest.raises(InputError, match=re.escape(message)):
        render_chat(TOOLS, [user("a")], **variables)


def test_other_variables_reach_the_template():
    assert render_chat(TOOLS, [user("a")], enable_thinking=False).endswith("assistant\n<think></think>")
    template = jinja("{{ documents[0].title }} {{ bos_token }} {{ add_generation_prompt }}", bos_token="<s>")
    text = render_chat(template, [user("a")], False, documents=[{"title": "T"}], bos_token="<t>")
    assert text == "T <t> False"  # as in transformers, a variable overrides a special token


def test_a_template_without_calls_is_named(tokenizer):
    message = r"messages\[1\] has tool_calls, and the chat template chatml writes none; give a template for"
    with pytest.raises(InputError, match=message):
        encode_chat(tokenizer, chat_template(tokenizer, "chatml"), DIALOG)
    both = [user("a"), {**call({}), "content": "b"}]
    assert encode_chat(tokenizer, chat_template(tokenizer, "chatml"), both)  # as in transformers


@pytest.mark.parametrize("role", ["tool", "ipython", "function", "developer", "observer-2"])
def test_other_roles_and_fields_are_the_templates(role):
    template = jinja("{% for m in messages %}{{ m.role }}:{{ m.id }}:{{ m.content }} {% endfor %}")
    assert render_chat(template, [{"role": role, "content": "a", "id": 3}]) == f"{role}:3:a "


def test_reasoning_has_one_name():
    template = jinja("{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{% endfor %}")
    for name in ("reasoning_content", "thinking", "reasoning"):
        assert render_chat(template, [user("a"), {"role": "assistant", name: "hm"}]) == "hmhm"


# Contents in parts


PARTS = [{"type": "text", "text": "one "}, {"type": "text", "text": "two", "image": None}, " three"]
READERS = {
    "parts": "{% for p in m.content %}{{ p.text if p is mapping else p }}|{% endfor %}",
    "text": "{{ m.content + '!' }}",
    "trimmed text": "{{ m.content | trim }}!",
    "text, and nothing else": "{% if m.content is string %}{{ m.content }}!{% endif %}",
    "either": "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{{ p.text if p is mapping else p }}/{% endfor %}{% endif %}",
}
WRITTEN = {"parts": "one |two| three|", "either": "one /two/ three/"}


@pytest.mark.parametrize("reader", READERS)
def test_parts_are_joined_for_templates_that_read_texts(tokenizer, reader):
    template = jinja(f"{{% for m in messages %}}{READERS[reader]}{{% endfor %}}")
    message = {"role": "user", "content": PARTS}
    assert render_chat(template, [message]) == WRITTEN.get(reader, "one two three!")
    typed = {"role": "user", "content": [{"type": "text", "text": "<|im_end|>"}, "a"]}
    assert not control_ids(tokenizer, encode_chat(tokenizer, template, [typed]))


# Control tokens outside of contents, and in messages that a template changes


def test_control_tokens_in_tools_calls_and_names_stay_text(tokenizer):
    typed = "<|im_end|>"
    tool = {"type": "function", "function": {"name": typed, "parameters": {"properties": {typed: {}}}}}
    dialog = [{**user("a"), "name": typed}, call({typed: typed}), {**RESULT, "content": typed}]
    ids = encode_chat(tokenizer, TOOLS, dialog, tools=[tool])
    plain = encode_chat(tokenizer, TOOLS, DIALOG[:3], tools=[WEATHER])
    assert control_ids(tokenizer, ids) == control_ids(tokenizer, plain)
    assert tokenizer.decode(ids, skip_special_tokens=False) == render_chat(TOOLS, dialog, tools=[tool])
    ascii_json = jinja("{{ messages | tojson(ensure_ascii=True) }}{{ messages }}")
    ids = encode_chat(tokenizer, ascii_json, [user(typed)])
    assert not control_ids(tokenizer, ids)
    assert tokenizer.decode(ids) == render_chat(ascii_json, [user(typed)])


def test_roles_cannot_spell_a_control_token(tokenizer):
    template = jinja("{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}")
    ids = encode_chat(tokenizer, template, [{"role": "im_end", "content": "a"}])
    assert not control_ids(tokenizer, ids)
    assert tokenizer.decode(ids) == "<|im_end|>a"


CHANGES = {
    "m.content.replace('\\n', '')": "<|im_\nend|>",
    "m.content.split() | join('')": "<|im_ end|>",
    "m.content | upper | lower": "<|im_ﬆart|>",
    "m.content | reverse": ">|dne_mi|<",
    "m.content.encode('ascii', 'ignore').decode()": "<|im_end|>",
}
REPLACES = {
    "m.content | replace('<image>', '')": "<|im_<image>end|>",
    "m.content.split('</think>')[0] + m.content.split('</think>')[-1]": "<|im_</think>end|>",
    "m.content | replace('&lt;', '<') | replace('&gt;', '>')": "&lt;|im_end|&gt;",
}


@pytest.mark.parametrize("change", [*CHANGES, *REPLACES])
def test_a_template_that_changes_messages_cannot_make_control_tokens_of_them(tokenizer, change):
    """Where each character comes from is found by a second rendering, or the message is refused."""
    template = jinja(f"<|im_start|>{{% for m in messages %}}{{{{ {change} }}}}<|im_end|>{{% endfor %}}")
    messages = [user((CHANGES | REPLACES)[change])]
    plain = tokenizer.encode("<|im_start|><|im_end|>", parse_special=True)
    assert control_ids(tokenizer, encode_chat(tokenizer, template, [user("a b")])) == plain
    if change in REPLACES:
        with pytest.raises(InputError, match="changes a message so that it spells a control token, which"):
            encode_chat(tokenizer, template, messages)
        return
    ids = encode_chat(tokenizer, template, messages)
    assert control_ids(tokenizer, ids) == plain
    assert tokenizer.decode(ids, skip_special_tokens=False) == render_chat(template, messages)


def test_a_changed_message_does_not_open_other_fields_or_hide_behind_its_copy(tokenizer):
    template = jinja(
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content | replace('\n', '') }}{{ m.name }}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
    )
    typed = "<|im_\nend|>"
    for dialog in (
        [{**user("a\nb"), "name": "<|im_end|>"}, assistant("c")],
        [user(typed), assistant(typed)],
        [assistant(typed), user(typed)],
    ):
        ids = encode_chat(tokenizer, template, dialog)
        assert len(control_ids(tokenizer, ids)) == 2
        assert tokenizer.decode(ids, skip_special_tokens=False) == render_chat(template, dialog)


def test_a_template_that_cuts_messages_is_not_refused(tokenizer):
    template = jinja(
        "{% for m in messages %}<|im_start|>{% if '</think>' in m.content %}"
        "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
    )
    dialog = [system("</s>"), user("a"), assistant("<think>b <|im_end|></think>c <|im_end|>")]
    ids = encode_chat(tokenizer, template, dialog)
    assert tokenizer.decode(ids, skip_special_tokens=False) == render_chat(template, dialog)
    assert len(control_ids(tokenizer, ids)) == 6
