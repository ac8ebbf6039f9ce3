"""Folders that Hugging Face's `datasets` wrote, and what to write instead of any other folder."""

from __future__ import annotations

import collections
import itertools
import json
from pathlib import Path
from typing import Any

from llama_jax.errors import DataError

_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
_METADATA = (_INFO, "dataset_infos.json", _SPLITS)  # of `datasets`, beside data files
_MAX_METADATA_BYTES = 64 << 20
_MAX_ENTRIES = 10_000
_DATA_SUFFIXES = (
    *(".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".csv", ".tsv", ".arrayrecord", ".txt", ".md"),
    *(".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".txt.gz", ".txt.zst", ".csv.gz"),
)


def dataset_files(folder: Path) -> tuple[Path, list[Path]] | None:
    """Returns the folder and the Arrow files of a `Dataset.save_to_disk` folder, in order.

    Of a `DatasetDict.save_to_disk` folder these are the ones of its split `train`. Any other folder gives
    None.

    Raises:
      DataError: if its files cannot be read, or there is no split `train`.
    """
    if (folder / _SPLITS).is_file():
        splits = _read(folder / _SPLITS).get("splits")
        if not isinstance(splits, list) or not all(map(_is_file_name, splits)):
            raise DataError(f"{folder / _SPLITS} has no list of splits; save the dataset again")
        if "train" not in splits:
            use = " or ".join(repr(str(folder / split)) for split in splits[:4]) or "another folder"
            raise DataError(f"{folder} has no split 'train'; use {use}")
        folder = folder / "train"
    if not ((folder / _STATE).is_file() and (folder / _INFO).is_file()):
        return None
    state = _read(folder / _STATE)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise DataError(
            f"{folder} was saved by an old version of datasets, with a separate list of its rows; load it "
            "there, and save it again after .flatten_indices()"
        )
    files = state.get("_data_files")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in files or []]
    if not isinstance(files, list) or not all(map(_is_file_name, names)):
        raise DataError(f"{folder / _STATE} has no list of data files; save the dataset again")
    paths = [folder / str(name) for name in names]
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path} does not exist, and {_STATE} names it; copy the folder again")
    if not paths:
        raise DataError(f"{folder} is a dataset without rows; use another one")
    return folder, paths


def is_metadata(path: Path) -> bool:
    """Returns whether a file describes a Hugging Face dataset, and is no data itself."""
    return path.name in _METADATA or (path.name == _STATE and (path.parent / _INFO).is_file())


def folder_advice(folder: Path, pattern: str, index: str) -> str:
    """Returns the error message for a folder that is no data set, with a glob for its files."""
    what = f"{pattern!r} is a directory, and neither a saved dataset ({_STATE}) nor token ids ({index})"
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    empty = True
    for path in itertools.islice(folder.rglob("*"), _MAX_ENTRIES):
        if path.is_file() and not is_metadata(path):
            empty = False
            suffix = "".join(path.suffixes[-2:]).lower()
            suffix = suffix if suffix in _DATA_SUFFIXES else path.suffix.lower()
            counts[suffix, "train" if "train" in path.name else ""] += suffix in _DATA_SUFFIXES
    (suffix, split), found = max(
        counts.items(), key=lambda item: (item[0][1], item[1]), default=(("", ""), 0)
    )
    if empty:
        return f"{what}: it has no files; check the path"
    if not found:
        return f"{what}; to match its files use '{pattern}/**/*'"
    name = f"*{split}*{suffix}" if split else f"*{suffix}"
    return f"{what}; to match its files use '{pattern}/**/{name}'"


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and name not in ("", ".", "..")


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_METADATA_BYTES:
            raise ValueError
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path} is not JSON; save the dataset again") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} is not a JSON object; save the dataset again")
    return value
