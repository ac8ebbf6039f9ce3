"""`python -m llama_jax.train.data CONFIG OUT_DIR`: tokenizes a run's data ahead of time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from llama_jax.console import loading, terminal
from llama_jax.console.exit_status import exit_status
from llama_jax.console.parser import Parser
from llama_jax.errors import ConfigError
from llama_jax.tokenizer import Tokenizer, load_tokenizer

from ..config.data import BadRecords, DataConfig, SourceConfig
from ..config.read import load_config
from .encode import Encoder
from .lanes import format_counts
from .write import atomic_directory, write_tokens

EXAMPLES = """
python -m llama_jax.train.data configs/llama2_7b.toml tokens --tokenizer.path tokenizer.model
llama-jax train configs/llama2_7b.toml --data.files tokens --tokenizer.path tokenizer.model
"""


def main(argv: Sequence[str]) -> None:
    """Runs the command.

    Raises:
      LlamaJaxError: for bad data or bad arguments.
    """
    parser = Parser(
        "python -m llama_jax.train.data",
        "Tokenize the data of a run once, instead of during training. Takes the settings of llama-jax train.",
        EXAMPLES,
    )
    parser.add_argument("config", metavar="CONFIG", help="the run's TOML file")
    parser.add_argument("out", metavar="OUT_DIR", help="a directory that does not exist yet")
    args = parser.parse(argv[:2])
    config = load_config(args.config, argv[2:])
    if config.train.objective != "pretrain":
        raise ConfigError(
            f'train.objective is "{config.train.objective}", whose examples are tokenized during training; '
            "only pretraining text can be tokenized ahead of time"
        )
    if not config.tokenizer.path:
        raise ConfigError(
            "tokenizer.path is not set; train a vocabulary with `llama-jax tokenizer train`, and set its "
            "path here and for the run"
        )
    tokenize(config.data, load_tokenizer(loading.resolve(config.tokenizer.path)), Path(args.out))


def tokenize(config: DataConfig, tokenizer: Tokenizer, out: Path) -> None:
    """Writes the directory `out`, with a subdirectory 0, 1, ... per source of a mixture; reports on stderr.

    Raises:
      DataError: if the data cannot be read, or `out` exists or cannot be written.
    """
    encode = Encoder(tokenizer)
    if not config.mixture:
        _tokenize(config.sources[0], encode, out, config.bad_records)
        terminal.note(f"train with data.files = {str(out)!r}")
        return
    with atomic_directory(out) as partial:
        for i, source in enumerate(config.mixture):
            _tokenize(source, encode, partial / str(i), config.bad_records)
    names = ", ".join(repr(str(out / str(i))) for i in range(len(config.mixture)))
    terminal.note(f"train with the files of data.mixture, in this order: {names}")


def _tokenize(source: SourceConfig, encode: Encoder, out: Path, bad_records: BadRecords) -> None:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"tokenizing {source.files}", total=None)
        result = write_tokens(
            source,
            encode,
            out,
            bad_records=bad_records,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    skipped = f"; skipped: {format_counts(result['skipped'])}" if result["skipped"] else ""
    terminal.note(
        f"{source.files}: {result['documents']} documents, {result['tokens']} tokens, "
        f"{terminal.human_bytes(result['bytes'])} of text{skipped}"
    )


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
