"""The validation set: never trained on, every token predicted once, every byte counted once."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from llama_jax.train.config.data import DataConfig
from llama_jax.train.data import train_texts
from llama_jax.train.data.records import record_keys, validation_mask


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


def test_the_split_of_a_file_does_not_change_when_files_are_added():
    names = [f"{i}.txt" for i in range(400)]
    before = validation_mask(record_keys(names, np.full(400, 3)), 0.1)
    more = sorted([*names, *(f"new{i}.txt" for i in range(50))])
    after = validation_mask(record_keys(more, np.full(450, 3)), 0.1)
    old = np.repeat([name in set(names) for name in more], 3)
    by_name = dict(zip(np.repeat(names, 3).tolist(), before.tolist(), strict=True))
    assert before.mean() == pytest.approx(0.1, abs=0.03)
    assert [by_name[name] for name in np.repeat(more, 3)[old].tolist()] == [
        dict(zip(np.repeat(more, 3).tolist(), after.tolist(), strict=True))[name]
        for name in np.repeat(more, 3)[old].tolist()
    ]


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 0.999999])
@pytest.mark.parametrize("count", [2, 3, 50])
def test_both_splits_have_a_record(fraction, count):
    chosen = validation_mask(record_keys(["a"], np.array([count])), fraction)
    assert 1 <= chosen.sum() < count


def test_one_document_or_fraction_zero_gives_no_validation_set():
    assert not validation_mask(record_keys(["a"], np.array([1])), 0.9).any()
    assert not validation_mask(record_keys(["a"], np.array([50])), 0.0).any()


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
