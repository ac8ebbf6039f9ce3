"""Training data against Hugging Face, live: files of every form, and the first batches of every objective.

Each variant is files, an objective and settings. The reference makes examples of the same records plainly,
with transformers' tokenizer and `apply_chat_template`, and TRL's functions for forms of records; and packs
them by the rules in docs/training.md. Tokens, segment ids, positions, masks and values of the first batches
must be equal.

`python -m tests.parity.test_training_data` writes the list of variants into docs/finetuning.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_jax.tokenizer import load_tokenizer
from llama_jax.train.data import DataConfig, open_data
from llama_jax.train.data.packing import OPEN_BINS
from tests.tokenizer import make_golden, vocabularies

transformers = pytest.importorskip("transformers", reason="needs the `parity` extra")
trl = pytest.importorskip("trl", reason="needs the `parity` extra")

pytestmark = pytest.mark.parity

BATCHES = 4
Row = dict[str, Any]
Segment = tuple[list[int], list[int]]  # ids and mask
Example = tuple[list[Segment], float]  # the segments that stay in one row, and the value

# Records


def words(seed: int, count: int) -> str:
    vocabulary = "the cat sat on a mat, then it ran in Rome at 12:30 é"
    drawn = random.Random(seed).choices(vocabulary.split(), k=count)
    return " ".join(drawn)


def say(role: str, content: Any, **fields: Any) -> Row:
    return {"role": role, "content": content, **fields}


def user(i: int, **fields: Any) -> Row:
    return say("user", f"{words(i, 5)}?", **fields)


def assistant(i: int, **fields: Any) -> Row:
    return say("assistant", words(100 + i, 3 + i % 9), **fields)


COUNT = 40
TEXTS = [words(i, 4 + 7 * (i % 6)) for i in range(COUNT)]
PLAIN = [{"prompt": f"{words(i, 6)} =", "completion": f" {words(-i, 2 + i % 5)}"} for i in range(COUNT)]
CHATS = [
    {"messages": [user(i), assistant(i), user(i + 1), assistant(i + 1)][: 2 + 2 * (i % 2)]}
    for i in range(COUNT)
]
WITH_SYSTEM = [{"messages": [say("system", words(i, 3)), *row["messages"]]} for i, row in enumerate(CHATS)]
ALPACA = [
    {"instruction": words(i, 5), "input": words(i, 3) if i % 2 else "", "output": words(-i, 4)}
    for i in range(COUNT)
]
NAMES = {"user": "human", "assistant": "gpt"}
SHAREGPT = [
    {"conversations": [{"from": NAMES[m["role"]], "value": m["content"]} for m in row["messages"]]}
    for row in CHATS
]
FROM_VALUE = [
    {"conversations": [{"from": m["role"], "value": m["content"]} for m in row["messages"]]} for row in CHATS
]
TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "Looks <b>it</b> up.", "parameters": {"type": "object"}},
}


def called(i: int, arguments: Any) -> list[Row]:
    call = {"id": str(i), "type": "function", "function": {"name": "look", "arguments": arguments}}
    result = say("tool", words(i, 3), tool_call_id=str(i), name="look")
    return [user(i), say("assistant", None, tool_calls=[call]), result, assistant(i)]


TOOLS = [{"messages": called(i, {"what": words(i, 2), "n": i}), "tools": [TOOL]} for i in range(COUNT)]
TOOL_TEXTS = [
    {"messages": called(i, json.dumps({"what": words(i, 2)})), "tools": json.dumps([TOOL])}
    for i in range(COUNT)
]
WEIGHTS = [
    {"messages": [user(i), assistant(i, weight=0), user(2), assistant(i + 3, weight=1)]} for i in range(COUNT)
]
PARTS = [
    {
        "messages": [
            say("user", [{"type": "text", "text": f"{words(i, 3)} "}, {"type": "text", "text": "?"}]),
            assistant(i),
        ]
    }
    for i in range(COUNT)
]
THOUGHTS = [
    {
        "messages": [
            user(i),
            say("assistant", f"<think>\n{words(i, 4)}\n</think>\n\n{words(i, 2)}"),
            user(i + 1),
            assistant(i),
        ]
    }
    for i in range(COUNT)
]
REASONING = [
    {"messages": [user(i), say("assistant", words(i, 2), reasoning_content=words(i, 5))]}
    for i in range(COUNT)
]
TURNS = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in CHATS]
PAIRS = [
    {
        "prompt": f"{words(i, 5)}:",
        "chosen": f" {words(-i, 2 + i % 4)} yes",
        "rejected": f" {words(i + 9, 3)} no",
    }
    for i in range(COUNT)
]
IMPLICIT = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in PAIRS]
CHAT_PAIRS = [
    {"prompt": [user(i)], "chosen": [assistant(i)], "rejected": [assistant(i + 1)]} for i in range(COUNT)
]
CHAT_IMPLICIT = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in CHAT_PAIRS]
ULTRAFEEDBACK = [{"prompt": row["chosen"][0]["content"], **row} for row in CHAT_IMPLICIT]
MARGINS = [{**row, "margin": i / 2} for i, row in enumerate(CHAT_PAIRS)]
TOOL_PAIRS = [
    {
        "prompt": called(i, {"n": i})[:3],
        "chosen": [assistant(i)],
        "rejected": [assistant(i + 1)],
        "tools": [TOOL],
    }
    for i in range(COUNT)
]
CLASSES = [{"text": text, "label": ("bad", "good")[i % 2]} for i, text in enumerate(TEXTS)]
CHAT_CLASSES = [{**row, "label": i % 2} for i, row in enumerate(CHATS)]
NUMBERS = [{"text": text, "label": i / 4 - 3} for i, text in enumerate(TEXTS)]
RENDERED = [
    "<|im_start|>user\n" + words(i, 4) + "<|im_end|>\n<|im_start|>assistant\n" + words(-i, 4) + "<|im_end|>"
    for i in range(COUNT)
]
SEPARATED = [f"{text}<|endoftext|>{text}" for text in TEXTS]
BEGUN = [f"<s>{text}</s>" for text in TEXTS]


def texts(values: Iterable[str], name: str = "text") -> list[Row]:
    return [{name: value} for value in values]


# Files


def jsonl(folder: Path, rows: list[Row]) -> str:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "*.jsonl")


def json_array(folder: Path, rows: list[Row]) -> str:
    (folder / "a.json").write_text(json.dumps(rows, indent=1))
    return str(folder / "a.json")


def parquet(folder: Path, rows: list[Row]) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    return str(folder / "a.parquet")


def text_documents(folder: Path, rows: list[Row]) -> str:
    for i, row in enumerate(rows):
        (folder / f"{i:03}.txt").write_text(row["text"])
    return str(folder / "*.txt")


def text_lines(folder: Path, rows: list[Row]) -> str:
    """One file, which is one document; its rows are joined by line ends."""
    (folder / "a.txt").write_text("\n".join(row["text"] for row in rows) + "\n")
    return str(folder / "a.txt")


# References: transformers' tokenizer and templates


@dataclasses.dataclass(frozen=True)
class Peer:
    """transformers' tokenizer, and the chat template as Jinja."""

    tokenizer: Any
    template: str | None
    parse_special: bool = True

    @property
    def eos(self) -> int:
        return self.tokenizer.eos_token_id

    def ids(self, text: str, **settings: Any) -> list[int]:
        return self.tokenizer(text, split_special_tokens=not self.parse_special, **settings)["input_ids"]

    def chat(self, messages: list[Row], **settings: Any) -> list[int]:
        messages = [{name: value for name, value in m.items() if name != "weight"} for m in messages]
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, return_dict=False, **settings
        )

    def turns(self, messages: list[Row], first: int = 0, **settings: Any) -> Segment:
        """A conversation, and its assistant's turns from their prompts to their end tokens."""
        ids = self.chat(messages, **settings)
        mask = [0] * len(ids)
        for i in range(first, len(messages)):
            if messages[i]["role"] == "assistant" and messages[i].get("weight") != 0:
                prompt = self.chat(messages[:i], add_generation_prompt=True, **settings)
                start = trl.data_utils.common_prefix_length(prompt, ids)
                assert start >= len(prompt) - 1
                end = ids.index(self.eos, start) + 1
                mask[start:end] = [1] * (end - start)
        return ids, mask

    def plain(self, prompt: str, answer: str) -> Segment:
        """As TRL: the prompt, and the answer with EOS. The token ids of one begin those of both here."""
        start, ids = len(before := self.ids(prompt)), self.ids(prompt + answer)
        assert ids[:start] == before
        ids += [self.eos] * (ids[-1] != self.eos)
        return ids, [int(t >= max(start, 1)) for t in range(len(ids))]


def sft_texts(peer: Peer, row: Row) -> Iterator[Example]:
    yield [peer.plain("", row["text"])], 0.0


def sft_plain(peer: Peer, row: Row) -> Iterator[Example]:
    yield [peer.plain(row["prompt"], row["completion"])], 0.0


def sft_chat(peer: Peer, row: Row) -> Iterator[Example]:
    yield [peer.turns(row["messages"])], 0.0


def sft_from_value(peer: Peer, row: Row) -> Iterator[Example]:
    yield from sft_chat(peer, trl.data_utils.maybe_convert_to_chatml(json.loads(json.dumps(row))))


def sft_sharegpt(peer: Peer, row: Row) -> Iterator[Example]:
    roles = {name: role for role, name in NAMES.items()}
    yield [peer.turns([say(roles[m["from"]], m["value"]) for m in row["conversations"]])], 0.0


def sft_tools(peer: Peer, row: Row) -> Iterator[Example]:
    tools = json.loads(row["tools"]) if isinstance(row["tools"], str) else row["tools"]
    yield [peer.turns(row["messages"], tools=tools)], 0.0


def sft_joined(peer: Peer, row: Row) -> Iterator[Example]:
    messages = [
        {
            **m,
            "content": "".join(p["text"] for p in m["content"])
            if isinstance(m["content"], list)
            else m["content"],
        }
        for m in row["messages"]
    ]
    yield [peer.turns(messages)], 0.0


def sft_turns(peer: Peer, row: Row) -> Iterator[Example]:
    messages, settings = row["prompt"] + row["completion"], row.get("chat_template_kwargs", {})
    yield [peer.turns(messages, len(row["prompt"]), **settings)], 0.0


def sft_apart(peer: Peer, row: Row) -> Iterator[Example]:
    """Each answer at the end of what it was an answer to, where the whole renders it otherwise."""
    messages, tools = row["messages"], row.get("tools")
    cut = peer.chat(messages[:2], tools=tools)
    assert peer.chat(messages, tools=tools)[: len(cut)] != cut
    for i in (1, 3):
        yield [peer.turns(messages[: i + 1], i, tools=tools)], 0.0


def sft_alpaca(peer: Peer, row: Row) -> Iterator[Example]:
    content = row["instruction"] + (f"\n\n{row['input']}" if row["input"] else "")
    yield [peer.turns([say("user", content), say("assistant", row["output"])])], 0.0


def sft_alpaca_text(peer: Peer, row: Row) -> Iterator[Example]:
    """Stanford Alpaca's own prompts."""
    given = f"\n\n### Input:\n{row['input']}" if row["input"] else ""
    more = ", paired with an input that provides further context" if given else ""
    prompt = (
        f"Below is an instruction that describes a task{more}. Write a response that appropriately completes "
        f"the request.\n\n### Instruction:\n{row['instruction']}{given}\n\n### Response:"
    )
    yield [peer.plain(prompt, row["output"])], 0.0


def sft_tokens(peer: Peer, row: Row) -> Iterator[Example]:
    mask = [int(label != -100) for label in row["labels"]]
    yield [(row["input_ids"], mask)], 0.0


def pairs(peer: Peer, row: Row) -> Iterator[Example]:
    row = {
        "value": row.get("margin", 0.0),
        "tools": row.get("tools"),
        **trl.data_utils.maybe_extract_prompt(row),
    }
    if trl.data_utils.is_conversational({"prompt": row["prompt"]}):
        first = len(row["prompt"])
        both = [
            peer.turns(row["prompt"] + row[name], first, tools=row["tools"])
            for name in ("chosen", "rejected")
        ]
    else:
        prompt, rest = row["prompt"], ""
        if not row["chosen"][:1] == row["rejected"][:1] == " ":  # TRL splits within a word
            prompt = prompt.rpartition(" ")[0]
            rest = row["prompt"][len(prompt) :]
        both = [peer.plain(prompt, rest + row[name]) for name in ("chosen", "rejected")]
    yield both, row["value"]


def labeled(peer: Peer, row: Row) -> Iterator[Example]:
    """An example beside its prompt with the completion of the record before it, as TRL mismatches them."""
    (ids, mask), (other_ids, other_mask) = (
        peer.plain(one["prompt"], one["completion"])
        if isinstance(one["prompt"], str)
        else peer.turns(one["prompt"] + one["completion"], len(one["prompt"]))
        for one in (row, row["before"])
    )
    prompt, start = mask.index(1), other_mask.index(1)
    mismatched = ids[:prompt] + other_ids[start:], mask[:prompt] + other_mask[start:]
    yield [(ids, mask), mismatched], float(row["label"])


def classified(peer: Peer, row: Row) -> Iterator[Example]:
    ids = peer.chat(row["messages"]) if "messages" in row else peer.ids(row["text"])
    label = row["label"]
    yield (
        [(ids, [0] * (len(ids) - 1) + [1])],
        ("bad", "good").index(label) if isinstance(label, str) else label,
    )


# References: packing


def packed(examples: Iterable[Example], seq_len: int) -> Iterator[dict[str, np.ndarray]]:
    """Best fit into eight open rows; the fullest is finished when an example fits into none."""
    rows: list[list[Example]] = []

    def room(row: list[Example]) -> int:
        return seq_len - sum(len(ids) for segments, _ in row for ids, _ in segments)

    for example in examples:
        size = sum(len(ids) for ids, _ in example[0])
        fitting = [row for row in rows if room(row) >= size]
        finished = None
        if not fitting:
            if len(rows) == OPEN_BINS:
                finished = rows.pop(rows.index(min(rows, key=room)))
            rows.append([])
            fitting = rows[-1:]
        best = min(fitting, key=room)
        best.append(example)
        if finished is None and not room(best):
            finished = rows.pop(next(i for i, row in enumerate(rows) if row is best))
        if finished is not None:
            yield laid_out(finished, seq_len)


def laid_out(row: list[Example], seq_len: int) -> dict[str, np.ndarray]:
    columns: dict[str, list[Any]] = {n: [] for n in ("tokens", "segment_ids", "positions", "mask", "value")}
    segments = [(ids, mask, value) for parts, value in row for ids, mask in parts]
    for number, (ids, mask, value) in enumerate(segments, 1):
        columns["tokens"] += ids
        columns["segment_ids"] += [number] * len(ids)
        columns["positions"] += range(len(ids))
        columns["mask"] += mask
        columns["value"] += [0.0] * (len(ids) - 1) + [value]
    return {name: np.array(column + [0] * (seq_len - len(column))) for name, column in columns.items()}


def joined(
    documents: Iterable[list[int]], seq_len: int, separator: int | None
) -> Iterator[dict[str, np.ndarray]]:
    """Documents one after the other, cut into rows; segments and positions begin anew in each row.

    `separator` ends a document within a document.
    """
    tokens = (
        (token, (number, ids[:t].count(separator)))
        for number, ids in enumerate(documents)
        for t, token in enumerate(ids)
    )
    while row := list(itertools.islice(tokens, seq_len)):
        numbers = [number for _, number in row]
        starts = [numbers.index(number) for number in numbers]
        yield {
            "tokens": np.array([token for token, _ in row]),
            "segment_ids": np.cumsum([t == start for t, start in enumerate(starts)]),
            "positions": np.arange(len(row)) - starts,
        }


# Variants


def with_labels(rows: list[Row]) -> list[Row]:
    """Records with labels, each with the one before it, which the reference reads."""
    return [
        {**row, "label": i % 3 > 0, "before": {name: rows[i - 1][name] for name in ("prompt", "completion")}}
        for i, row in enumerate(rows)
    ]


Read = Callable[[Peer, Row], Iterator[Example]]


@dataclasses.dataclass(frozen=True)
class Variant:
    """Files of records, an objective with settings, and how the reference reads a record.

    `template` is one of `TEMPLATES`; `vocabulary` has a BOS token or not.
    """

    objective: str
    rows: list[Row]
    read: Read | None = None
    write: Callable[[Path, list[Row]], str] = jsonl
    template: str | None = "smollm2"
    vocabulary: str = "smollm2"
    seq_len: int = 128
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "qwen2_5": (TRL_TEMPLATES / "qwen2_5.jinja").read_text,
    "qwen3": (TRL_TEMPLATES / "qwen3.jinja").read_text,
    "parts": lambda: CHATML.replace(
        "m.content",
        "(m.content if m.content is string else m.content | map(attribute='text') | join)",
    ),
    "named": lambda: CHATML.replace("m.role", "m.role + (' ' + m.name if m.name else '')"),
}
PRETRAIN = {
    "text files": Variant("pretrain", texts(TEXTS), write=text_documents),
    "one text file": Variant("pretrain", texts(TEXTS), write=text_lines),
    "JSONL": Variant("pretrain", texts(TEXTS)),
    "a JSON array": Variant("pretrain", texts(TEXTS), write=json_array),
    "Parquet": Variant("pretrain", texts(TEXTS), write=parquet),
    "another field": Variant("pretrain", texts(TEXTS, "story"), settings={"field": "story"}),
    "a vocabulary with BOS": Variant("pretrain", texts(TEXTS), vocabulary="bos"),
    "stories with end-of-text tokens between them": Variant("pretrain", texts(SEPARATED)),
    "the same, `parse_special = false`": Variant(
        "pretrain", texts(SEPARATED), settings={"parse_special": False}
    ),
    "texts with their own BOS and EOS": Variant("pretrain", texts(BEGUN), vocabulary="bos"),
}
SFT = {
    "`text`": Variant("sft", texts(TEXTS), sft_texts),
    "`text`, with BOS": Variant("sft", texts(TEXTS), sft_texts, vocabulary="bos"),
    "`text` rendered beforehand": Variant("sft", texts(RENDERED), sft_texts),
    "the same, `parse_special = false`": Variant(
        "sft", texts(RENDERED), sft_texts, settings={"parse_special": False}
    ),
    "`prompt` and `completion`": Variant("sft", PLAIN, sft_plain),
    "the same, with BOS": Variant("sft", PLAIN, sft_plain, vocabulary="bos"),
    "`prompt` and `completion` in Parquet": Variant("sft", PLAIN, sft_plain, write=parquet),
    "`prompt` and `completion` as messages": Variant("sft", TURNS, sft_turns),
    "`chat_template_kwargs`": Variant(
        "sft",
        [{**row, "chat_template_kwargs": {"enable_thinking": False}} for row in TURNS[::2]],
        sft_turns,
        template="qwen3",
    ),
    "Alpaca": Variant("sft", ALPACA, sft_alpaca),
    "Alpaca without a template": Variant("sft", ALPACA, sft_alpaca_text, vocabulary="bos", seq_len=512),
    "`messages`": Variant("sft", CHATS, sft_chat),
    "`messages` with a system prompt": Variant("sft", WITH_SYSTEM, sft_chat),
    "`messages` in a JSON array": Variant("sft", CHATS, sft_chat, write=json_array),
    "`messages` in Parquet": Variant("sft", CHATS, sft_chat, write=parquet),
    "`conversations` of ShareGPT": Variant("sft", SHAREGPT, sft_sharegpt),
    "`from` and `value`, TRL's": Variant("sft", FROM_VALUE, sft_from_value),
    "tools and calls": Variant("sft", TOOLS, sft_tools, template="qwen2_5", seq_len=384),
    "tools and calls in Parquet": Variant(
        "sft", TOOLS, sft_tools, template="qwen2_5", seq_len=384, write=parquet
    ),
    "tools and arguments as JSON text": Variant(
        "sft", TOOL_TEXTS, sft_tools, template="qwen2_5", seq_len=384
    ),
    "`weight`": Variant("sft", WEIGHTS, sft_chat),
    "`name`": Variant(
        "sft",
        [{"messages": [user(i, name="ann"), assistant(i)]} for i in range(COUNT)],
        sft_chat,
        template="named",
    ),
    "a `name` that is ignored": Variant(
        "sft", [{"messages": [user(i, name="ann"), assistant(i)]} for i in range(COUNT)], sft_chat
    ),
    "contents in parts": Variant("sft", PARTS, sft_chat, template="parts"),
    "parts for a template of texts": Variant("sft", PARTS, sft_joined),
    "calls that are rendered otherwise later": Variant(
        "sft", TOOLS, sft_apart, template="qwen3", seq_len=384
    ),
    "reasoning in earlier turns": Variant("sft", THOUGHTS, sft_apart, template="qwen3"),
    "`reasoning_content`": Variant("sft", REASONING, sft_chat, template="qwen3"),
    "`input_ids` and `labels`": Variant(
        "sft",
        [
            {"input_ids": [*range(9, 14 + i)], "labels": [-100, -100, *range(11, 14 + i)]}
            for i in range(COUNT)
        ],
        sft_tokens,
    ),
    "examples longer than a row dropped": Variant("sft", CHATS, sft_chat, seq_len=72),
    "examples longer than a row truncated": Variant(
        "sft", PLAIN, sft_plain, seq_len=18, settings={"too_long": "truncate"}
    ),
}
PREFERENCES = {
    "`prompt`, `chosen`, `rejected`": Variant("dpo", PAIRS, pairs),
    "the same, with BOS": Variant("dpo", PAIRS, pairs, vocabulary="bos"),
    "texts that share their prompt": Variant("dpo", IMPLICIT, pairs),
    "messages": Variant("dpo", CHAT_PAIRS, pairs),
    "messages that share their prompt": Variant("dpo", CHAT_IMPLICIT, pairs),
    "the same beside the prompt as text": Variant("dpo", ULTRAFEEDBACK, pairs),
    "messages in Parquet": Variant("dpo", CHAT_PAIRS, pairs, write=parquet),
    "tools": Variant("dpo", TOOL_PAIRS, pairs, template="qwen3", seq_len=512),
    "`margin`": Variant("reward", MARGINS, pairs),
    "texts": Variant("reward", PAIRS, pairs),
    "messages that share their prompt, for a reward": Variant("reward", CHAT_IMPLICIT, pairs),
}
LABELS = {
    "`prompt`, `completion` and `label`": Variant("kto", with_labels(PLAIN), labeled, seq_len=256),
    "the same, with BOS": Variant("kto", with_labels(PLAIN), labeled, vocabulary="bos", seq_len=256),
    "messages": Variant("kto", with_labels(TURNS), labeled, seq_len=256),
    "messages in Parquet": Variant("kto", with_labels(TURNS), labeled, seq_len=256, write=parquet),
}
HEADS = {
    "`text` with a label's name": Variant(
        "classify", CLASSES, classified, settings={"labels": ("bad", "good")}
    ),
    "`text`, with BOS": Variant(
        "classify", CLASSES, classified, vocabulary="bos", settings={"labels": ("bad", "good")}
    ),
    "`messages` with a label's number": Variant(
        "classify", CHAT_CLASSES, classified, settings={"labels": ("bad", "good")}
    ),
    "`text` with a number": Variant("regress", NUMBERS, classified),
    "`text` with a number in Parquet": Variant("regress", NUMBERS, classified, write=parquet),
}
GROUPS = {
    "`pretrain`": PRETRAIN,
    "`sft`": SFT,
    "`dpo`, `reward`": PREFERENCES,
    "`kto`": LABELS,
    "`classify`, `regress`": HEADS,
}
VARIANTS = {f"{group}: {name}": v for group, found in GROUPS.items() for name, v in found.items()}


@pytest.fixture(scope="module")
def peers(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """A directory that transformers wrote, and its tokenizer, for each vocabulary."""
    path = tmp_path_factory.mktemp("vocabularies")
    content = vocabularies.llama_json(vocabularies.write_all(path)["sentencepiece"].read_bytes())
    bos = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(vocabularies.write_json(path / "llama.json", content)),
        bos_token="<s>",
        eos_token="</s>",
    )
    found = {}
    for name, tokenizer in (("smollm2", make_golden.hugging_face(smollm2_path)), ("bos", bos)):
        tokenizer.save_pretrained(path / name)
        found[name] = path / name, tokenizer
    return found


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_first_batches(variant: Variant, peers: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    folder, tokenizer = peers[variant.vocabulary]
    settings = {"validation_fraction": 0.0, "shuffle": False, **variant.settings}
    template = None
    if variant.template in TEMPLATES:
        template = TEMPLATES[variant.template]()
        (tmp_path / "template.jinja").write_text(template)
        settings["template"] = str(tmp_path / "template.jinja")
    (tmp_path / "data").mkdir()
    data = open_data(
        DataConfig(files=variant.write(tmp_path / "data", variant.rows), **settings),
        load_tokenizer(folder),
        objective=variant.objective,  # type: ignore[arg-type]
        seq_len=variant.seq_len,
        batch_size=1,
        seed=0,
    )
    peer = Peer(tokenizer, template, settings.get("parse_special", True))
    with contextlib.closing(data.train()) as batches:
        for expected, found in zip(reference(variant, peer), batches, strict=False):
            for name, column in expected.items():
                np.testing.assert_array_equal(found[name][0], column, err_msg=name)
            assert {*expected} == {*found}


def reference(variant: Variant, peer: Peer) -> Iterator[dict[str, np.ndarray]]:
    """The rows of the first batches."""
    rows = itertools.cycle(variant.rows)
    if variant.read is None:
        if variant.write is text_lines:
            rows = itertools.repeat({"text": "\n".join(row["text"] for row in variant.rows) + "\n"})
        begin, end = [peer.tokenizer.bos_token_id], [peer.eos]
        ids = (peer.ids(next(iter(row.values())), add_special_tokens=False) for row in rows)
        documents = ([*begin * (one[:1] != begin), *one, *end * (one[-1:] != end)] for one in ids)
        separator = peer.tokenizer.get_vocab().get("<|endoftext|>")
        return itertools.islice(joined(documents, variant.seq_len, separator), BATCHES)
    examples = (example for row in rows for example in variant.read(peer, row))
    return itertools.islice(packed(fitted(variant, examples), variant.seq_len), BATCHES)


def fitted(variant: Variant, examples: Iterator[Example]) -> Iterator[Example]:
    """Drops or truncates the examples that are longer than a row."""
    for segments, value in examples:
        if sum(len(ids) for ids, _ in segments) <= variant.seq_len:
            yield segments, value
        elif variant.settings.get("too_long") == "truncate":
            ((ids, mask),) = segments
            if any(mask[: variant.seq_len]):
                yield [(ids[: variant.seq_len], mask[: variant.seq_len])], value


DOCS = Path(__file__).parents[2] / "docs" / "finetuning.md"
HEADING = "| objective | forms whose first batches equal the reference's |\n|---|---|\n"


def table() -> str:
    return HEADING + "".join(f"| {group} | {'; '.join(found)} |\n" for group, found in GROUPS.items())


def test_the_guide_lists_the_variants() -> None:
    assert len(VARIANTS) >= 50
    assert table() in DOCS.read_text()


if __name__ == "__main__":
    before, _, after = DOCS.read_text().partition(HEADING)
    _, _, after = after.partition("\n\n")
    DOCS.write_text(f"{before}{table()}\n{after}")
