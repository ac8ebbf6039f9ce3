"""Hugging Face `datasets` writes files in every form it has, and our readers give the rows that it gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_jax.train.data import SourceConfig
from llama_jax.train.data.source import open_records

pytestmark = pytest.mark.parity
datasets = pytest.importorskip("datasets")

ROWS = [
    {
        "messages": [{"role": "user", "content": f"q{i} é\u2028"}, {"role": "assistant", "content": "a" * i}],
        "prompt": f"p{i}\r\n" if i % 4 else None,
        "label": i,
        "weight": i / 3,
        "meta": {"list": [i, None], "empty": []},
    }
    for i in range(23)
]
MIXED = [  # objects with different keys, which datasets stores as JSON in text
    {"text": "x", "tools": [{"name": "f", "parameters": {"a": 1}}, {"name": "g", "parameters": {"b": [2]}}]},
    {"text": "y", "tools": []},
    {"text": "z", "tools": [{"name": "h", "other": None}]},
]
DATASETS: dict[str, Callable[[], Any]] = {
    "rows": lambda: datasets.Dataset.from_list(ROWS),
    "filtered": lambda: (
        datasets.Dataset.from_list(ROWS).filter(lambda row: row["label"] % 2).shuffle(seed=1).select(range(7))
    ),
    "joined": lambda: datasets.concatenate_datasets([datasets.Dataset.from_list(ROWS)] * 2),
    "classes": lambda: datasets.Dataset.from_list(ROWS).cast_column(
        "label", datasets.ClassLabel(num_classes=23)
    ),
    "mixed": lambda: datasets.Dataset.from_list(MIXED, on_mixed_types="use_json"),
}


def rows_of(files: Any) -> list[dict[str, Any]]:
    records = open_records(SourceConfig(files), rows=True)
    return [records.row(i) for i in range(len(records))]


@pytest.fixture(autouse=True)
def _caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


@pytest.mark.parametrize("name", DATASETS)
def test_saved_datasets(tmp_path, name):
    dataset = DATASETS[name]()
    expected = list(dataset)
    for shards in (1, 3):
        folder = str(tmp_path / str(shards))
        dataset.save_to_disk(folder, num_shards=shards)
        assert rows_of(folder) == expected == list(datasets.load_from_disk(folder))
        assert rows_of(f"{folder}/*") == expected
    datasets.DatasetDict({"test": dataset.select([0]), "train": dataset}).save_to_disk(tmp_path / "splits")
    assert rows_of(str(tmp_path / "splits")) == expected
    assert rows_of(str(tmp_path / "splits" / "test")) == expected[:1]
    dataset.to_parquet(tmp_path / "a.parquet", batch_size=4)
    assert rows_of(str(tmp_path / "a.parquet")) == expected


@pytest.mark.parametrize("compression", [None, "gzip", "bz2", "xz"])
@pytest.mark.parametrize("lines", [True, False])
def test_json(tmp_path, compression, lines):
    suffix = {None: "", "gzip": ".gz"}.get(compression, f".{compression}")
    files = [str(tmp_path / f"{name}.json{suffix}") for name in "ba"]
    for i, file in enumerate(files):
        datasets.Dataset.from_list(ROWS[i::2]).to_json(file, lines=lines, compression=compression)
    for chosen in (files[0], files, [files[1]] * 2):
        theirs = datasets.load_dataset("json", data_files=chosen, split="train", cache_dir=tmp_path / "hf")
        assert rows_of(chosen) == list(theirs)


def test_csv(tmp_path):
    texts = ['a, "b"\nc', "é", "\u2028d", " e "]
    dataset = datasets.Dataset.from_list([{"text": text, "label": i} for i, text in enumerate(texts)])
    for name, separator in (("a.csv", ","), ("a.tsv", "\t")):
        dataset.to_csv(tmp_path / name, sep=separator)
        theirs = datasets.load_dataset(
            "csv", data_files=str(tmp_path / name), sep=separator, split="train", cache_dir=tmp_path / "hf"
        )
        assert rows_of(str(tmp_path / name)) == list(theirs) == list(dataset)
