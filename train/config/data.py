"""`[data]`: the files that a run reads, their mixture, and the validation set."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

from llama_jax.errors import ConfigError

from .checks import check_one_of

Format = Literal["auto", "text", "jsonl", "csv", "parquet", "arrow", "arrayrecord", "tokens"]
BadRecords = Literal["fail", "skip"]
TooLong = Literal["drop", "truncate", "fail"]
Files = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One set of files.

    Attributes:
      files: a glob (`**` is any number of folders) relative to the current directory, a folder that
        `Dataset.save_to_disk` or `llama-jax data prepare` wrote, or a list of these, whose records
        follow each other; `{stdlib}` is the directory of Python's standard library.
      exclude: patterns of paths to leave out; `*` matches slashes too.
      format: `auto` detects it from the file names: .jsonl, .ndjson and .json, .csv and .tsv, .parquet,
        .arrow and .feather, .arrayrecord, a folder of token ids; everything else is text.
      field: the JSON field or Parquet column with the text.
      weight: this source's share of the tokens, relative to the other sources' weights.

    Raises:
      ConfigError: for an invalid value, naming field and value.
    """

    files: Files
    exclude: tuple[str, ...] = ()
    format: Format = "auto"
    field: str = "text"
    weight: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", _patterns(self.exclude))
        object.__setattr__(self, "files", _globs("data.files", self.files))
        if not self.files:
            raise ConfigError(
                f"data.files is {self.files!r}; use a file, or a glob such as 'corpus/**/*.txt'"
            )
        if not isinstance(self.field, str) or not self.field:
            raise ConfigError(f"data.field is {self.field!r}; use the name of the field with the text")
        check_one_of("data.format", self.format, get_args(Format))
        if not _is_number(self.weight) or not 0 < self.weight < math.inf:
            raise ConfigError(
                f"data.weight is {self.weight!r} (files {self.title!r}); it must be a finite number above 0"
            )

    @property
    def patterns(self) -> tuple[str, ...]:
        """The globs and folders."""
        return (self.files,) if isinstance(self.files, str) else self.files

    @property
    def title(self) -> str:
        """The globs and folders as one string, for messages and metrics."""
        return ", ".join(self.patterns)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data of a run: one source, or a mixture of several.

    Attributes:
      files, exclude, format, field: the one source, as in `SourceConfig`.
      mixture: several sources instead, `[[data.mixture]]` in TOML.
      validation_fraction: fraction of documents in the validation set, in [0, 1).
      bad_records: whether a record that cannot be read stops the run, or is skipped and counted.
      shuffle: whether the order of documents is a function of (seed, epoch), or the file order.
      workers: processes that read and tokenize; 0 uses a thread. The batches are the same.
      validation_files: a glob of validation files, or a list of them, instead of a fraction of the others;
        with the format and field of the first source.
      template: finetuning's chat template: `llama-2`, `llama-3`, `mistral`, `chatml`, or a Jinja file; empty
        is the model's own.
      too_long: what happens to a finetuning example longer than a row: it is dropped and counted, truncated
        (see `train.data.examples`), or stops the run.
      parse_special: whether control tokens spelled in a text become their ids, as Hugging Face's tokenizers
        do. In the messages of conversations they are always ordinary text.
      labels: a classifier's class names; records contain the name or the index, from 0.

    Raises:
      ConfigError: for an invalid value, naming field and value.
    """

    files: Files = ""
    exclude: tuple[str, ...] = ()
    format: Format = "auto"
    field: str = "text"
    mixture: tuple[SourceConfig, ...] = ()
    validation_fraction: float = 0.01
    bad_records: BadRecords = "fail"
    shuffle: bool = True
    workers: int = 0
    validation_files: Files = ""
    template: str = ""
    too_long: TooLong = "drop"
    parse_special: bool = True
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", _patterns(self.exclude))
        object.__setattr__(self, "mixture", tuple(self.mixture))
        if self.files and self.mixture:
            raise ConfigError(f"data.files is {self.files!r} and data.mixture is set too; set one of them")
        if not _is_number(self.validation_fraction) or not 0 <= self.validation_fraction < 1:
            raise ConfigError(
                f"data.validation_fraction is {self.validation_fraction!r}; it must be at least 0 and below 1"
            )
        check_one_of("data.bad_records", self.bad_records, get_args(BadRecords))
        for name in ("shuffle", "parse_special"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"data.{name} is {getattr(self, name)!r}; it must be true or false")
        if isinstance(self.workers, bool) or not isinstance(self.workers, int) or self.workers < 0:
            raise ConfigError(f"data.workers is {self.workers!r}; it must be a whole number, at least 0")
        for name in ("files", "validation_files"):
            object.__setattr__(self, name, _globs(f"data.{name}", getattr(self, name)))
        if not isinstance(self.template, str):
            raise ConfigError(f"data.template is {self.template!r}; it must be a string")
        check_one_of("data.too_long", self.too_long, get_args(TooLong))
        object.__setattr__(self, "labels", _names(self.labels))
        if self.files:
            _ = self.sources

    @property
    def source_validation_fraction(self) -> float:
        """Fraction of the sources' own documents in the validation set: 0 with `validation_files`."""
        return 0.0 if self.validation_files else self.validation_fraction

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The one source, or the mixture.

        Raises:
          ConfigError: if `files` is invalid.
        """
        return self.mixture or (SourceConfig(self.files, self.exclude, self.format, self.field),)


def _globs(name: str, value: Any) -> Files:
    """Returns one glob as a string, several as a tuple."""
    if isinstance(value, str):
        return value
    whole = isinstance(value, (list, tuple)) and all(isinstance(glob, str) and glob for glob in value)
    if not whole or not value:
        raise ConfigError(
            f"{name} is {value!r}; use a file, or a glob such as 'corpus/**/*.txt', or a list of them"
        )
    return value[0] if len(value) == 1 else tuple(value)


def _patterns(value: Any) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f"data.exclude is {value!r}; use a list of patterns such as '*/tests/*'")
    return tuple(patterns)


def _names(value: Any) -> tuple[str, ...]:
    whole = isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)
    if not whole or len(set(value)) != len(value) or len(value) == 1:
        raise ConfigError(f"data.labels is {value!r}; use a list of two or more different class names")
    return tuple(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
