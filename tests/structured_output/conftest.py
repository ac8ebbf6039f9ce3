"""Small vocabularies of every format."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_jax.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer import vocabularies


@pytest.fixture(scope="session")
def all_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """A tokenizer of each kind of file."""
    directory: Path = tmp_path_factory.mktemp("vocabularies")
    return {kind: load_tokenizer(path) for kind, path in vocabularies.write_all(directory).items()}


@pytest.fixture(scope="session")
def tokenizer(all_tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    """A byte-level one."""
    return all_tokenizers["json-bpe"]
