"""The validation set: never trained on, every token predicted once, every byte counted once."""

from __future__ import annotations

import concurrent.futures
import hashlib
import itertools
import json
import math
import pickle
import threading

import numpy as np
import pytest

from llama_jax.errors import DataError
from llama_jax.train.config.data import DataConfig
from llama_jax.train.data import Peers, dataset, sharing, splitting, train_texts
from llama_jax.train.data.splitting import TrainingRecords, validation_records


def predicted_pairs(batches):
    """The (previous token, token) pairs that the loss counts."""
    for batch in batches:
        for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
            for i in range(1, len(tokens)):
                if segments[i] and segments[i] == segments[i - 1]:
                    yield tokens[i - 1], tokens[i]


def validation_texts(config, texts):
    kept = set(train_texts(config))
    return [text for text in texts if text not in kept]


@pytest.mark.parametrize("seq_len", [2, 3, 17, 64, 1000])
def test_every_token_is_predicted_once_and_every_byte_counted_once(
    opened, corpora, tokenizer, texts, seq_len
):
    config = DataConfig(files=corpora["text"], validation_fraction=0.2)
    held_out = validation_texts(config, texts)
    assert len(held_out) > 3
    batches = list(opened(corpora["text"], validation_fraction=0.2, seq_len=seq_len).validation_batches())
    documents = [[1, *tokenizer.encode(text, add_bos=False), 2] for text in held_out]
    expected = [pair for ids in documents for pair in itertools.pairwise(ids)]
    assert list(predicted_pairs(batches)) == expected
    assert sum(batch["bytes"] for batch in batches) == sum(len(text.encode()) for text in held_out)


def test_positions_restart_and_padding_is_segment_0(opened, corpora):
    batches = list(opened(corpora["text"], validation_fraction=0.2).validation_batches())
    for batch in batches:
        for segments, positions in zip(batch["segment_ids"], batch["positions"], strict=True):
            begins = np.diff(segments, prepend=0)
            assert set(begins[segments > 0]) <= {0, 1}
            np.testing.assert_array_equal((begins == 1)[segments > 0], (positions == 0)[segments > 0])
    assert all(batch["tokens"].shape == (4, 64) for batch in batches)
    assert (batches[-1]["segment_ids"] == 0).any()


def test_batches_do_not_depend_on_seed_or_number_of_processes(opened, corpora):
    whole = list(opened(corpora["text"], validation_fraction=0.2).validation_batches())
    parts = [
        list(
            opened(
                corpora["text"], validation_fraction=0.2, seed=5, process_index=i, process_count=2
            ).validation_batches()
        )
        for i in range(2)
    ]
    assert len(whole) == len(parts[0]) == len(parts[1]) > 1
    for batch, first, second in zip(whole, *parts, strict=True):
        assert batch["bytes"] == first["bytes"] == second["bytes"]
        for name in ("tokens", "segment_ids", "positions"):
            np.testing.assert_array_equal(batch[name], np.concatenate([first[name], second[name]]))


def test_validation_documents_are_never_trained_on(opened, corpora, tokenizer, texts):
    held_out = validation_texts(DataConfig(files=corpora["text"], validation_fraction=0.3), texts)
    names = {text.split(":")[0] + ":" for text in held_out}
    batches = opened(corpora["text"], validation_fraction=0.3, batch_size=2, seq_len=4096).train()
    seen = "".join(
        tokenizer.decode(next(batches)["tokens"].ravel(), skip_special_tokens=False) for _ in range(8)
    )
    assert sum(text.split(":")[0] + ":" in seen for text in texts) == len(texts) - len(held_out)
    assert not any(name in seen for name in names)


def reference_split(names, counts, fraction):
    """The validation records, by one hash after the other."""
    keys = []
    for name, count in zip(names, counts, strict=True):
        start = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
        for number in range(1, count + 1):
            x = (start + number * 0x9E3779B97F4A7C15) % 2**64
            x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
            keys.append(x ^ x >> 31)
    if not fraction or len(keys) < 2:
        return []
    chosen = {i for i, key in enumerate(keys) if key < fraction * 2.0**64} | {keys.index(min(keys))}
    return sorted(chosen - {keys.index(max(keys))})


@pytest.mark.parametrize("fraction", [0.0, 1e-9, 0.1, 0.5, 0.999999])
@pytest.mark.parametrize("counts", [[1], [2], [0, 3, 0, 0, 50, 1, 0], [700, 1, 40]])
def test_the_split_is_a_function_of_name_and_number(counts, fraction, monkeypatch):
    names = [f"{i}.txt" for i in range(len(counts))]
    expected = reference_split(names, counts, fraction)
    total = sum(counts)
    for chunk, many in ((1 << 18, 1 << 23), (7, 1 << 23), (64, 0)):  # the last is kept on disk
        monkeypatch.setattr(splitting, "_CHUNK", chunk)
        monkeypatch.setattr(splitting, "_MANY", many)
        found = validation_records(names, np.array(counts), fraction)
        assert found.tolist() == expected
        training = TrainingRecords(total, found)
        assert list(training) == training[:] == sorted(set(range(total)) - set(expected))
        assert len(expected) < total
        assert list(pickle.loads(pickle.dumps(training))) == list(training)
    assert isinstance(found, np.memmap) == bool(expected)


def test_a_worker_process_is_not_sent_the_split(monkeypatch):
    monkeypatch.setattr(splitting, "_MANY", 0)
    found = validation_records(["a"], np.array([100_000]), 0.5)
    assert found.nbytes > 300_000 and len(pickle.dumps(TrainingRecords(100_000, found))) < 1000


def test_the_split_of_a_file_does_not_change_when_files_are_added():
    names = [f"{i}.txt" for i in range(400)]
    more = sorted([*names, *(f"new{i}.txt" for i in range(50))])
    before, after = (validation_records(files, np.full(len(files), 3), 0.1) for files in (names, more))
    assert len(before) / 1200 == pytest.approx(0.1, abs=0.03)
    kept = {(names[i // 3], i % 3) for i in before.tolist()}
    assert kept == {(more[i // 3], i % 3) for i in after.tolist() if more[i // 3] in names}


def test_no_validation_set_gives_no_batches(opened, corpora):
    data = opened(corpora["text"], validation_fraction=0)
    assert list(data.validation_batches()) == []
    assert math.isnan(data.unigram_loss())


def test_unigram_loss_is_add_one_smoothing(opened, corpora, tokenizer, texts):
    config = DataConfig(files=corpora["text"], validation_fraction=0.2)
    counts = np.ones(tokenizer.vocab_size)
    for text in train_texts(config):
        np.add.at(counts, [*tokenizer.encode(text, add_bos=False), 2], 1)
    test = [token for text in validation_texts(config, texts) for token in [*tokenizer.encode(text)[1:], 2]]
    expected = -np.mean(np.log(counts / counts.sum())[test])
    assert opened(corpora["text"], validation_fraction=0.2).unigram_loss() == pytest.approx(
        expected, rel=1e-9
    )


# Several processes


class Exchange:
    """`gather` of some processes, which are threads here."""

    def __init__(self, count: int):
        self._sent: list[bytes] = [b""] * count
        self._barrier = threading.Barrier(count, timeout=60)
        self.rounds = 0

    def peers(self, index: int) -> Peers:
        def gather(data: bytes) -> list[bytes]:
            self._sent[index] = data
            self._barrier.wait()
            got = list(self._sent)
            self.rounds += index == 0
            self._barrier.wait()
            return got

        return Peers(index, len(self._sent), gather)


def by_processes(count, work):
    """Returns what work(index, exchange) returns or raises in each of `count` processes."""
    exchange = Exchange(count)

    def caught(index):
        try:
            return work(index, exchange)
        except DataError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(caught, range(count)))


@pytest.mark.parametrize("objective", ["pretrain", "sft"])
@pytest.mark.parametrize("limit", [None, 2])
def test_processes_encode_each_record_once_together_and_keep_the_batches(
    opened, corpora, monkeypatch, objective, limit
):
    monkeypatch.setattr(sharing, "_FIRST", 2)
    settings = {"validation_fraction": 0.5, "objective": objective, "batch_size": 4}
    alone = opened(corpora["jsonl"], **settings)
    whole = list(itertools.islice(alone.validation_batches(), limit))
    held_out = len(alone._parts[0].validation_index)
    assert alone.validation.cost.records <= held_out

    def work(index, exchange):
        data = opened(
            corpora["jsonl"], process_index=index, process_count=2, peers=exchange.peers(index), **settings
        )
        encoded = data.validation.cost
        first = list(itertools.islice(data.validation_batches(), limit))
        count, rounds = encoded.records, exchange.rounds
        again = list(itertools.islice(data.validation_batches(), limit))
        assert (encoded.records, exchange.rounds) == (count, rounds) and encoded.seconds > 0
        assert data.validation.nbytes < sum(
            x.nbytes for b in first for x in b.values() if x is not b["bytes"]
        )
        for batch, same in zip(first, again, strict=True):
            assert batch.keys() == same.keys()
            for name, x in batch.items():
                np.testing.assert_array_equal(x, same[name])
                assert name == "bytes" or x.dtype == same[name].dtype
        # Without the others, as the first process does at the end of a run.
        (source,) = data.validation_sources
        counts = data.validation.token_counts(source, limit)
        assert exchange.rounds == rounds
        return first, count, counts

    results = by_processes(2, work)
    for i, batch in enumerate(whole):
        for name, x in batch.items():
            parts = [batches[i][name] for batches, _, _ in results]
            if name == "bytes":
                assert parts == [x, x]
            else:
                np.testing.assert_array_equal(np.concatenate(parts), x)
                assert parts[0].dtype == x.dtype
    counts = [count for _, count, _ in results]
    assert sum(counts) == held_out or (limit and sum(counts) < held_out)
    assert max(counts) - min(counts) <= 2 * len(counts)
    (source,) = alone.validation_sources
    for _, _, found in results:
        np.testing.assert_array_equal(found, alone.validation.token_counts(source, limit))
        assert found.sum() or objective == "sft"


def test_a_bad_record_ends_all_processes_with_its_message_where_it_is_used(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "_SAMPLE", 1)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} " * 9}) + "\n" for i in range(300)))
    bad = int(opened(str(path), validation_fraction=0.5)._parts[0].validation_index[20])
    lines = path.read_text().splitlines()
    lines[bad] = "{not json"
    path.write_text("\n".join(lines))

    def work(index, exchange, limit=None):
        data = opened(
            str(path), validation_fraction=0.5, seq_len=16, batch_size=2, peers=exchange.peers(index)
        )
        return len(list(itertools.islice(data.validation_batches(), limit)))

    for found in by_processes(2, work):
        assert f"a.jsonl:{bad + 1}: not JSON" in str(found)
    assert by_processes(2, lambda *each: work(*each, limit=3)) == [3, 3]  # encoded, and not used


def test_more_processes_than_records():
    expected = [i * i for i in range(5)]
    for count in (1, 3, 8):
        work = lambda index, exchange: list(  # noqa: E731
            sharing.encoded_once(5, lambda i: i * i, exchange.peers(index), sharing.Cost())
        )
        assert by_processes(count, work) == [expected] * count
    assert list(sharing.encoded_once(0, expected.__getitem__, sharing.ALONE, sharing.Cost())) == []
