"""The command `llama-jax data prepare`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llama_jax.console import loading, terminal
from llama_jax.console.parser import Parser, UsageError, parse_int, suggestion
from llama_jax.errors import ConfigError
from llama_jax.storage import as_path
from llama_jax.tokenizer import load_tokenizer

from ..command import check_packages, find_config, split_settings
from ..config.data import DataConfig
from ..config.read import load_config

EXAMPLES = """
llama-jax data prepare configs/llama2_7b.toml tokens --data.files 'corpus/*.jsonl'
llama-jax train configs/llama2_7b.toml --data.files tokens
llama-jax data prepare run.toml /shared/tokens --runner dataflow --project P --region R --temp_location gs://B/tmp
llama-jax data prepare run.toml /shared/tokens --runner flink --flink_master HOST:8081 --parallelism 512
"""
_RUNNERS = ("local", "direct", "prism", "dataflow", "flink", "spark", "portable")
_NOTE_SECONDS = 30.0  # between lines of progress where there is no terminal


def run(argv: Sequence[str]) -> None:
    """Runs the command.

    Raises:
      LlamaJaxError: for bad data or bad arguments.
    """
    parser = Parser(
        "llama-jax data prepare",
        "Tokenize the text of a pretraining run once, remove exact duplicates, and shuffle it into shards.\n"
        "The same command again goes on where a killed one stopped. CONFIG and its settings are those of\n"
        "llama-jax train; OUT then replaces data.files, and gives the same batches.",
        EXAMPLES,
    )
    parser.add_argument("config", metavar="CONFIG", help="the run's TOML file")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument(
        "--runner",
        default="local",
        metavar="NAME",
        help=f"{', '.join(_RUNNERS)}: local is this machine (default); the others are Apache Beam's (extra "
        "beam), whose own options may follow",
    )
    parser.add_argument(
        "--workers", type=parse_int, default=0, help="processes of --runner local (default: one a core)"
    )
    parser.add_argument("--keep-duplicates", action="store_true", help="keep documents that occur before")
    parser.add_json()
    check_packages()
    settings, others = split_settings(argv)
    ours, beams = _split_options(parser, others)
    args = parser.parse(ours)
    runner = _runner_name(args.runner)
    if runner == "local" and beams:
        parser.parse(others)  # explains the first of them
    config = load_config(find_config(args.config), settings)
    if config.train.objective != "pretrain":
        raise ConfigError(
            f'train.objective is "{config.train.objective}", whose examples are tokenized during training; '
            "only pretraining text can be prepared"
        )
    if not config.tokenizer.path:
        raise ConfigError(
            "tokenizer.path is not set; train a vocabulary with `llama-jax tokenizer train`, and set its "
            "path here and for the run"
        )
    from .local import LocalRunner
    from .steps import Runner, Settings, prepare

    chosen: Runner
    if runner == "local":
        chosen = LocalRunner(args.workers)
    else:
        from .pipeline import BeamRunner

        chosen = BeamRunner(runner, beams)
    tokenizer = load_tokenizer(loading.resolve(config.tokenizer.path))
    with _progress() as progress:
        manifests = prepare(
            config.data,
            tokenizer,
            as_path(args.out),
            seed=config.train.seed,
            settings=Settings(chosen, args.keep_duplicates, progress, terminal.note),
        )
    _report(config.data, args.out, manifests, args.json)


def _split_options(parser: Parser, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates our arguments from Beam's: options that are not ours, and the values that follow them."""
    ours: list[str] = []
    beams: list[str] = []
    chosen = ours
    for argument in argv:
        if argument.startswith("--"):
            chosen = ours if parser.has_option(argument.partition("=")[0]) else beams
        chosen.append(argument)
    return ours, beams


def _runner_name(name: str) -> str:
    short = name.lower().removesuffix("runner")
    if short not in _RUNNERS:
        raise UsageError(
            f"unknown --runner {name!r}{suggestion(short, _RUNNERS)}; the runners are {', '.join(_RUNNERS)}"
        )
    return short


@contextmanager
def _progress() -> Iterator[Any]:
    """Yields progress(step, records done, all records): a bar, or a line now and then without a terminal."""
    screen = terminal.console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    last = time.monotonic()
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def update(step: str, done: int, total: int) -> None:
            nonlocal last
            if step not in tasks:
                tasks[step] = bar.add_task(step, total=total)
            bar.update(tasks[step], completed=done)
            if not screen.is_terminal and time.monotonic() - last > _NOTE_SECONDS:
                last = time.monotonic()
                terminal.note(f"{step}: {done} of {total} records")

        yield update


def _report(config: DataConfig, out: str, manifests: Sequence[dict[str, Any]], as_json: bool) -> None:
    folder = as_path(out)
    files = [str(folder / str(i)) for i in range(len(config.mixture))] or [out]
    validation = str(folder / "validation") if config.validation_files else ""
    if as_json:
        shown = ("documents", "tokens", "bytes", "duplicates", "skipped", "lengths", "fingerprint")
        folders = [*files, *([validation] if validation else [])]
        pairs = zip(folders, manifests, strict=True)
        result = [{"folder": folder, **{name: m[name] for name in shown}} for folder, m in pairs]
        sys.stdout.write(json.dumps({"folders": result}) + "\n")
        return
    titles = [source.title for source in config.sources] + ([validation] if validation else [])
    for title, manifest in zip(titles, manifests, strict=True):
        shards = len(manifest["train"]) + len(manifest["validation"])
        skipped = "".join(f", {count} {reason}" for reason, count in manifest["skipped"].items())
        terminal.note(
            f"{title}: {manifest['documents']} documents, {manifest['tokens']} tokens, "
            f"{terminal.human_bytes(manifest['bytes'])} of text, in {shards} shards; left out: "
            f"{manifest['duplicates']} duplicates{skipped}"
        )
    where = f"data.files = {out!r}" if not config.mixture else f"data.mixture of the files {files}"
    held_out = f" and data.validation_files = {validation!r}" if validation else ""
    terminal.note(f"train with {where}{held_out}")
