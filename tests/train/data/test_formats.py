"""The record formats of finetuning data, and the errors for bad records."""

from __future__ import annotations

import json
import re

import pytest

from llama_jax.errors import ConfigError, DataError
from llama_jax.train.data import DataConfig
from llama_jax.train.data.formats import Conversation, Example, PlainText, RecordFormats
from llama_jax.train.data.records import BadRecord


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


HI = [message("user", "hi"), message("assistant", "Hello!")]
ASK = [message("user", "hi")]
YES, NO = [message("assistant", "Yes")], [message("assistant", "No")]


def read(objective: str, row: dict, **settings) -> Example:
    formats = RecordFormats(objective, "text", **{"has_template": True, **settings})  # type: ignore[arg-type]
    return formats.read(formats.detect(row), row)


@pytest.mark.parametrize(
    ("row", "side"),
    [
        ({"messages": HI, "id": 3}, Conversation(HI)),
        ({"messages": [{**m, "tool_calls": None} for m in HI]}, Conversation(HI)),  # as Parquet gives them
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "Hello!"}]},
            Conversation(HI),
        ),
        ({"prompt": "2 + 2 =", "completion": " 4"}, PlainText("2 + 2 =", " 4")),
        ({"prompt": ASK, "completion": YES}, Conversation(ASK + YES, 1)),
        ({"prompt": ASK, "completion": ASK + YES}, Conversation(ASK + YES, 1)),
        ({"prompt": HI + ASK, "completion": YES}, Conversation(HI + ASK + YES, 3)),
        ({"instruction": "hi", "input": "", "output": "Hello!"}, Conversation(HI)),
        ({"instruction": "hi", "output": "Hello!"}, Conversation(HI)),
        (
            {"instruction": "Add.", "input": "1, 2", "output": "3"},
            Conversation([message("user", "Add.\n\n1, 2"), message("assistant", "3")]),
        ),
        ({"text": "A story."}, PlainText("", "A story.")),
    ],
)
def test_sft_records(row, side):
    assert read("sft", row) == Example((side,))


@pytest.mark.parametrize("given", ["", "1, 2"])
def test_alpaca_without_a_template_has_its_own_prompts(given):
    row = {"instruction": "Add.", "input": given, "output": "3"}
    (side,) = read("sft", row, has_template=False).sides
    assert isinstance(side, PlainText)
    assert side.answer == "3"
    assert side.prompt.startswith("Below is an instruction that describes a task")
    part = "\n\n### Input:\n1, 2" if given else ""
    assert side.prompt.endswith(f"\n\n### Instruction:\nAdd.{part}\n\n### Response:")


@pytest.mark.parametrize(
    ("row", "sides"),
    [
        (
            {"prompt": ASK, "chosen": YES, "rejected": NO},
            (Conversation(ASK + YES, 1), Conversation(ASK + NO, 1)),
        ),
        (
            {"chosen": ASK + YES, "rejected": ASK + NO},
            (Conversation(ASK + YES, 1), Conversation(ASK + NO, 1)),
        ),
        # UltraFeedback: the prompt as text, with whole conversations
        (
            {"prompt": "hi", "chosen": ASK + YES, "rejected": ASK + NO},
            (Conversation(ASK + YES, 1), Conversation(ASK + NO, 1)),
        ),
        ({"prompt": "Q:", "chosen": " y", "rejected": " n"}, (PlainText("Q:", " y"), PlainText("Q:", " n"))),
        (
            {"chosen": "A: B: un x", "rejected": "A: B: up"},
            (PlainText("A: B:", " un x"), PlainText("A: B:", " up")),
        ),
        # One answer continues where the other ends, or they differ within a word
        (
            {"chosen": "Q: yes", "rejected": "Q: yes sir"},
            (PlainText("Q:", " yes"), PlainText("Q:", " yes sir")),
        ),
        (
            {"chosen": "Q: yes it", "rejected": "Q: yesterday"},
            (PlainText("Q:", " yes it"), PlainText("Q:", " yesterday")),
        ),
    ],
)
@pytest.mark.parametrize("objective", ["dpo", "reward"])
def test_pairs(objective, row, sides):
    assert read(objective, row) == Example(sides)
    assert read(objective, {**row, "margin": 2}) == Example(sides, 2.0)


@pytest.mark.parametrize(
    ("label", "settings", "value"),
    [
        (0, {"labels": ("bad", "good")}, 0.0),
        (True, {"labels": ("bad", "good")}, 1.0),
        (2.0, {"labels": ("a", "b", "c")}, 2.0),
        ("good", {"labels": ("bad", "good")}, 1.0),
        (1, {"labels": ("bad", "good")}, 1.0),
    ],
)
def test_classes(label, settings, value):
    assert read("classify", {"text": "t", "label": label}, **settings) == Example(
        (PlainText("", "t"),), value
    )
    assert read("classify", {"messages": HI, "label": label}, **settings) == Example(
        (Conversation(HI),), value
    )


def test_numbers():
    assert read("regress", {"text": "t", "label": -1.5}) == Example((PlainText("", "t"),), -1.5)


# Bad records


MESSAGES = [
    ([], "no messages", "field 'messages' is empty"),
    ("hi", "no messages", "of type str, not a list"),
    ([message("User", "a"), *HI], "unknown role", r"messages\[0\]: role is 'User'; did you mean 'user'\?"),
    ([message("a b", "a"), *HI], "unknown role", r"messages\[0\]: role is 'a b'; it must be a name such as"),
    ([message("user", "a"), message("user", "b")], "no assistant turn", "no assistant turn to train on"),
    ([*HI, message("user", "a"), message("assistant", " \n")], "empty answer", "an empty assistant turn"),
    ([*HI, "a"], "malformed message", r"messages\[2\] is str; it must have a role and a content"),
    ([*HI, {"role": "user"}], "malformed message", r"messages\[2\] is \['role'\]; it must have"),
    ([*HI, {**HI[1], "weight": 2}], "malformed message", r"messages\[2\]: weight is 2; it must be 0, not"),
    ([*ASK, {**HI[1], "weight": 0}], "no assistant turn", "no assistant turn to train on: each has weight 0"),
    ([*HI, message("user", 3)], "malformed message", r"messages\[2\]: content is of type int"),  # type: ignore[arg-type]
    ([message("user", "\ud800"), *YES], "lone surrogate", r"messages\[0\]: content has a lone surrogate"),
]
PAIRS = [
    ({"chosen": "a b", "rejected": "a b"}, "identical answers", "chosen and rejected are the same"),
    ({"chosen": ASK + YES, "rejected": ASK + YES}, "identical answers", "are the same"),
    ({"prompt": "a", "chosen": "b", "rejected": YES}, "malformed message", "is text"),
    (
        {"prompt": ASK, "chosen": "b", "rejected": "c"},
        "malformed message",
        "'prompt' is a list and the answers",
    ),
    (
        {"chosen": ASK + YES, "rejected": [message("user", "ho"), *NO]},
        "prompts differ",
        "the same messages up to",
    ),
    ({"chosen": HI + ASK + YES, "rejected": HI}, "prompts differ", "the same messages up to"),
    ({"chosen": YES, "rejected": NO}, "prompts differ", "the same messages up to an assistant answer"),
    ({"chosen": "yes", "rejected": "no"}, "prompts differ", "have no common first words"),
    ({"prompt": "a", "chosen": "b", "rejected": " "}, "empty answer", "field 'rejected' is empty"),
    (
        {"prompt": ASK, "chosen": YES, "rejected": ASK},
        "no assistant turn",
        "field 'rejected' has no assistant turn",
    ),
    (
        {"chosen": "a b", "rejected": "a c", "margin": float("nan")},
        "margin is not a number",
        "margin is nan; it must",
    ),
    (
        {"chosen": "a b", "rejected": "a c", "margin": "2"},
        "margin is not a number",
        "margin is '2'; it must be a fin",
    ),
]
LABELS = [
    ("classify", 2, "label out of range", "label is 2; classes are whole numbers 0 to 1"),
    ("classify", -1, "label out of range", "label is -1; classes are"),
    ("classify", 0.5, "label out of range", r"label is 0\.5; classes are"),
    ("classify", float("nan"), "label is not a number", "label is nan"),
    ("classify", "fine", "unknown label", "label is 'fine', and data.labels has 'bad', 'good'"),
    ("classify", [1], "label is not a number", r"label is \[1\]; it must be a finite number"),
    ("regress", float("inf"), "label is not a number", "label is inf; it must be a finite number"),
    ("regress", 1e300, "label is not a number", r"label is 1e\+300"),
    ("regress", 10**400, "label is not a number", "label is 1000"),
    ("regress", "3", "label is not a number", "label is '3'"),
    ("regress", True, "label is not a number", "label is True"),
]
BAD = [
    *(("sft", {"messages": messages}, reason, said) for messages, reason, said in MESSAGES),
    ("sft", {"prompt": "a", "completion": " "}, "empty answer", "field 'completion' is empty"),
    (
        "sft",
        {"prompt": "a", "completion": YES},
        "malformed message",
        "one of 'prompt' and 'completion' is text",
    ),
    ("sft", {"prompt": 3, "completion": "b"}, "malformed message", "is text"),
    ("sft", {"prompt": "\ud800", "completion": "b"}, "lone surrogate", "field 'prompt' has a lone surrogate"),
    ("sft", {"instruction": "a", "output": ""}, "empty answer", "field 'output' is empty"),
    (
        "sft",
        {"instruction": ["a"], "output": "b"},
        "field is not text",
        "field 'instruction' is of type list",
    ),
    (
        "sft",
        {"conversations": [{"from": "bing", "value": "a"}]},
        "unknown role",
        r"conversations\[0\]: role is 'bing'",
    ),
    ("sft", {"text": " "}, "empty text", "field 'text' is empty"),
    *(("dpo", row, reason, said) for row, reason, said in PAIRS),
    *((kind, {"text": "t", "label": label}, reason, said) for kind, label, reason, said in LABELS),
    ("classify", {"messages": [], "label": 1}, "no messages", "field 'messages' is empty"),
    (
        "sft",
        {"txt": "a"},
        "unknown record format",
        "its fields are 'txt', .* for sft needs: input_ids; messages; conversations; prompt and",
    ),
    (
        "dpo",
        {"messages": HI},
        "unknown record format",
        "its fields are 'messages', and a record for dpo needs: chosen and rej",
    ),
    (
        "regress",
        {"text": "a"},
        "unknown record format",
        "needs: messages and label; conversations and label; text and label",
    ),
]


@pytest.mark.parametrize(("objective", "row", "reason", "message"), BAD)
def test_bad_records(objective, row, reason, message):
    settings = {"labels": ("bad", "good")} if objective == "classify" else {}
    with pytest.raises(BadRecord) as raised:
        read(objective, row, **settings)
    assert raised.value.reason == reason
    assert "\n" not in raised.value.message
    assert re.search(message, raised.value.message)


def test_another_format_further_down_names_the_line(opened, tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [*({"messages": HI} for _ in range(5)), {"prompt": "a", "completion": "b"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    settings = {"objective": "sft", "validation_fraction": 0, "template": "llama-2", "batch_size": 1}
    message = (
        r"a\.jsonl:6: no field 'messages' \(fields: 'prompt', 'completion'\); fix it, or set data\.bad_rec"
    )
    with pytest.raises(DataError, match=message):
        opened(str(path), **settings).describe()
    sample = opened(str(path), **settings, bad_records="skip").describe()["sample"]
    assert (sample["examples"], sample["skipped"]) == (5, {"no such field": 1})


def test_an_unknown_format_stops_the_run(opened, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"txt": "a"}\n')
    message = r"a\.jsonl:2: its fields are 'txt', and a record for sft needs: input_ids; .*; text$"
    for bad_records in ("fail", "skip"):
        with pytest.raises(DataError, match=message):
            opened(str(path), objective="sft", bad_records=bad_records)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"too_long": "cut"}, r"data\.too_long is 'cut'; .*must be one of drop, truncate, fail"),
        ({"labels": ["a"]}, r"data\.labels is \['a'\]; use a list of two or more different class names"),
        ({"labels": ["a", "a"]}, r"data\.labels is \['a', 'a'\]; use a list"),
        ({"labels": "ab"}, r"data\.labels is 'ab'; use a list"),
        ({"template": None}, r"data\.template is None; it must be a string"),
        ({"validation_files": 3}, r"data\.validation_files is 3; use a file, or a glob"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(files="a", **settings)


def test_a_classifier_without_classes(opened):
    with pytest.raises(
        ConfigError, match=r"data\.labels is empty; list the class names in it, in the order of"
    ):
        opened("a", objective="classify")
