"""A small vocabulary, and corpora of the same documents in every format."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from llama_jax.tokenizer import Tokenizer, load_tokenizer
from llama_jax.train.data import Data, DataConfig, open_data
from llama_jax.train.prepare.steps import prepare
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


def write_gzip(folder: Path, texts: Sequence[str]) -> str:
    write_jsonl(folder, texts)
    for path in folder.glob("*.jsonl"):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    return f"{folder}/*.jsonl.gz"


def write_csv(folder: Path, texts: Sequence[str]) -> str:
    folder.mkdir(parents=True)
    with (folder / "a.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([("id", "text"), *enumerate(texts)])
    return f"{folder}/*.csv"


def write_dataset(folder: Path, rows: Sequence[dict[str, object]]) -> str:
    """Writes a folder as `datasets.Dataset.save_to_disk` does, in two files."""
    import pyarrow as pa

    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(list(rows))
    names = [f"data-0000{i}-of-00002.arrow" for i in range(2)]
    for i, name in enumerate(names):
        part = table.slice(i * (len(table) // 2), None if i else len(table) // 2)
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(part, max_chunksize=7)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}, indent=2))
    return str(folder)


def write_arrow(folder: Path, texts: Sequence[str]) -> str:
    return write_dataset(folder, [{"id": i, "text": text} for i, text in enumerate(texts)])


WRITERS = {
    "text": write_text,
    "jsonl": write_jsonl,
    "gzip": write_gzip,
    "csv": write_csv,
    "parquet": write_parquet,
    "arrow": write_arrow,
    "arrayrecord": write_arrayrecord,
}


@pytest.fixture(scope="module", autouse=True)
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of decompressed and converted files."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("LLAMA_JAX_CACHE", str(folder))
        yield folder / "data"


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> dict[str, str]:
    """The same documents in every format: globs."""
    folder = tmp_path_factory.mktemp("corpora")
    return {name: write(folder / name, texts) for name, write in WRITERS.items()}


def prepared(out: Path, tokenizer: Tokenizer, files: str = "", **settings: object) -> list[dict[str, Any]]:
    """Prepares data in this process; takes `seed`, `prepare.Settings`, and any argument of DataConfig."""
    seed, how = settings.pop("seed", 0), settings.pop("settings", None)
    config = DataConfig(files=files, **settings)  # type: ignore[arg-type]
    return prepare(config, tokenizer, out, seed=seed, settings=how)  # type: ignore[arg-type]


@pytest.fixture
def opened(tokenizer: Tokenizer) -> Open:
    """Opens data with small sizes; takes `files` and any argument of DataConfig and open_data."""
    defaults = {"seq_len": 64, "batch_size": 4, "seed": 0}
    names = (*defaults, "process_index", "process_count", "objective", "peers")

    def open_(files: str = "", **settings: object) -> Data:
        sizes = {name: settings.pop(name) for name in names if name in settings}
        chosen = settings.pop("tokenizer", tokenizer)
        return open_data(DataConfig(files=files, **settings), chosen, **{**defaults, **sizes})  # type: ignore[arg-type]

    return open_
