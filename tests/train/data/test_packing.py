"""Finetuning batches: whole examples, each once per epoch, independent of the number of processes."""

from __future__ import annotations

import csv
import itertools
import json
import time
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.errors import ConfigError, DataError
from llama_jax.train.data import SourceConfig
from llama_jax.train.data.packing import OPEN_BINS, Bins
from llama_jax.train.prepare import command
from tests.train.data.conftest import prepared, write_dataset
from tests.train.data.test_batches import take

NAMES = {"tokens", "segment_ids", "positions", "mask", "value"}
OBJECTIVES = {"sft": "sft", "chat": "sft", "dpo": "dpo", "regress": "regress"}
KINDS = tuple(OBJECTIVES)


def conversation(random: Random, i: int) -> list[dict[str, str]]:
    turns = random.choice((1, 1, 2))
    return [
        {"role": role, "content": f"{role} {i} {t} " + "fox " * random.choice((0, 3, 9))}
        for t in range(turns)
        for role in ("user", "assistant")
    ]


def records(kind: str, count: int = 40) -> list[dict]:
    random = Random(kind)
    rows = []
    for i in range(count):
        messages = conversation(random, i)
        said = " ".join(message["content"] for message in messages)
        row = {
            "sft": {"prompt": messages[0]["content"], "completion": f" {said}"},
            "chat": {"messages": messages},
            "dpo": {"prompt": f"ask {i}", "chosen": f" {said}", "rejected": f" no {i}", "margin": i + 1},
            "regress": {"text": said, "label": i + 1},
        }[kind]
        rows.append(row)
    return rows


def write(path, rows):
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(
            pa.Table.from_pylist([{"id": i, **row} for i, row in enumerate(rows)]), path, row_group_size=7
        )
    elif path.suffix == ".arrow":
        write_dataset(path, [{"id": i, **row} for i, row in enumerate(rows)])
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([list(rows[0]), *(row.values() for row in rows)])
    elif path.suffix == ".arrayrecord":
        from array_record.python import array_record_module

        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for row in rows:
            writer.write(json.dumps(row).encode())
        writer.close()
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    return {
        (kind, suffix): write(folder / f"{kind}.{suffix}", records(kind))
        for kind in KINDS
        for suffix in ("jsonl", "parquet", "arrayrecord", "arrow", "csv")
    }


@pytest.fixture
def finetuning_data(opened, files):
    """Opens a finetuning run's data over one of `files`."""

    def open_(kind="sft", suffix="jsonl", **settings):
        defaults = {"template": "llama-2", "seq_len": 256, "objective": OBJECTIVES[kind]}
        chosen = settings.pop("files", files[kind, suffix])
        return opened(chosen, **{**defaults, **settings})

    return open_


def assert_same(first, second):
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert set(one) == set(other) == NAMES
        for name in NAMES:
            np.testing.assert_array_equal(one[name], other[name])


def joined(parts):
    return [
        {name: np.concatenate([part[name] for part in step]) for name in NAMES}
        for step in zip(*parts, strict=True)
    ]


def segments(batches):
    """(ids, mask, value of the last token) of every segment, by row."""
    for batch in batches:
        for row in range(len(batch["tokens"])):
            tokens, numbers, mask, value = (
                batch[name][row] for name in ("tokens", "segment_ids", "mask", "value")
            )
            for number in range(1, int(numbers.max()) + 1):
                at = np.flatnonzero(numbers == number)
                assert (value[at[:-1]] == 0).all()
                yield tuple(tokens[at].tolist()), tuple(mask[at].tolist()), float(value[at[-1]])


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_whole_segments_then_padding(finetuning_data, kind):
    for batch in take(finetuning_data(kind).train(), 10):
        assert set(batch) == NAMES
        for name in NAMES:
            assert batch[name].shape == (4, 256)
            assert batch[name].dtype == (np.float32 if name == "value" else np.int32)
        for tokens, numbers, positions, mask, value in zip(
            *(batch[name] for name in ("tokens", "segment_ids", "positions", "mask", "value")), strict=True
        ):
            length = int((numbers > 0).sum())
            begins = np.diff(numbers[:length], prepend=0)
            assert set(begins) <= {0, 1} and begins[0] == 1
            np.testing.assert_array_equal(begins == 1, positions[:length] == 0)
            assert (np.diff(positions[:length])[begins[1:] == 0] == 1).all()
            assert not any(x[length:].any() for x in (tokens, numbers, positions, mask, value))
            assert set(mask.tolist()) <= {0, 1}
            assert not mask[:length][begins == 1].any() or kind == "regress"


def key(unit):
    return tuple((*s.ids.tolist(), *s.mask.tolist(), unit.value) for s in unit.segments)


@pytest.mark.parametrize("kind", KINDS)
def test_each_epoch_has_every_example_once_and_uncut(finetuning_data, kind):
    """Counts finished and open rows; both segments of a pair are adjacent, the chosen one first."""
    data = finetuning_data(kind, batch_size=1, validation_fraction=0)
    known = {key(unit): i for i, unit in enumerate(map(data._parts[0].source.example, range(40)))}
    assert len(known) == 40
    batches = data.train()
    per = 2 if kind == "dpo" else 1
    done = [((*ids, *mask, value),) for ids, mask, value in segments(take(batches, 12))]
    done = [sum(pair, ()) for pair in zip(*[iter(done)] * per, strict=True)]
    (lane,) = batches.state()["lanes"].values()
    order = data._mixture(0).orders[0]
    waiting = [key(order[number]) for row in lane["open"] for _, number in row]
    counts = np.bincount([known[unit] for unit in [*done, *waiting]], minlength=40)
    (taken,) = lane["parent_state"]["taken"]
    assert counts.sum() == taken > 40
    assert set(counts.tolist()) <= {taken // 40, -(-taken // 40)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_format_gives_the_same_batches(finetuning_data, kind):
    lines, *others = (
        take(finetuning_data(kind, suffix, shuffle=False, validation_fraction=0).train(), 4)
        for suffix in ("jsonl", "parquet", "arrayrecord", "arrow", "csv")
        if (kind, suffix) != ("chat", "csv")  # a field of CSV is text
    )
    for other in others:
        assert_same(other, lines)


@pytest.mark.parametrize("count", [2, 4])
def test_the_global_batches_are_the_same_for_any_number_of_processes(finetuning_data, count):
    whole = take(finetuning_data("dpo").train(), 6)
    parts = [
        take(finetuning_data("dpo", process_index=i, process_count=count).train(), 6) for i in range(count)
    ]
    assert_same(joined(parts), whole)


@pytest.mark.parametrize(("stop", "before", "after"), [(0, 1, 4), (1, 1, 1), (1, 2, 1), (5, 1, 4), (5, 2, 1)])
def test_resuming_is_exact_on_any_number_of_processes(finetuning_data, stop, before, after):
    def runs(count):
        return [finetuning_data(process_index=i, process_count=count).train() for i in range(count)]

    uninterrupted = take(finetuning_data().train(), stop + 4)
    first = runs(before)
    for run in first:
        take(run, stop)
    time.sleep(0.02)  # prefetching continues, and must not affect the state
    states = json.loads(json.dumps([run.state() for run in first]))
    second = runs(after)
    for run in second:
        run.restore(states)
    assert_same(joined([take(run, 4) for run in second]), uninterrupted[stop:])


@pytest.mark.slow
def test_the_batches_are_the_same_with_worker_processes(finetuning_data):
    """A worker renders templates in its own process; of several, see test_batches.py."""
    inside, batches = finetuning_data("chat").train(), finetuning_data("chat", workers=1).train()
    try:
        take(inside, 1)
        batches.restore([json.loads(json.dumps(inside.state()))])
        assert_same(take(batches, 4), take(inside, 4))
        assert batches.state() == inside.state()
    finally:
        batches.close()


def test_sources_are_mixed_by_their_tokens(finetuning_data, files):
    mixture = (SourceConfig(files["sft", "jsonl"], weight=3), SourceConfig(files["sft", "parquet"]))
    batches = finetuning_data(files="", mixture=mixture, batch_size=2).train()
    take(batches, 30)
    for lane in batches.state()["lanes"].values():
        one, other = lane["parent_state"]["drawn"]
        assert one / other == pytest.approx(3, rel=0.1)


# Validation set


@pytest.mark.parametrize("kind", KINDS)
def test_every_validation_example_appears_once_and_is_never_trained_on(finetuning_data, kind):
    data = finetuning_data(kind, validation_fraction=0.3, batch_size=2)
    part = data._parts[0]
    validation = [part.source.example(i) for i in part.validation_index.tolist()]
    assert len(validation) > 5
    batches = list(data.validation_batches())
    sizes = [batch.pop("bytes") for batch in batches]
    expected = sorted(tuple(s.ids.tolist()) for unit in validation for s in unit.segments)
    assert sorted(ids for ids, _, _ in segments(batches)) == expected
    decode = data._encode.tokenizer.decode
    assert sum(sizes) == sum(
        len(decode(s.ids[s.mask > 0]).encode()) for unit in validation for s in unit.segments
    )
    assert_same(
        batches,
        [
            {n: b[n] for n in NAMES}
            for b in finetuning_data(kind, validation_fraction=0.3, batch_size=2).validation_batches()
        ],
    )
    trained = {ids for ids, _, _ in segments(take(data.train(), 10))}
    assert not trained & set(expected)


def test_validation_does_not_depend_on_the_number_of_processes(finetuning_data):
    settings = {"validation_fraction": 0.4, "seq_len": 64, "too_long": "truncate"}
    whole = list(finetuning_data(**settings).validation_batches())
    parts = [
        list(finetuning_data(**settings, process_index=i, process_count=2).validation_batches())
        for i in range(2)
    ]
    assert [b["bytes"] for b in whole] == [b["bytes"] for b in parts[1]]
    assert_same(joined(parts), [{name: batch[name] for name in NAMES} for batch in whole])


@pytest.mark.parametrize("objective", ["sft", "pretrain"])
def test_validation_files(finetuning_data, opened, files, tmp_path, corpora, objective):
    if objective == "sft":
        test = write(tmp_path / "test.jsonl", records("sft")[:5])
        data = finetuning_data(validation_files=test)
    else:
        test = write(tmp_path / "test.jsonl", [{"text": f"text {i}"} for i in range(5)])
        data = opened(corpora["jsonl"], validation_files=test)
    described = data.describe()
    assert described["validation_documents"] == 5
    assert not len(data._parts[0].validation_index)
    rows = [row for batch in data.validation_batches() for row in batch["segment_ids"]]
    assert sum(int(row.max()) for row in rows) == 5


def test_validation_files_that_are_trained_on_are_refused(finetuning_data, files):
    with pytest.raises(
        DataError, match=r"sft\.jsonl is in data\.validation_files and in the training files; exclude it"
    ):
        finetuning_data(validation_files=files["sft", "jsonl"])


# Too long, and other bad records


def test_too_long_examples_are_dropped_and_counted(finetuning_data):
    data = finetuning_data(seq_len=40, validation_fraction=0.3)
    batches = data.train()
    take(batches, 8)
    assert batches.skipped["too long"] > 3
    again = finetuning_data(seq_len=40, validation_fraction=0.3).train()
    again.restore([json.loads(json.dumps(batches.state()))])
    assert again.skipped == batches.skipped
    sample = data.describe()["sample"]
    assert sample["skipped"]["too long"] > 3
    assert 0 < sample["learned"] < sample["tokens"]
    assert sample["longest"] <= 40
    list(data.validation_batches())
    assert set(data.validation_skipped) == {"too long"}


def test_too_long_examples_stop_the_run_or_are_truncated(finetuning_data):
    message = (
        r"sft\.jsonl:\d+: \d+ tokens, and train\.seq_len is 40; shorten it, raise train\.seq_len, or set"
    )
    with pytest.raises(DataError, match=message):
        finetuning_data(seq_len=40, validation_fraction=0, too_long="fail", bad_records="skip").describe()
    sample = finetuning_data(seq_len=40, validation_fraction=0, too_long="truncate").describe()["sample"]
    assert sample["longest"] == 40


def test_nothing_but_too_long_examples(finetuning_data):
    with pytest.raises(
        DataError, match=r"none of the \d+ records of .* has usable text \(skipped: \d+ too long\)"
    ):
        finetuning_data(seq_len=8)


def test_a_bad_example_stops_the_run_or_is_counted(finetuning_data, tmp_path):
    rows = [*records("chat")[:9], {"messages": [{"role": "User", "content": "x"}]}]
    path = write(tmp_path / "a.jsonl", rows)
    message = r"a\.jsonl:10: messages\[0\]: role is 'User'; .*; fix it, or set data\.bad_records = \"skip\"$"
    with pytest.raises(DataError, match=message):
        take(finetuning_data("chat", files=path, validation_fraction=0).train(), 6)
    batches = finetuning_data("chat", files=path, validation_fraction=0, bad_records="skip").train()
    take(batches, 6)
    assert set(batches.skipped) == {"unknown role"}


@pytest.mark.parametrize("depth", [10, 500, 900, 100_000])
def test_deeply_nested_values(finetuning_data, tmp_path, depth):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": ' + "[" * depth + "]" * depth + "}")
    with pytest.raises(DataError, match=r"a\.jsonl:1: .*; fix it, or set data\.bad_records"):
        finetuning_data("regress", files=str(path))


def test_a_template_that_does_not_render_names_the_line(finetuning_data, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages | nothing }}")
    with pytest.raises(DataError, match=r"chat\.jsonl:\d+: the chat template .* does not render: "):
        finetuning_data("chat", template=str(template))


def test_messages_where_there_is_no_template(finetuning_data):
    with pytest.raises(DataError, match=r"the model has no chat template; set data\.template"):
        finetuning_data("chat", template="")


def test_a_folder_of_token_ids_has_no_examples(finetuning_data, corpora, tokenizer, tmp_path):
    prepared(tmp_path / "ids", tokenizer, corpora["text"])
    with pytest.raises(DataError, match="is a folder of token ids; use the text"):
        finetuning_data(files=str(tmp_path / "ids"))


def test_examples_cannot_be_tokenized_ahead_of_time(tmp_path):
    (tmp_path / "run.toml").write_text('[train]\nobjective = "sft"\n')
    with pytest.raises(
        ConfigError, match=r'train\.objective is "sft", whose examples are tokenized during training'
    ):
        command.run([str(tmp_path / "run.toml"), str(tmp_path / "out")])


def test_a_parquet_file_that_lacks_a_column_of_the_first(finetuning_data, tmp_path):
    write(tmp_path / "a.parquet", records("chat")[:5])
    write(tmp_path / "b.parquet", [{"text": "x"}] * 5)
    with pytest.raises(DataError, match=r"b\.parquet, row \d: no field 'messages'"):
        take(finetuning_data("chat", files=f"{tmp_path}/*.parquet", validation_fraction=0).train(), 20)


def test_the_fingerprint_covers_everything_that_determines_the_batches(finetuning_data):
    known = finetuning_data().fingerprint
    assert finetuning_data(workers=1, bad_records="skip", seed=3).fingerprint == known
    different = [
        finetuning_data("chat").fingerprint,
        finetuning_data(too_long="truncate").fingerprint,
        finetuning_data(validation_fraction=0.2).fingerprint,
        finetuning_data(suffix="parquet").fingerprint,
        finetuning_data("dpo").fingerprint,
        finetuning_data("dpo", objective="reward").fingerprint,
    ]
    assert len({known, *different}) == 7


# The packer


@given(st.lists(st.integers(1, 20), max_size=60))
def test_bins_hold_everything_once_and_never_overflow(lengths):
    bins: Bins[tuple[int, int]] = Bins(20)
    rows = []
    for i, length in enumerate(lengths):
        done = bins.add(length, (i, length))
        rows += [done] if done is not None else []
        assert len(bins.rows) <= OPEN_BINS
    rows += list(bins.drain())
    assert sorted(itertools.chain(*rows)) == list(enumerate(lengths))
    assert all(0 < sum(length for _, length in row) <= 20 for row in rows)
    assert all(row == sorted(row) for row in rows)


def test_an_item_goes_into_the_row_with_the_least_room_left():
    bins: Bins[str] = Bins(10)
    for length, name in ((6, "a"), (7, "b"), (5, "c"), (3, "d")):
        done = bins.add(length, name)
    assert done == ["b", "d"]
    assert bins.rows == [["a"], ["c"]]
    again: Bins[str] = Bins(10, [[(6, "a")], [(5, "c")]])
    assert again.add(5, "e") == bins.add(5, "e") == ["c", "e"]
