"""Chat encoding: the ids of reference implementations, control-token injection, template selection."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.chat import BUILT_IN_TEMPLATES, chat_template, encode_chat, render_chat
from llama_jax.errors import InputError, TokenizerError
from llama_jax.tokenizer import Tokenizer, load_tokenizer
from tests.messages import assistant, jinja, system, user
from tests.tokenizer import vocabularies

KINDS = ("sentencepiece", "llama2c", "gguf-bpe", "json-bpe", "json-llama")


@pytest.fixture(scope="module")
def llama2_path(shared_data: Path) -> Path:
    return shared_data / "llama2" / "tokenizer.model"


@pytest.fixture(scope="module")
def llama2(llama2_path: Path) -> Tokenizer:
    return load_tokenizer(llama2_path)


@pytest.fixture(scope="module")
def smollm2_vocabulary(smollm2_path: Path) -> Tokenizer:
    return load_tokenizer(smollm2_path)


@pytest.fixture(scope="module")
def by_kind(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    paths = vocabularies.write_all(tmp_path_factory.mktemp("vocabularies"))
    return {kind: load_tokenizer(paths[kind]) for kind in KINDS}


# Reference implementations


def meta_reference(path: Path, messages: list[dict[str, str]]) -> list[int]:
    """The ids of a dialog by meta-llama/llama, llama/generation.py, chat_completion."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = [message["content"] for message in messages]
    if messages[0]["role"] == "system":
        first, second, *others = texts
        texts = [f"<<SYS>>\n{first}\n<</SYS>>\n\n{second}", *others]
    ids: list[int] = []
    for question, answer in zip(texts[::2], texts[1::2], strict=False):
        exchange = f"[INST] {question.strip()} [/INST] {answer.strip()} "
        ids += [model.bos_id(), *model.encode(exchange), model.eos_id()]
    if len(texts) % 2:
        ids += [model.bos_id(), *model.encode(f"[INST] {texts[-1].strip()} [/INST]")]
    return ids


DIALOGS = [
    [user("hi")],
    [system("Be brief."), user("  What is the capital of France?\n")],
    [user("hi"), assistant(" Hello! "), user("naïve 日本語 🙂\n\n  two  spaces")],
    [system(""), user("a"), assistant("b"), user(""), assistant(""), user("\tc\0d ")],
]


@pytest.mark.parametrize("dialog", DIALOGS)
def test_llama2_equals_meta_reference(llama2, llama2_path, dialog):
    template = chat_template(llama2)
    assert encode_chat(llama2, template, dialog) == meta_reference(llama2_path, dialog)
    answered = [*dialog, assistant(" Indeed.")]
    assert encode_chat(llama2, template, answered, False) == meta_reference(llama2_path, answered)


def test_llama2_known_ids(llama2):
    ids = encode_chat(llama2, chat_template(llama2), [user("hi")])
    assert ids == [1, 518, 25580, 29962, 7251, 518, 29914, 25580, 29962]  # <s> ▁[ INST ] ▁hi ▁[ / INST ]


@pytest.mark.parametrize(
    "dialog",
    [
        [assistant("a")],
        [user("a"), user("b")],
        [user("a"), system("b"), user("c")],
        [system("a"), assistant("b")],
    ],
)
def test_llama2_rejects_other_role_orders(llama2, dialog):
    with pytest.raises(InputError, match="chat template llama-2 refuses these messages: after an optional"):
        encode_chat(llama2, chat_template(llama2), dialog)


@pytest.mark.parametrize("dialog", [[system("a")], [user("a"), assistant("b")]])
def test_llama2_requires_a_last_user_message(llama2, dialog):
    with pytest.raises(InputError, match="refuses these messages: the last message must be from the user"):
        encode_chat(llama2, chat_template(llama2), dialog)


def test_chatml(smollm2_vocabulary):
    tokenizer, template = smollm2_vocabulary, chat_template(smollm2_vocabulary, "chatml")
    ids = encode_chat(tokenizer, template, [user("Hi \n"), assistant("Yo")])
    assert ids == [
        *(1, *tokenizer.encode("user\nHi \n"), 2, *tokenizer.encode("\n")),
        *(1, *tokenizer.encode("assistant\nYo"), 2, *tokenizer.encode("\n")),
        *(1, *tokenizer.encode("assistant\n")),
    ]


def test_smollm2_template_adds_its_default_system_prompt(smollm2_vocabulary):
    template = chat_template(smollm2_vocabulary)
    assert render_chat(template, [user("Hi")]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render_chat(template, [system("S"), user("Hi")], False) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )


# Control tokens in messages

FRAGMENTS = ["<s>", "</s>", "<|im_end|>", "<|endoftext|>", "<|im_start|>", "[INST]", "[/INST]", "<<SYS>>"]
FRAGMENTS += [
    "<",
    "<|im_",
    "end|>",
    ">",
    "</",
    "s>",
    "[IN",
    "ST]",
    "|",
    "a",
    "Hello",
    "é",
    "日",
    "\0",
    " ",
    "\n",
]
CONTENTS = st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join)
MESSAGES = st.fixed_dictionaries({"role": st.sampled_from(("user", "assistant")), "content": CONTENTS})
CONVERSATIONS = st.lists(MESSAGES, min_size=1, max_size=3)
WRITTEN = "{% for m in messages %}<|im_end|>{{ bos_token }}[INST] CONTENT</s>{% endfor %}<|im_start|>"
USES = {
    "as it is": "{{ m.content }}",
    "trimmed": "{{ m.content | trim }}",
    "stripped between spaces": "{{ ' ' + m['content'].strip() + ' ' }}",
    "twice in a row": "{{ m.content ~ m.content }}",
    "in halves": "{{ m.content[:5] }}-{{ m.content[5:] }}",
    "in lower case": "{{ m.content | lower }}",
    "one after another": "{% for n in messages %}{{ n.content }}{% endfor %}",
}


def control_ids(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [token for token in ids if token in tokenizer.special_tokens.values()]


def decode_spans(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Decodes ids, each span between control tokens as a separate text."""
    names = {token: name for name, token in tokenizer.special_tokens.items()}
    text, span = "", []
    for token in [*ids, None]:
        if token is not None and token not in names:
            span.append(token)
            continue
        text += tokenizer.decode(span) + names.get(token, "")
        span = []
    return text


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_control_tokens_in_messages_stay_text(by_kind, kind, use, data):
    conversation = data.draw(CONVERSATIONS)
    tokenizer, template = by_kind[kind], jinja(WRITTEN.replace("CONTENT", USES[use]), bos_token="<s>")
    ids = encode_chat(tokenizer, template, conversation)
    plain = encode_chat(tokenizer, template, [{**message, "content": "x"} for message in conversation])
    assert control_ids(tokenizer, ids) == control_ids(tokenizer, plain)
    assert control_ids(tokenizer, ids)
    if use != "in halves":  # sentinels shift the slice
        assert decode_spans(tokenizer, ids) == render_chat(template, conversation)


def contains(ids: list[int], part: list[int]) -> bool:
    return any(ids[i : i + len(part)] == part for i in range(len(ids)))


@pytest.mark.parametrize("mark", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "</s>", "<s>"])
@pytest.mark.parametrize("text", ["{}", "a {} b", "a{}b", "{}{}", "é{}日", " {}\n", "[{}]"])
def test_llama2_markers_in_messages_get_other_ids(llama2, mark, text):
    template, typed = chat_template(llama2), text.replace("{}", mark)
    ids = encode_chat(llama2, template, [user(typed)])
    assert ids[:4] == [1, 518, 25580, 29962]
    assert ids[-4:] == [518, 29914, 25580, 29962]
    inner = ids[4:-4]
    assert not set(inner) & {1, 2}
    if mark not in llama2.special_tokens:
        for before in ("", "a"):  # with and without SentencePiece's prefix space
            assert not contains(inner, llama2.encode(before + mark, add_bos=False)[len(before) :])
    assert llama2.decode(ids) == f"[INST] {typed.strip()} [/INST]"  # no space was inserted


def test_markers_without_a_token_in_the_vocabulary(llama2):
    """ChatML's markers are guarded even in a vocabulary that encodes them as text."""
    template, typed = chat_template(llama2, "chatml"), "<|im_start|>system"
    ids = encode_chat(llama2, template, [user(typed)])
    marker_ids = llama2.encode(typed, add_bos=False)[1:]  # without the prefix space
    assert contains(encode_chat(llama2, template, [system("a")]), marker_ids)
    assert not contains(ids, marker_ids)
    assert llama2.decode(ids) == render_chat(template, [user(typed)])


def test_message_full_of_markers_takes_linear_time(llama2):
    ids = encode_chat(llama2, chat_template(llama2), [user("</s>" * 20_000)])
    assert ids.count(2) == 0
    assert llama2.decode(ids) == f"[INST] {'</s>' * 20_000} [/INST]"


@pytest.mark.parametrize("kind", KINDS)
def test_text_without_markers_is_not_split(by_kind, kind):
    tokenizer = by_kind[kind]
    template = jinja(WRITTEN.replace("CONTENT", "{{ m.content }}"), bos_token="<s>")
    for text in ("> quoted <", "a [list]", "if x < y: s>", "|", "\ue000", ""):
        rendered = render_chat(template, [user(text)])
        ids = encode_chat(tokenizer, template, [user(text)])
        assert ids == tokenizer.encode(rendered, add_bos=False, parse_special=True)


def test_bos_comes_from_the_template_and_is_never_doubled(llama2):
    assert llama2.add_bos
    assert encode_chat(llama2, jinja("a"), [user("x")]) == llama2.encode("a", add_bos=False)
    twice = encode_chat(llama2, jinja("{{ bos_token }}<s>a", bos_token="<s>"), [user("x")])
    assert twice == llama2.encode("a")
    typed = encode_chat(llama2, jinja("<s>{{ messages[0].content }}"), [user("<s>a")])
    assert typed.count(1) == 1


# Template selection


def test_tokenizer_template_takes_precedence(by_kind):
    for kind in ("gguf-bpe", "json-bpe"):
        assert chat_template(by_kind[kind]).source == vocabularies.TEMPLATE
    assert chat_template(by_kind["json-bpe"], "chatml").source == BUILT_IN_TEMPLATES["chatml"]


def test_default_templates(llama2, by_kind):
    assert chat_template(llama2).source == BUILT_IN_TEMPLATES["llama-2"]
    assert chat_template(llama2).tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    names = "llama-2, llama-3, mistral, chatml, or a Jinja file"
    with pytest.raises(TokenizerError, match=f"the model has no chat template; choose one: {names}"):
        chat_template(by_kind["sentencepiece"])


@pytest.mark.parametrize(("token", "name"), [("<|im_start|>", "chatml"), ("<|start_header_id|>", "llama-3")])
def test_the_default_for_a_token(token, name, tmp_path):
    content = vocabularies.byte_level_json()
    content["added_tokens"].append({**content["added_tokens"][0], "content": token, "id": 999})
    path = vocabularies.write_json(tmp_path / "tokenizer.json", content)
    assert chat_template(load_tokenizer(path)).source == BUILT_IN_TEMPLATES[name]


def test_chat_template_jinja_beside_a_tokenizer(tmp_path):
    vocabularies.write_json(tmp_path / "tokenizer.json", vocabularies.byte_level_json())
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    tokenizer = load_tokenizer(tmp_path)
    assert encode_chat(tokenizer, chat_template(tokenizer), [user("a")]) == tokenizer.encode("a!")


def test_a_file(tmp_path, llama2):
    path = tmp_path / "short.jinja"
    path.write_text("{{ messages[-1].content }}{{ eos_token }}\n")
    assert encode_chat(llama2, chat_template(llama2, path), [user("a")]) == [*llama2.encode("a")[1:], 2]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("chatlm", "there is no chat template 'chatlm'; did you mean chatml?"),
        (
            "nowhere.jinja",
            "there is no chat template 'nowhere.jinja'; give a Jinja file, or one of: llama-2, llama-3, mis",
        ),
        ("{folder}", "cannot be read (Is a directory)"),
        ("{folder}/latin1", "cannot be read ('utf-8' codec"),
        ("{folder}/long", "has 1048577 characters; the limit is 1048576"),
        ("a\0b", "null"),
    ],
)
def test_unreadable_files(tmp_path, llama2, choice, message):
    (tmp_path / "latin1").write_bytes(b"\xe9")
    (tmp_path / "long").write_text("a" * (1 << 21))
    with pytest.raises(TokenizerError, match=re.escape(message)):
        chat_template(llama2, choice.format(folder=tmp_path))


# Messages


def nested(depth: int) -> list:
    return [nested(depth - 1)] if depth else []


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "there are no messages; give a list of"),
        ("hi", "there are no messages; give a list of"),
        (user("hi"), "there are no messages; give a list of"),
        (["hi"], "messages[0] is str; it must have a role and a content"),
        ([user("a"), {"role": "user"}], "messages[1] is ['role']; it must have a role and a content"),
        ([{"role": "user", "content": None}], "messages[0] is ['role']; it must have a role and a content"),
        ([{**user("a"), "weight": 0.5}], "messages[0]: weight is 0.5; it must be 0, not trained on, or 1"),
        ([{**user("a"), "tool_calls": {}}], "messages[0]: tool_calls is of type dict; it must be a list"),
        (
            [user("a"), {"role": "Assistent", "content": "a"}],
            "messages[1]: role is 'Assistent'; did you mean 'assistant'?",
        ),
        ([{"role": "User", "content": "a"}], "messages[0]: role is 'User'; did you mean 'user'?"),
        ([{"role": ["user"], "content": "a"}], "messages[0]: role is \"['user']\"; it must be a name such"),
        ([{"role": "a|>", "content": "a"}], "messages[0]: role is 'a|>'; it must be a name such as system, "),
        ([user("a"), user(b"a")], "messages[1]: content is of type bytes; it must be a str, or a list of"),
        (
            [{"role": "user", "content": ["a", {"type": "image_url", "image_url": "b"}]}],
            "messages[0]: content[1] is of type 'image_url', and the model reads text only",
        ),
        ([{"role": "user", "content": [3]}], "messages[0]: content[0] is of type 'int', and the model"),
        ([{**user("a"), "x": nested(70)}], "messages[0]: x is nested more than 64 deep; simplify it"),
        ([{**user("a"), "x": ["\ud800"]}], "messages[0]: x has a lone surrogate"),
        (
            [user("a"), user("ab\ud800c")],
            r"messages[1]: content has a lone surrogate, '\ud800', at character 2",
        ),
    ],
)
def test_bad_messages(llama2, messages, message):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        encode_chat(llama2, chat_template(llama2), messages)
    assert "\n" not in str(error.value)


def test_nul_is_ordinary_text(llama2):
    ids = encode_chat(llama2, chat_template(llama2), [user("a\0b")])
    assert llama2.decode(ids) == "[INST] a\0b [/INST]"


def test_control_token_of_one_character(tmp_path):
    content = vocabularies.byte_level_json()
    content["added_tokens"].append({**content["added_tokens"][0], "content": "日", "id": 999})
    tokenizer = load_tokenizer(vocabularies.write_json(tmp_path / "tokenizer.json", content))
    template = jinja("日{{ messages[0].content }}")
    assert encode_chat(tokenizer, template, [user("a")]) == [
        tokenizer.special_tokens["日"],
        *tokenizer.encode("a"),
    ]
    with pytest.raises(
        InputError, match="a message contains '日', which is a control token of this vocabulary; remove it"
    ):
        encode_chat(tokenizer, template, [user("b日")])


def test_template_that_renders_nothing(llama2):
    with pytest.raises(InputError, match="renders these messages as an empty text"):
        encode_chat(llama2, jinja("{# nothing #}"), [user("a")])


def test_lone_surrogate_in_the_rendered_text(llama2):
    with pytest.raises(TokenizerError, match="lone surrogate"):
        encode_chat(llama2, jinja(r"{{ '\ud800' }}"), [user("a")])


def test_messages_that_leave_no_private_use_character(by_kind: dict[str, Tokenizer]) -> None:
    ranges = ((0xE000, 0xF8FF), (0xF0000, 0xFFFFD), (0x100000, 0x10FFFD))
    text = "".join(chr(code) for first, last in ranges for code in range(first, last + 1))
    tokenizer = by_kind["sentencepiece"]
    template = chat_template(tokenizer, "chatml")
    with pytest.raises(InputError, match="hold every private-use character; leave some out"):
        encode_chat(tokenizer, template, [user(text)])
