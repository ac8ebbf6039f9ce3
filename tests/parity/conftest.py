"""What several comparisons may ask for."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from llama_jax.tokenizer import Tokenizer, load_tokenizer
from llama_jax.tokenizer.train import train_sentencepiece
from tests.tokenizer import vocabularies


@pytest.fixture(autouse=True, scope="session")
def _one_thread_each() -> None:
    """Two test processes on two cores: torch's threads wait for each other by spinning, at half the speed."""
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(1)


@pytest.fixture(params=["llama2", "smollm2", "stories260K", "trained"])
def tokenizer(request: pytest.FixtureRequest, shared_data: Path, tmp_path: Path) -> Tokenizer:
    match request.param:
        case "llama2":
            return load_tokenizer(shared_data / "llama2" / "tokenizer.model")
        case "smollm2":
            return load_tokenizer(request.getfixturevalue("smollm2_path"))
        case "stories260K":
            return load_tokenizer(shared_data / "stories260K" / "tok512.bin")
        case _:
            texts = [(shared_data / "text" / "tinyshakespeare.txt").read_text(), *vocabularies.TEXT]
            return load_tokenizer(train_sentencepiece(texts, tmp_path / "tokenizer.model", vocab_size=1000))
