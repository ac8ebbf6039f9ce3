"""Loss masks of conversations: exactly the assistant's text and end tokens, after the prompts of generate."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.chat import (
    ChatTemplate,
    PromptDiffersError,
    TurnsDifferError,
    chat_template,
    encode_chat,
    encode_each_turn,
    encode_turns,
)
from llama_jax.errors import InputError, TokenizerError
from llama_jax.tokenizer import Tokenizer, load_tokenizer
from tests.messages import assistant, jinja, system, user


@pytest.fixture(scope="module")
def llama2(shared_data: Path) -> Tokenizer:
    return load_tokenizer(shared_data / "llama2" / "tokenizer.model")


@pytest.fixture(scope="module")
def smollm2_vocabulary(smollm2_path: Path) -> Tokenizer:
    return load_tokenizer(smollm2_path)


@pytest.fixture(params=["llama2", "smollm2"])
def model(request: pytest.FixtureRequest) -> tuple[Tokenizer, ChatTemplate]:
    name = "llama2" if request.param == "llama2" else "smollm2_vocabulary"
    tokenizer = request.getfixturevalue(name)
    return tokenizer, chat_template(tokenizer)


def masked_texts(tokenizer: Tokenizer, ids: list[int], mask: list[int]) -> list[str]:
    """The text of each run of ids in the mask."""
    runs: list[list[int]] = []
    for i, (token, in_mask) in enumerate(zip(ids, mask, strict=True)):
        if in_mask and not (i and mask[i - 1]):
            runs.append([])
        if in_mask:
            runs[-1].append(token)
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


def assert_turns(tokenizer, template, messages):
    ids, mask = encode_turns(tokenizer, template, messages)
    assert ids == encode_chat(tokenizer, template, messages, add_generation_prompt=False)
    assert len(mask) == len(ids)
    begins = [i for i in range(1, len(mask)) if mask[i] > mask[i - 1]]
    ends = [i for i in range(1, len(mask) + 1) if mask[i - 1] and not (i < len(mask) and mask[i])]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(begins) == len(ends) == len(turns)
    for begin, end, turn in zip(begins, ends, turns, strict=True):
        assert ids[:begin] == encode_chat(tokenizer, template, messages[:turn])
        assert [i for i in range(begin, end) if ids[i] in tokenizer.eos_ids] == [end - 1]
    return ids, mask


DIALOGS = [
    [user("hi"), assistant("Hello!")],
    [system("Be brief."), user("  What is the capital of France?\n"), assistant("Paris.\n")],
    [user("a"), assistant("b"), user("naïve 日本語 🙂\n\n  two  spaces"), assistant("c\0d"), user("e")],
    [user("Say </s> or <|im_end|>"), assistant("</s>, [INST] <|im_end|>\n<|im_start|>user\nhi"), user("a")],
    [user("hi"), assistant("x = 1\n\n\n    y = 2\t")],
    [user("hi"), assistant(""), user("hm"), assistant("3 + 4 = 7")],
]


@pytest.mark.parametrize("dialog", DIALOGS)
def test_ids_equal_encode_chat_and_turns_begin_after_their_prompts(model, dialog):
    assert_turns(*model, dialog)


words = st.text(st.sampled_from("ab \n'.,0é日</s>[INST]<|im_end|>"), max_size=20)


@settings(max_examples=40, deadline=None)
@given(st.lists(words, min_size=2, max_size=5))
def test_any_content(llama2, texts):
    dialog = [(user, assistant)[i % 2](text) for i, text in enumerate(texts)]
    assert_turns(llama2, chat_template(llama2), dialog)


def test_llama2_mask(llama2):
    dialog = [system("S"), user("hi"), assistant(" Hello! "), user("more"), assistant("Bye")]
    ids, mask = encode_turns(llama2, chat_template(llama2), dialog)
    assert masked_texts(llama2, ids, mask) == ["Hello! </s>", "Bye </s>"]
    assert ids[-1] == llama2.eos_id and mask[-1] == 1


def test_chatml_mask_excludes_the_header_and_the_last_newline(smollm2_vocabulary):
    tokenizer, template = smollm2_vocabulary, chat_template(smollm2_vocabulary)
    dialog = [user("hi"), assistant("Hello!"), user("more"), assistant("Bye")]
    ids, mask = encode_turns(tokenizer, template, dialog)
    assert masked_texts(tokenizer, ids, mask) == ["Hello!<|im_end|>", "Bye<|im_end|>"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\nBye<|im_end|>\n"
    )
    assert mask[-2:] == [1, 0]


def test_first_and_max_prompt(smollm2_vocabulary):
    tokenizer, template = smollm2_vocabulary, chat_template(smollm2_vocabulary)
    dialog = [user("hi"), assistant("Hello!"), user("more"), assistant("Bye")]
    ids, mask = encode_turns(tokenizer, template, dialog, first=2)
    assert masked_texts(tokenizer, ids, mask) == ["Bye<|im_end|>"]
    again, mask = encode_turns(tokenizer, template, dialog, max_prompt=mask.index(1))
    assert again == ids
    assert masked_texts(tokenizer, ids, mask) == ["Hello!<|im_end|>"]


def test_conversation_without_an_assistant_turn(smollm2_vocabulary):
    ids, mask = encode_turns(smollm2_vocabulary, chat_template(smollm2_vocabulary), [user("hi")])
    assert ids and not any(mask)


def test_custom_template_that_trims(llama2):
    zephyr = jinja(
        "{% for m in messages %}"
        "{{ '<|' + m.role + '|>\n' + m.content | trim + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        eos_token="</s>",
    )
    ids, mask = assert_turns(llama2, zephyr, [user("hi "), assistant(" Yes \n"), user("a"), assistant("No")])
    assert masked_texts(llama2, ids, mask) == ["Yes</s>", "No</s>"]


# Templates that render a turn otherwise later, or otherwise than its prompt

# Reasoning is left out of the turns before the last question, as by Qwen 3's template.
THINK = jinja(
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% set c = m.content %}"
    "{% if m.role == 'assistant' and loop.index0 < ns.last %}{% set c = c.split('</think>')[-1] %}{% endif %}"
    "{{ m.role + ':' + c + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
THOUGHTS = [user("q"), assistant("<think>x</think>a"), user("r"), assistant("<think>y</think>b")]


def test_turns_that_are_rendered_otherwise_later_are_learned_apart(smollm2_vocabulary):
    tokenizer = smollm2_vocabulary
    message = r"renders messages\[1\], or what precedes it, otherwise once other messages follow"
    with pytest.raises(TurnsDifferError, match=message):
        encode_turns(tokenizer, THINK, THOUGHTS)
    found = encode_each_turn(tokenizer, THINK, THOUGHTS)
    texts = [tokenizer.decode(ids, skip_special_tokens=False) for ids, _ in found]
    assert texts == [
        "user:q<|im_end|>assistant:<think>x</think>a<|im_end|>",
        "user:q<|im_end|>assistant:a<|im_end|>user:r<|im_end|>assistant:<think>y</think>b<|im_end|>",
    ]
    for turn, (ids, mask) in zip((1, 3), found, strict=True):
        start = mask.index(1)
        assert ids[:start] == encode_chat(tokenizer, THINK, THOUGHTS[:turn])  # the prompt of generate
        assert masked_texts(tokenizer, ids, mask) == [THOUGHTS[turn]["content"] + "<|im_end|>"]
    assert encode_each_turn(tokenizer, THINK, THOUGHTS, first=2) == found[1:]
    assert encode_turns(tokenizer, THINK, THOUGHTS, first=2) == found[1]  # the last turn is as it was
    assert encode_each_turn(tokenizer, THINK, THOUGHTS, max_prompt=6) == found[:1]
    weighed = [*THOUGHTS[:3], {**THOUGHTS[3], "weight": 0}]
    assert encode_each_turn(tokenizer, THINK, weighed) == found[:1]


def test_an_answer_that_differs_from_its_prompt_is_learned_from_there_unless_exact(smollm2_vocabulary):
    """As TRL does, with a warning."""
    tokenizer = smollm2_vocabulary
    template = jinja(
        "{% for m in messages %}{{ m.role + ':' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:<think>{% endif %}"
    )
    with pytest.raises(PromptDiffersError, match="after other text than its generation prompt"):
        encode_turns(tokenizer, template, [user("a"), assistant("b")])
    found = encode_turns(tokenizer, template, [user("a"), assistant("b"), user("c")], exact=False)
    assert masked_texts(tokenizer, *found) == ["b<|im_end|>"]
    merged = [user("a"), assistant("\n\n\nx")]
    ids, mask = encode_turns(tokenizer, chat_template(tokenizer), merged, exact=False)
    prompt = encode_chat(tokenizer, chat_template(tokenizer), merged[:1])
    assert mask.index(1) == len(prompt) - 1  # the token that both share a part of
    assert ids[: len(prompt) - 1] == prompt[:-1]


def test_a_template_that_renders_the_context_otherwise(smollm2_vocabulary):
    template = jinja(
        "{{ messages | length }}{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}:{% endif %}"
    )
    message = r"renders the messages before messages\[1\] otherwise once it follows, so it cannot be learned"
    for exact in (True, False):
        with pytest.raises(InputError, match=message):
            encode_turns(smollm2_vocabulary, template, [user("a"), assistant("b")], exact=exact)


# Rejected templates and conversations


def assert_rejected(tokenizer, template, messages, message, kind=InputError):
    with pytest.raises(kind, match=message) as raised:
        encode_turns(tokenizer, template, messages)
    assert "\n" not in str(raised.value)


def test_generation_prompt_that_is_no_prefix(smollm2_vocabulary):
    template = jinja(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: <think>' }}{% endif %}"
    )
    dialog = [user("a"), assistant("b")]
    message = r"renders messages\[1\] after other text than its generation prompt"
    assert_rejected(smollm2_vocabulary, template, dialog, message)


@pytest.mark.parametrize("ends", ["", "<|im_end|>"])
def test_template_without_an_end_token(smollm2_vocabulary, ends):
    """The end token of the next user turn must not count as the assistant's."""
    template = jinja(
        "{% for m in messages %}{{ m.role + ':\n' + m.content }}"
        f"{{% if m.role == 'user' %}}{ends}{{% endif %}}{{{{ '\n' }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
    )
    dialog = [user("a"), assistant("b"), user("c")]
    message = r"writes no end token after messages\[1\].*turns with <\|endoftext\|> or <\|im_end\|>"
    assert_rejected(smollm2_vocabulary, template, dialog, message)


def test_answer_that_merges_with_the_prompt(smollm2_vocabulary):
    tokenizer, template = smollm2_vocabulary, chat_template(smollm2_vocabulary)
    message = r"messages\[1\]: the beginning of the answer, '\\n\\n\\nx', merges into one token .*; remove"
    assert_rejected(tokenizer, template, [user("a"), assistant("\n\n\nx")], message)


def test_conversation_that_begins_with_the_assistant(smollm2_vocabulary):
    """Its first message is context; there must be an answer to something."""
    tokenizer, template = smollm2_vocabulary, chat_template(smollm2_vocabulary, "chatml")
    dialog = [assistant("a"), user("b")]
    message = r"messages\[0\] has the role assistant, and no other answer follows"
    assert_rejected(tokenizer, template, dialog, message)
    found = encode_turns(tokenizer, template, [*dialog, assistant("c")])
    assert masked_texts(tokenizer, *found) == ["c<|im_end|>"]
    assert encode_each_turn(tokenizer, template, [*dialog, assistant("c")]) == [found]


def test_errors_of_encode_chat(llama2):
    template = chat_template(llama2)
    assert_rejected(
        llama2, template, [user("a"), {"role": "asistant", "content": "b"}], "did you mean 'assis"
    )
    assert_rejected(llama2, template, [user("a"), user("b")], "refuses these messages: after an optional")
    broken = jinja("{{ messages[0].content | nothing }}")
    assert_rejected(llama2, broken, [user("a"), assistant("b")], "does not render", TokenizerError)
