"""KTO's examples: labels, and each prompt with the completion of another record."""

from __future__ import annotations

import json

import numpy as np
import pytest

from llama_jax.errors import DataError
from llama_jax.train.data.examples import EncodedExample, Segment
from llama_jax.train.data.mismatched import REACH, with_mismatched
from llama_jax.train.data.records import BadRecord
from tests.train.data.test_batches import take
from tests.train.data.test_pairs import assert_same, joined

ROWS = [
    {"prompt": f"question {i // 2} ", "completion": " yes" * (1 + i % 3), "label": i % 3 == 0}
    for i in range(24)
]
ARRAYS = ("tokens", "segment_ids", "positions", "mask", "value")


@pytest.fixture
def labeled(opened, tmp_path):
    def open_(rows=ROWS, **settings):
        file = tmp_path / f"{len(rows)}.jsonl"
        if not file.exists():  # a file that changes while it is read ends the run
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        chosen = {"files": str(file), "objective": "kto", "seq_len": 128, "validation_fraction": 0.0}
        return opened(**{**chosen, **settings})

    return open_


def segment(prompt: str, completion: str) -> Segment:
    ids = [ord(c) for c in prompt + completion]
    mask = [0] * len(prompt) + [1] * len(completion)
    return Segment(np.array(ids, np.int32), np.array(mask, np.int32))


def read(records: list[tuple[str, str] | None], index: int, seq_len: int = 64) -> tuple[str, str]:
    """The mismatched segment of a record, as its prompt and its completion."""

    def own(i: int) -> EncodedExample:
        if records[i] is None:
            raise BadRecord("bad", "bad")
        return EncodedExample((segment(*records[i]),), value=1.0)

    example = with_mismatched(own(index), index, len(records), own, seq_len)
    assert example.value == 1.0 and np.array_equal(example.segments[0].ids, own(index).segments[0].ids)
    mismatched = example.segments[1]
    start = int(mismatched.mask.argmax())
    assert mismatched.mask[start:].all()
    return tuple("".join(map(chr, part)) for part in (mismatched.ids[:start], mismatched.ids[start:]))


def test_the_completion_is_that_of_the_nearest_record_before_with_another_prompt():
    records = [("a:", "one"), ("b:", "two"), ("b:", "three"), None, ("c:", "four")]
    assert read(records, 1) == ("b:", "one")
    assert read(records, 2) == ("b:", "one")
    assert read(records, 4) == ("c:", "three")
    assert read(records, 0) == ("a:", "four")  # the last is before the first
    assert read(records, 4, seq_len=10) == ("c:", "th")  # a row has room for no more of it


def test_without_another_prompt_it_is_the_nearest_completion_or_its_own():
    same = [("a:", str(i)) for i in range(10)]
    assert read(same, 5) == ("a:", "4")
    assert read([("b:", "far"), *same], REACH + 1) == ("a:", str(REACH - 1))
    assert read([("a:", "one")], 0) == ("a:", "one")


def test_batches_hold_each_example_with_its_label_beside_its_mismatched_segment(labeled):
    data = labeled()
    (part,) = data._all_parts
    known = {}
    for i in range(len(ROWS)):
        example = part.source.example(i)
        own, other = example.segments
        before = (i - 1 - i % 2) % len(ROWS)
        completion = part.source.example(before).segments[0]
        assert other.ids[other.mask > 0].tolist() == completion.ids[completion.mask > 0].tolist()
        assert other.ids[other.mask == 0].tolist() == own.ids[own.mask == 0].tolist()
        known[tuple(own.ids), tuple(other.ids)] = ROWS[i]["label"]
    assert len(known) == len(ROWS)
    seen = {}
    for batch in take(data.train(), 10):
        for tokens, ids, values in zip(batch["tokens"], batch["segment_ids"], batch["value"], strict=True):
            at = [np.flatnonzero(ids == s) for s in range(1, ids.max() + 1)]
            for own, other in zip(at[::2], at[1::2], strict=True):
                key = tuple(tokens[own]), tuple(tokens[other])
                seen[key] = bool(values[own[-1]])
                assert values[own[-1]] == values[other[-1]] and not values[own[:-1]].any()
    assert seen == known
    halves = [labeled(process_index=i, process_count=2) for i in range(2)]
    assert_same(joined([take(half.train(), 4) for half in halves], ARRAYS), take(data.train(), 4), ARRAYS)


def test_an_example_may_fill_half_of_a_row(labeled):
    long = {"prompt": "q ", "completion": " yes" * 60, "label": True}
    data = labeled([*ROWS, long], seq_len=64, bad_records="fail")
    assert data.describe()["sample"]["skipped"] == {"too long": 1}
    with pytest.raises(DataError, match=r"tokens, and train.seq_len is 64, half of which is for its prompt"):
        labeled([*ROWS, long], seq_len=64, too_long="fail").describe()
    cut = labeled([*ROWS, long], seq_len=64, too_long="truncate")
    own, other = cut._all_parts[0].source.example(len(ROWS)).segments
    assert len(own) == 32 and own.mask.any() and other.mask.any() and len(own) + len(other) <= 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 1}, "label is 1; it must be true (desirable) or false (undesirable)"),
        ({"label": "true"}, "label is 'true'; it must be true (desirable) or false (undesirable)"),
        ({"label": None}, "and a record for kto needs: prompt and completion and label"),
        ({"completion": ""}, "field 'completion' is empty"),
        ({"prompt": [{"role": "user", "content": "hi"}]}, "one of 'prompt' and 'completion' is text"),
    ],
)
def test_bad_records_are_named(labeled, change, message):
    with pytest.raises(DataError) as error:
        labeled([{**ROWS[0], **change}, *ROWS[1:]])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_columns_of_another_objective_are_refused(labeled):
    with pytest.raises(DataError, match="a record for kto needs: prompt and completion and label"):
        labeled([{"prompt": "q", "chosen": "a", "rejected": "b"}] * 4)
