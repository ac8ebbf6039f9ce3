"""Records of conversations: weights, tools, ShareGPT's names, token ids; turns as separate examples."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest

from llama_jax.chat import encode_chat, encode_each_turn
from llama_jax.errors import DataError
from llama_jax.tokenizer import load_tokenizer
from llama_jax.train.data.encode import Encoder
from llama_jax.train.data.examples import ExampleEncoder
from llama_jax.train.data.formats import Conversation, Tokens
from llama_jax.train.data.records import BadRecord
from tests.chat.test_tools import DIALOG, TOOLS, WEATHER
from tests.chat.test_turns import THINK, THOUGHTS
from tests.messages import assistant, jinja, system, user
from tests.train.data.test_batches import take
from tests.train.data.test_formats import ASK, HI, YES, read
from tests.train.data.test_packing import segments

CALL = {"name": "weather", "arguments": {"city": "Rome"}}
SHAREGPT = [
    {"from": "human", "value": "In Rome?"},
    {"from": "function_call", "value": json.dumps(CALL)},
    {"from": "observation", "value": "sun"},
    {"from": "gpt", "value": "Sunny.", "weight": 1},
]
CALLED = [
    user("In Rome?"),
    {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]},
    {"role": "tool", "content": "sun"},
    {**assistant("Sunny."), "weight": 1},
]
WITH_TOOLS = {"tools": [WEATHER]}


@pytest.mark.parametrize(
    ("row", "side"),
    [
        ({"conversations": SHAREGPT, "tools": json.dumps([WEATHER])}, Conversation(CALLED, 0, WITH_TOOLS)),
        ({"conversations": SHAREGPT, "tools": [WEATHER]}, Conversation(CALLED, 0, WITH_TOOLS)),
        ({"conversations": SHAREGPT, "tools": ""}, Conversation(CALLED)),
        ({"conversations": SHAREGPT, "system": "Be."}, Conversation([system("Be."), *CALLED])),
        ({"messages": SHAREGPT}, Conversation(CALLED)),
        ({"messages": json.dumps(HI)}, Conversation(HI)),  # a column of JSON
        ({"conversations": [{"from": "user", "value": "hi"}, HI[1]]}, Conversation(HI)),
        (
            {"conversations": [SHAREGPT[0], {"from": "function_call", "value": "f()"}]},
            Conversation([CALLED[0], assistant("f()")]),
        ),
        ({"messages": [*HI, {**HI[1], "weight": 0}]}, Conversation([*HI, {**HI[1], "weight": 0}])),
        ({"instruction": "hi", "output": "Hello!", "system": "S"}, Conversation([system("S"), *HI])),
        (
            {"prompt": ASK, "completion": YES, "tools": [WEATHER], "chat_template_kwargs": {"x": 1}},
            Conversation(ASK + YES, 1, {**WITH_TOOLS, "x": 1}),
        ),
        ({"prompt": SHAREGPT[:1], "completion": YES}, Conversation([CALLED[0], *YES], 1)),
        ({"input_ids": [5, 6, 7]}, Tokens([5, 6, 7], [0, 1, 1])),  # as TRL's, tokenized beforehand
        ({"input_ids": [5, 6, 7], "labels": [5, -100, 7]}, Tokens([5, 6, 7], [0, 0, 1])),
        ({"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]}, Tokens([5, 6, 7], [0, 1, 1])),
        (
            {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1], "assistant_masks": [1, 1, 0]},
            Tokens([5, 6, 7], [0, 1, 0]),
        ),
    ],
)
def test_records(row, side):
    assert read("sft", row).sides == (side,)


@pytest.mark.parametrize("prompt", [{}, {"prompt": ASK}, {"prompt": "hi"}])
def test_pairs_with_tools(prompt):
    pair = {"chosen": ASK + YES, "rejected": ASK + HI[1:], "tools": json.dumps([WEATHER])}
    sides = (Conversation(ASK + YES, 1, WITH_TOOLS), Conversation(HI, 1, WITH_TOOLS))
    assert read("dpo", {**prompt, **pair}).sides == sides


def test_classified_conversations_have_their_tools():
    row = {"messages": CALLED, **WITH_TOOLS, "label": 1}
    assert read("classify", row, labels=("a", "b")).sides == (Conversation(CALLED, 0, WITH_TOOLS),)


@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        ({"messages": HI, "tools": "x"}, "malformed tools", "tools is 'x', which is not JSON"),
        ({"messages": HI, "chat_template_kwargs": [1]}, "malformed tools", "is of type list; it must be an"),
        ({"messages": HI, "chat_template_kwargs": {"tokenize": 1}}, "malformed tools", "'tokenize' is not a"),
        ({"input_ids": "5 6"}, "not token ids", "field 'input_ids' must be a list of whole numbers"),
        ({"input_ids": [5], "labels": [5, 6]}, "not token ids", "'labels' has 2 entries, and input_ids 1"),
        ({"input_ids": []}, "empty text", "field 'input_ids' is empty"),
    ],
)
def test_bad_records(row, reason, message):
    with pytest.raises(BadRecord, match=message) as raised:
        read("sft", row)
    assert raised.value.reason == reason


# Each turn as an example of its own


@pytest.fixture(scope="module")
def think(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("think") / "think.jinja"
    path.write_text(THINK.source.replace("'<|im_end|>'", "eos_token"))
    return path


@pytest.fixture(scope="module")
def thoughts(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("think") / "think.jsonl"
    rows = []
    for i in range(20):
        extra = [user(f"s{i}"), assistant(f"<think>{'fox ' * (i % 8)}</think>c")]
        rows.append({"messages": [*THOUGHTS, *extra] if i % 2 else HI})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def opened_thoughts(opened, think, thoughts, **settings):
    chosen = {"objective": "sft", "template": str(think), "validation_fraction": 0, "seq_len": 96, **settings}
    return opened(thoughts, **chosen)


def test_turns_apart_are_packed_each_by_itself_and_said_once(opened, think, thoughts, tokenizer):
    data = opened_thoughts(opened, think, thoughts, shuffle=False, batch_size=1, seq_len=150)
    facts = data.describe()
    assert facts["sample"]["examples"] == 10 + 3 * 10
    (note,) = facts["notes"]
    assert note.startswith("in 10 of the first examples the chat template renders earlier turns otherwise")
    template = data._parts[0].source._encode.template
    rows = [json.loads(line)["messages"] for line in Path(thoughts).read_text().splitlines()]
    expected = {
        (tuple(ids), tuple(mask), 0.0)
        for messages in rows
        for ids, mask in encode_each_turn(tokenizer, template, messages)
    }
    with contextlib.closing(data.train()) as batches:
        assert set(segments(take(batches, 60))) == expected
    with pytest.raises(DataError, match=r"shorten it, raise train\.seq_len"):
        opened_thoughts(opened, think, thoughts, seq_len=60, too_long="fail").describe()
    few = opened_thoughts(opened, think, thoughts, seq_len=60).describe()["sample"]
    assert few["examples"] == 30  # a turn that does not fit is left out, the others are not


def test_resuming_within_a_record_of_several_turns(opened, think, thoughts):
    """Rows of 60 tokens hold one or two turns, so that a record finishes several rows."""
    settings = {"seq_len": 60, "batch_size": 2}
    straight = take(opened_thoughts(opened, think, thoughts, **settings).train(), 14)
    for stop in range(1, 12, 2):
        with contextlib.closing(opened_thoughts(opened, think, thoughts, **settings).train()) as batches:
            take(batches, stop)
            state = json.loads(json.dumps(batches.state()))
        with contextlib.closing(opened_thoughts(opened, think, thoughts, **settings).train()) as batches:
            batches.restore([state])
            again = take(batches, 14 - stop)
        for one, other in zip(straight[stop:], again, strict=True):
            np.testing.assert_array_equal(one["tokens"], other["tokens"])
            np.testing.assert_array_equal(one["mask"], other["mask"])


def encoded(tokenizer, objective, row, template, seq_len=200):
    encode = ExampleEncoder(Encoder(tokenizer), template, objective, seq_len, "drop")
    return encode(read(objective, row))


def test_pairs_of_several_turns_that_differ_are_refused_with_the_reason(smollm2_path):
    tokenizer = load_tokenizer(smollm2_path)
    last = {"chosen": THOUGHTS, "rejected": [*THOUGHTS[:3], assistant("no")]}
    chosen, _ = encoded(tokenizer, "dpo", last, THINK).segments  # only the last turn is the answer
    assert chosen.ids.tolist() == encode_chat(tokenizer, THINK, THOUGHTS, False)
    both = {"prompt": THOUGHTS[:1], "chosen": THOUGHTS[1:], "rejected": [assistant("no")]}
    with pytest.raises(BadRecord, match=r"renders messages\[1\], or what precedes it, otherwise once other"):
        encoded(tokenizer, "dpo", both, THINK)


def test_notes_on_prompts_that_differ_and_tools_that_are_left_out(smollm2_path):
    tokenizer = load_tokenizer(smollm2_path)
    template = jinja(
        "{% for m in messages %}{{ m.role + ':' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:<think>{% endif %}"
    )
    notes = encoded(tokenizer, "sft", {"messages": HI, **WITH_TOOLS}, template).notes
    assert [note.split(",")[0] for note in notes] == [
        "the chat template",
        "the chat template does not write `tools`; they are left out",
    ]
    assert encoded(tokenizer, "sft", {"messages": DIALOG, **WITH_TOOLS}, TOOLS).notes == ()
    (note,) = encoded(tokenizer, "sft", {"messages": [assistant("a"), *HI]}, TOOLS).notes
    assert note.startswith("the conversation begins with the assistant")


def test_pairs_that_differ_from_their_prompt_are_learned_from_one_token_on(smollm2_path):
    """As in TRL: from the first at which either answer differs from the prompt."""
    tokenizer = load_tokenizer(smollm2_path)
    template = jinja(
        "{% for m in messages %}{{ m.role + ':' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:<think>{% endif %}"
    )
    row = {"prompt": ASK, "chosen": [assistant("<think>a</think>b")], "rejected": [assistant("no")]}
    chosen, rejected = encoded(tokenizer, "dpo", row, template).segments
    assert chosen.mask.argmax() == rejected.mask.argmax()
    start = int(rejected.mask.argmax())
    assert chosen.ids[:start].tolist() == rejected.ids[:start].tolist()
    assert chosen.mask[start:].all() and rejected.mask[start:].all()


# Control tokens in texts


def test_control_tokens_in_texts_are_honored_or_not_and_counted(opened, tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    text = "<s>the fox</s>a dog<|endoftext|>"
    path.write_text((json.dumps({"text": text}) + "\n") * 8)
    settings = {"objective": "sft", "validation_fraction": 0, "batch_size": 1}
    ids = tokenizer.encode(text, parse_special=True)
    (found, mask, _), *_ = segments(take(opened(str(path), **settings).train(), 1))
    assert found == (*ids, tokenizer.eos_id)  # BOS once
    assert mask == (0, *[1] * len(ids))
    (plain, _, _), *_ = segments(take(opened(str(path), **settings, parse_special=False).train(), 1))
    assert plain == (*tokenizer.encode(text), tokenizer.eos_id)
    notes = opened(str(path), **settings).describe()["notes"]
    assert notes[0].startswith("the first 8 records spell <s> 8 times, </s> 8 times: they become control tok")
    assert notes[1].startswith(
        "the first 8 records spell <|endoftext|> 8 times: no control tokens of this vo"
    )
    (note, _) = opened(str(path), **settings, parse_special=False).describe()["notes"]
    assert note.endswith("data.parse_special = true makes them control tokens")
    for parse_special, expected in ((True, ids), (False, tokenizer.encode(text))):
        data = opened(str(path), validation_fraction=0, seq_len=16, parse_special=parse_special)
        first = take(data.train(), 1)[0]["tokens"][0].tolist()
        assert first == ([*expected, tokenizer.eos_id, *expected] * 2)[:16]
    fingerprints = {opened(str(path), parse_special=value).fingerprint for value in (True, False)}
    assert len(fingerprints) == 2


def test_a_text_ends_at_an_end_of_text_token(opened, vocabulary_paths, tmp_path):
    """As between the stories of one file: they do not attend to each other, in training and validation."""
    tokenizer = load_tokenizer(vocabulary_paths["json-bpe"])
    end = tokenizer.special_tokens["<|endoftext|>"]
    path = tmp_path / "a.txt"
    path.write_text("the fox<|endoftext|>a dog and a fox<|endoftext|>")
    settings = {"tokenizer": tokenizer, "validation_files": str(path), "seq_len": 16, "batch_size": 1}
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "b.txt").write_text(path.read_text())
    data = opened(str(tmp_path / "b" / "b.txt"), **settings)
    stories = [
        tokenizer.encode(f"{text}<|endoftext|>", parse_special=True)
        for text in ("the fox", "a dog and a fox")
    ]
    if tokenizer.bos_id is not None:
        stories[0].insert(0, tokenizer.bos_id)
    tokens = [token for story in stories for token in story]
    row = take(data.train(), 1)[0]
    assert row["tokens"][0].tolist() == (tokens * 3)[:16]
    new = [t == 0 or (tokens * 3)[t - 1] == end for t in range(16)]
    assert row["segment_ids"][0].tolist() == np.cumsum(new).tolist()
    assert [t for t in range(16) if row["positions"][0, t] == 0] == [t for t in range(16) if new[t]]
    (row,) = data.validation_batches()
    assert row["segment_ids"][0].tolist()[: len(tokens)] == [1] * len(stories[0]) + [2] * len(stories[1])
    assert row["bytes"] == len(path.read_text().encode())
    plain = take(opened(str(tmp_path / "b" / "b.txt"), **settings, parse_special=False).train(), 1)[0]
    assert (plain["segment_ids"] == 1).all()


def test_control_tokens_in_messages_are_text_and_counted(opened, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps({"messages": [user("</s>"), assistant("a")]}) + "\n") * 8)
    notes = opened(str(path), objective="sft", template="llama-2", validation_fraction=0).describe()["notes"]
    assert [note.partition(" spell ")[2] for note in notes] == [
        "</s> 8 times: in messages they are ordinary text"
    ]
