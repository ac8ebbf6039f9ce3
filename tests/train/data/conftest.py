"""A small vocabulary, and corpora of the same documents in every format."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import pytest

from llama_jax.tokenizer import Tokenizer, load_tokenizer
from llama_jax.train.data import Data, DataConfig, open_data
from tests.tokenizer import vocabularies

Open = Callable[..., Data]


@pytest.fixture(scope="session")
def vocabulary_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return vocabularies.write_all(tmp_path_factory.mktemp("vocabularies"))


@pytest.fixture(scope="session")
def tokenizer(vocabulary_paths: dict[str, Path]) -> Tokenizer:
    return load_tokenizer(vocabulary_paths["sentencepiece"])


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """60 distinct documents of varied lengths."""
    random = Random(0)
    words = ("the", "fox", "saw", "12", "dogs,", "naïve", "café\n", "", "", "", "return", "x\n")
    return [
        f"document {i}: " + " ".join(random.choice(words) for _ in range(random.choice((1, 5, 40, 150))))
        for i in range(60)
    ]


def write_text(folder: Path, texts: Sequence[str]) -> str:
    folder.mkdir(parents=True)
    for i, text in enumerate(texts):
        (folder / f"{i:03}.txt").write_text(text, encoding="utf-8", newline="")
    return f"{folder}/*.txt"


def write_jsonl(folder: Path, texts: Sequence[str]) -> str:
    folder.mkdir(parents=True)
    half = len(texts) // 2
    for name, part in (("a", texts[:half]), ("b", texts[half:])):
        lines = (json.dumps({"id": 1, "text": text}) + "\n\n" for text in part)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return f"{folder}/*.jsonl"


def write_parquet(folder: Path, texts: Sequence[str]) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    half = len(texts) // 2
    for name, part in (("a", texts[:half]), ("b", texts[half:])):
        table = pa.table({"id": list(range(len(part))), "text": list(part)})
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=7)
    return f"{folder}/*.parquet"


def write_arrayrecord(folder: Path, texts: Sequence[str], wrap: bool = False) -> str:
    from array_record.python import array_record_module

    folder.mkdir(parents=True)
    writer = array_record_module.ArrayRecordWriter(str(folder / "a.arrayrecord"), "group_size:1")
    for text in texts:
        writer.write((json.dumps({"text": text}) if wrap else text).encode())
    writer.close()
    return f"{folder}/*.arrayrecord"


WRITERS = {
    "text": write_text,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "arrayrecord": write_arrayrecord,
}


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> dict[str, str]:
    """The same documents in every format: globs."""
    folder = tmp_path_factory.mktemp("corpora")
    return {name: write(folder / name, texts) for name, write in WRITERS.items()}


@pytest.fixture
def opened(tokenizer: Tokenizer) -> Open:
    """Opens data with small sizes; takes `files` and any argument of DataConfig and open_data."""
    defaults = {"seq_len": 64, "batch_size": 4, "seed": 0}
    names = (*defaults, "process_index", "process_count", "objective")

    def open_(files: str = "", **settings: object) -> Data:
        sizes = {name: settings.pop(name) for name in names if name in settings}
        chosen = settings.pop("tokenizer", tokenizer)
        return open_data(DataConfig(files=files, **settings), chosen, **{**defaults, **sizes})  # type: ignore[arg-type]

    return open_
