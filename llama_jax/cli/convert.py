"""`llama-jax convert`: a checkpoint in another format, or another form."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from llama_jax.cli import output
from llama_jax.cli.arguments import MODEL_HELP, ModelParser
from llama_jax.console import loading, terminal
from llama_jax.console.parser import UsageError, number, positive

EXAMPLES = """
llama-jax convert smollm2-135m smollm2-hf
llama-jax convert smollm2-hf smollm2.gguf --dtype q8_0
llama-jax convert smollm2-hf smollm2-meta --to meta --shards 3 --dtype bfloat16
llama-jax convert smollm2-hf smollm2-mqa --kv-heads 1
llama-jax convert smollm2-135m finetuned.gguf --adapter runs/lora
llama-jax convert run-a soup --average run-b run-c
"""

Progress = Callable[[int, int, str], None]

FORMATS = ("hf", "meta", "gguf", "llama2c", "orbax")
DTYPES = ("float32", "bfloat16", "float16", "q8_0", "int8")


def run(argv: Sequence[str]) -> None:
    """Runs the command."""
    summary = (
        "Write a checkpoint in another format, tensor by tensor: memory stays below 1 GB beside the largest\n"
        "tensor, whatever the model's size. An interrupted conversion goes on when it is run again."
    )
    parser = ModelParser("llama-jax convert", summary, EXAMPLES)
    option = parser.add_argument
    option("source", metavar="SRC", help="a known name or a path, as MODEL below")
    option("target", metavar="DST", help="where to write: a directory, or a file ending in .gguf")
    option("--to", choices=FORMATS, help="the format (default: gguf where DST ends so, hf otherwise)")
    option(
        "--dtype",
        choices=DTYPES,
        help="of the tensors; q8_0 is gguf's, int8 llama2c's (default: as they are, quantised as float32)",
    )
    option("--shards", type=positive, metavar="N", help="write N parts (meta), or N files at most (hf)")
    option(
        "--kv-heads", type=positive, metavar="K", help="average key and value heads in groups, to K of them"
    )
    several = "other checkpoints to average with SRC; after SRC and DST"
    option("--average", nargs="+", default=[], metavar="SRC", help=several)
    option(
        "--weights", nargs="+", type=number, metavar="W", help="of SRC and each of --average; their sum is 1"
    )
    option("--vocab-size", type=positive, metavar="V", help="add mean rows to the vocabulary, or cut it")
    option("--tokenizer", metavar="PATH", help="take the vocabulary from here (default: SRC's)")
    parser.add_adapter()
    parser.add_json()
    parser.epilog = f"{MODEL_HELP}\n{parser.epilog}"
    args = parser.parse(argv)
    if args.weights and not args.average:
        raise UsageError("--weights without --average; name the other checkpoints with --average")

    from llama_jax.text import convert as library
    from llama_jax.weights import open_source

    source, *average = (loading.resolve(name) for name in (args.source, *args.average))
    started = time.perf_counter()
    with terminal.warnings_as_notes(), terminal.progress_bar("converting") as bar, _on_interrupt(args.target):
        target = library.convert(
            source,
            args.target,
            args.to,
            dtype=args.dtype,
            adapter=args.adapter,
            kv_heads=args.kv_heads,
            average=average,
            weights=args.weights,
            vocab_size=args.vocab_size,
            tokenizer=args.tokenizer,
            shards=args.shards,
            progress=_telling_of_resumption(bar),
        )
    seconds = time.perf_counter() - started
    written = open_source(target)
    nbytes = sum(info.nbytes for info in written.tensors.values())
    if args.json:
        output.print_json(
            {
                "path": str(target),
                "format": written.format,
                "tensors": len(written.tensors),
                "parameters": written.config.num_params,
                "bytes": nbytes,
                "seconds": seconds,
            }
        )
        return
    rate = f"{terminal.human_bytes(nbytes)} in {seconds:.1f} s, {terminal.human_bytes(nbytes / seconds)}/s"
    print(f"{target}: {written.format}, {len(written.tensors)} tensors, {rate}")


@contextlib.contextmanager
def _on_interrupt(target: str) -> Iterator[None]:
    """Says on Ctrl-C that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        from llama_jax.weights.write.staging import SUFFIX

        terminal.note(f"\ninterrupted; the same command goes on from what is in {target}{SUFFIX}")
        raise


def _telling_of_resumption(progress: Progress) -> Progress:
    """Passes progress on, with a note first if an earlier run's work is gone on with."""
    told = False

    def report(done: int, total: int, name: str) -> None:
        nonlocal told
        if not told and done:
            terminal.note(f"going on from {terminal.human_bytes(done)} of {terminal.human_bytes(total)}")
        told = True
        progress(done, total, name)

    return report
