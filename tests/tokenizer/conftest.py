"""Fixtures: one small tokenizer of each file format."""

from pathlib import Path

import pytest

from llama_jax.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer import vocabularies

KINDS = ("sentencepiece", "llama2c", "gguf-spm", "gguf-bpe", "json-bpe", "json-llama", "spm-trimmed")


@pytest.fixture(scope="session")
def vocabulary_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return vocabularies.write_all(tmp_path_factory.mktemp("vocabularies"))


@pytest.fixture(scope="session")
def by_kind(vocabulary_paths: dict[str, Path]) -> dict[str, Tokenizer]:
    return {kind: load_tokenizer(path) for kind, path in vocabulary_paths.items()}


@pytest.fixture(scope="session", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, by_kind: dict[str, Tokenizer]) -> Tokenizer:
    return by_kind[request.param]
