"""`llama-jax convert`: write a checkpoint in another format, dtype or shape."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from llama_jax.cli import output
from llama_jax.cli.arguments import MODEL_HELP, ModelParser, full_dtype
from llama_jax.console import loading, terminal
from llama_jax.console.parser import UsageError, parse_float, parse_positive_int

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
        "Convert a checkpoint to another format, one tensor at a time: memory use stays below 1 GB plus the\n"
        "largest tensor, whatever the model's size. Rerun an interrupted conversion to resume it."
    )
    parser = ModelParser("llama-jax convert", summary, EXAMPLES)
    option = parser.add_argument
    option("source", metavar="SRC", help="a known name or a path, as MODEL below")
    option("target", metavar="DST", help="output: a directory, or a file ending in .gguf")
    option("--to", choices=FORMATS, help="output format (default: gguf if DST ends in .gguf, otherwise hf)")
    option(
        "--dtype",
        type=full_dtype,
        choices=DTYPES,
        help="dtype of the tensors; q8_0 for gguf only, int8 for llama2c only (default: unchanged, quantized "
        "tensors as float32)",
    )
    option(
        "--shards",
        type=parse_positive_int,
        metavar="N",
        help="write N shards (meta) or at most N files (hf)",
    )
    option(
        "--kv-heads",
        type=parse_positive_int,
        metavar="K",
        help="reduce to K key/value heads by mean-pooling groups of heads",
    )
    option(
        "--average",
        nargs="+",
        default=[],
        metavar="SRC",
        help="other checkpoints to average with SRC; give it after SRC and DST",
    )
    option(
        "--weights",
        nargs="+",
        type=parse_float,
        metavar="W",
        help="weights of the average, for SRC and then each of --average; they sum to 1",
    )
    option(
        "--vocab-size",
        type=parse_positive_int,
        metavar="V",
        help="resize the embeddings to V rows: new rows are the mean row, excess rows are dropped",
    )
    option("--tokenizer", metavar="PATH", help="tokenizer to write (default: SRC's)")
    parser.add_adapter()
    parser.add_json()
    parser.epilog = f"{MODEL_HELP}\n{parser.epilog}"
    args = parser.parse(argv)
    if args.weights and not args.average:
        raise UsageError("--weights needs --average; name the other checkpoints with --average")

    from llama_jax.text import convert as library
    from llama_jax.weights import open_source

    source, *average = (loading.resolve(name) for name in (args.source, *args.average))
    started = time.perf_counter()
    with (
        terminal.warnings_as_notes(),
        terminal.progress_bar("converting") as progress,
        _resume_hint_on_interrupt(args.target),
    ):
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
            progress=_note_resumption(progress),
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
    output.print_line(f"{target}: {written.format}, {len(written.tensors)} tensors, {rate}")


@contextlib.contextmanager
def _resume_hint_on_interrupt(target: str) -> Iterator[None]:
    """Notes on Ctrl-C that the conversion can be resumed."""
    try:
        yield
    except KeyboardInterrupt:
        from llama_jax.weights.write.staging import SUFFIX

        terminal.note(f"\ninterrupted; rerun the command to resume from {target}{SUFFIX}")
        raise


def _note_resumption(progress: Progress) -> Progress:
    """Wraps `progress` so that its first call notes whether an earlier conversion is resumed."""
    first_call = True

    def report(done: int, total: int, name: str) -> None:
        nonlocal first_call
        if first_call and done:
            terminal.note(f"resuming at {terminal.human_bytes(done)} of {terminal.human_bytes(total)}")
        first_call = False
        progress(done, total, name)

    return report
