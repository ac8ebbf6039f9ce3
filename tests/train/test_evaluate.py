"""Evaluation over several sources: each by its weight, and a number of its own."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import llama_jax as lj
from llama_jax.tokenizer import load_tokenizer
from llama_jax.train.config.data import SourceConfig
from llama_jax.train.config.eval import EvalConfig
from llama_jax.train.config.run import RunConfig, TrainConfig
from llama_jax.train.data import Data, DataConfig, open_data
from llama_jax.train.feed import Feed
from llama_jax.train.metrics.evaluate import make_eval_fn
from tests.tiny import PIECES, write_vocabulary
from tests.train.test_reference import LENGTH, MODEL

BATCH = 2
WEIGHTS = {"rain": 3.0, "tree": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    write_vocabulary(folder / "tok.bin", PIECES)
    for word in WEIGHTS:
        lines = (json.dumps({"text": f"{word} " * (9 + i % 7)}) + "\n" for i in range(100))
        (folder / f"{word}.jsonl").write_text("".join(lines))
    return folder


def opened(folder: Path, weights: dict[str, float]) -> tuple[RunConfig, Data]:
    sources = tuple(SourceConfig(f"{folder}/{word}.jsonl", weight=w) for word, w in weights.items())
    run = RunConfig(
        data=DataConfig(mixture=sources, validation_fraction=0.5),
        train=TrainConfig(global_batch_size=BATCH, seq_len=LENGTH, dtype="float32", attention="xla"),
        eval=EvalConfig(batches=4),
    )
    tokenizer = load_tokenizer(folder / "tok.bin")
    return run, open_data(run.data, tokenizer, seq_len=LENGTH, batch_size=BATCH, seed=0)


@pytest.fixture(scope="module")
def evaluate(folder: Path) -> Any:
    """From weights of the sources, in order, to the metrics of random parameters."""
    feed = Feed.for_mesh(None, BATCH, LENGTH)
    params = lj.init(MODEL, jax.random.key(0))

    def run(weights: dict[str, float], **changes: int) -> tuple[dict[str, float], Data]:
        config, data = opened(folder, weights)
        config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, **changes))
        return make_eval_fn(config, MODEL, "cpu", data, feed)(params), data

    return run


def test_the_loss_of_a_mixture_is_the_weighted_mean_of_its_sources(evaluate: Any, folder: Path) -> None:
    metrics, data = evaluate(WEIGHTS)
    shares = {f"{folder}/rain.jsonl": 0.75, f"{folder}/tree.jsonl": 0.25}
    assert data.validation_sources == shares
    losses = {name: metrics[f"eval_loss/{name}"] for name in shares}
    assert losses[f"{folder}/rain.jsonl"] != losses[f"{folder}/tree.jsonl"]
    assert metrics["eval_loss"] == pytest.approx(sum(losses[name] * shares[name] for name in shares))
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    # The order of the sources, which decided before, changes nothing; a source alone has the same loss.
    other, _ = evaluate(dict(reversed(WEIGHTS.items())))
    assert other == pytest.approx(metrics)
    alone, _ = evaluate({"tree": 1.0}, batches=1)
    assert alone["eval_loss"] == pytest.approx(losses[f"{folder}/tree.jsonl"])
    assert set(alone) == {"eval_loss", "eval_perplexity", "bits_per_byte"}


def test_batches_of_a_source_hold_it_alone(folder: Path) -> None:
    _, data = opened(folder, WEIGHTS)
    tokenizer = load_tokenizer(folder / "tok.bin")
    for name in data.validation_sources:
        word = Path(name).stem
        ids = {int(token) for batch in data.validation_batches(name) for token in np.unique(batch["tokens"])}
        assert ids <= {0, 1, 2, *tokenizer.encode(f"{word} {word}")}
    whole = sum(int((b["positions"] > 0).sum()) for b in data.validation_batches())
    parts = (data.validation_batches(name) for name in data.validation_sources)
    assert whole == sum(int((b["positions"] > 0).sum()) for batches in parts for b in batches)


def test_the_unigram_baseline_is_of_the_same_tokens(folder: Path) -> None:
    _, data = opened(folder, WEIGHTS)
    alone = {word: opened(folder, {word: 1.0})[1] for word in WEIGHTS}
    assert data.unigram_loss() == data.unigram_loss(10_000)
    assert 0 < data.unigram_loss(4) < math.log(MODEL.vocab_size)
    assert all(0 < one.unigram_loss(1) < data.unigram_loss(4) for one in alone.values())
