"""The held-out text: never trained on, every token predicted once, every byte counted once."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from llama_jax.train.config.data import DataConfig
from llama_jax.train.data import train_texts
from llama_jax.train.data.records import held_out, keys


def predictions(batches):
    """The (context, token) pairs that a model is scored on, as llama_jax's loss counts them."""
    for batch in batches:
        for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
            for i in range(1, len(tokens)):
                if segments[i] and segments[i] == segments[i - 1]:
                    yield tokens[i - 1], tokens[i]


def held_texts(config, texts):
    kept = set(train_texts(config))
    return [text for text in texts if text not in kept]


@pytest.mark.parametrize("seq_len", [2, 3, 17, 64, 1000])
def test_every_token_is_predicted_once_and_every_byte_counted_once(
    opened, corpora, tokenizer, texts, seq_len
):
    config = DataConfig(files=corpora["text"], validation_fraction=0.2)
    held = held_texts(config, texts)
    assert len(held) > 3
    batches = list(opened(corpora["text"], validation_fraction=0.2, seq_len=seq_len).held_out())
    documents = [[1, *tokenizer.encode(text, add_bos=False), 2] for text in held]
    expected = [pair for ids in documents for pair in itertools.pairwise(ids)]
    assert list(predictions(batches)) == expected
    assert sum(batch["bytes"] for batch in batches) == sum(len(text.encode()) for text in held)


def test_positions_restart_and_padding_is_segment_0(opened, corpora):
    batches = list(opened(corpora["text"], validation_fraction=0.2).held_out())
    for batch in batches:
        for segments, positions in zip(batch["segment_ids"], batch["positions"], strict=True):
            begins = np.diff(segments, prepend=0)
            assert set(begins[segments > 0]) <= {0, 1}
            np.testing.assert_array_equal((begins == 1)[segments > 0], (positions == 0)[segments > 0])
    assert all(batch["tokens"].shape == (4, 64) for batch in batches)
    assert (batches[-1]["segment_ids"] == 0).any()


def test_it_is_the_same_for_any_seed_and_number_of_processes(opened, corpora):
    whole = list(opened(corpora["text"], validation_fraction=0.2).held_out())
    parts = [
        list(
            opened(
                corpora["text"], validation_fraction=0.2, seed=5, process_index=i, process_count=2
            ).held_out()
        )
        for i in range(2)
    ]
    assert len(whole) == len(parts[0]) == len(parts[1]) > 1
    for batch, first, second in zip(whole, *parts, strict=True):
        assert batch["bytes"] == first["bytes"] == second["bytes"]
        for name in ("tokens", "segment_ids", "positions"):
            np.testing.assert_array_equal(batch[name], np.concatenate([first[name], second[name]]))


def test_training_never_sees_it(opened, corpora, tokenizer, texts):
    held = held_texts(DataConfig(files=corpora["text"], validation_fraction=0.3), texts)
    names = {text.split(":")[0] + ":" for text in held}
    batches = opened(corpora["text"], validation_fraction=0.3, batch_size=2, seq_len=4096).train()
    seen = "".join(
        tokenizer.decode(next(batches)["tokens"].ravel(), skip_special_tokens=False) for _ in range(8)
    )
    assert sum(text.split(":")[0] + ":" in seen for text in texts) == len(texts) - len(held)
    assert not any(name in seen for name in names)


def test_what_is_held_out_stays_so_when_files_are_added():
    names = [f"{i}.txt" for i in range(400)]
    before = held_out(keys(names, np.full(400, 3)), 0.1)
    more = sorted([*names, *(f"new{i}.txt" for i in range(50))])
    after = held_out(keys(more, np.full(450, 3)), 0.1)
    old = np.repeat([name in set(names) for name in more], 3)
    by_name = dict(zip(np.repeat(names, 3).tolist(), before.tolist(), strict=True))
    assert before.mean() == pytest.approx(0.1, abs=0.03)
    assert [by_name[name] for name in np.repeat(more, 3)[old].tolist()] == [
        dict(zip(np.repeat(more, 3).tolist(), after.tolist(), strict=True))[name]
        for name in np.repeat(more, 3)[old].tolist()
    ]


@pytest.mark.parametrize("share", [1e-9, 0.5, 0.999999])
@pytest.mark.parametrize("count", [2, 3, 50])
def test_something_is_held_out_and_something_is_not(share, count):
    chosen = held_out(keys(["a"], np.array([count])), share)
    assert 1 <= chosen.sum() < count


def test_nothing_is_held_out_of_one_document_or_when_nothing_is_asked():
    assert not held_out(keys(["a"], np.array([1])), 0.9).any()
    assert not held_out(keys(["a"], np.array([50])), 0.0).any()


def test_no_held_out_text_is_no_batches(opened, corpora):
    data = opened(corpora["text"], validation_fraction=0)
    assert list(data.held_out()) == []
    assert math.isnan(data.unigram_loss())


def test_the_unigram_loss_is_that_of_counting_with_add_one_smoothing(opened, corpora, tokenizer, texts):
    config = DataConfig(files=corpora["text"], validation_fraction=0.2)
    counts = np.ones(tokenizer.vocab_size)
    for text in train_texts(config):
        np.add.at(counts, [*tokenizer.encode(text, add_bos=False), 2], 1)
    test = [token for text in held_texts(config, texts) for token in [*tokenizer.encode(text)[1:], 2]]
    expected = -np.mean(np.log(counts / counts.sum())[test])
    assert opened(corpora["text"], validation_fraction=0.2).unigram_loss() == pytest.approx(
        expected, rel=1e-9
    )
