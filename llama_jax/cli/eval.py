"""`llama-jax eval`: tasks of lm-evaluation-harness, perplexity of a text, retrieval in long texts."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.cli import output
from llama_jax.cli.arguments import ModelParser, read_text
from llama_jax.console import loading, terminal
from llama_jax.console.parser import UsageError, parse_float, parse_positive_int
from llama_jax.errors import InputError

if TYPE_CHECKING:
    from llama_jax.text.model import Model

EXAMPLES = """
llama-jax eval smollm2-135m --text book.txt --window 1024 --stride 512
llama-jax eval smollm2-135m --tasks my_task.yaml --num-fewshot 3 --limit 100
llama-jax eval smollm2-135m --tasks hellaswag,piqa --download --log-samples --out results
llama-jax eval smollm2-135m --passkey --needle --lengths 1024,4096 --depths 0,0.5,1 --out maps
"""

DESCRIPTION = """\
Score a model. One of:
  --text FILE          loss per token, perplexity and bits per byte, each token scored once
  --tasks NAMES        tasks of lm-evaluation-harness (needs the eval extra), with its scores
  --passkey, --needle  whether a number hidden in a long text is found, by length and depth

The data of tasks is read from disk, unless --download is given.
"""

# The options of each kind of evaluation; others are refused.
_TEXT = ("window", "stride")
_TASKS = (
    *("num_fewshot", "limit", "log_samples", "chat_template", "fewshot_as_multiturn", "system"),
    *("max_length", "download", "out"),
)
_RETRIEVAL = ("lengths", "depths", "samples", "haystack", "seed", "out")


def run(argv: Sequence[str]) -> None:
    """Runs the command."""
    parser = _parser()
    args = parser.parse(argv)
    kind = _kind(args)
    if args.out is not None:
        _check_folder(args.out)
    if kind == "text":
        _perplexity(args)
    elif kind == "tasks":
        _tasks(args)
    else:
        _retrieval(args)


def _kind(args: argparse.Namespace) -> str:
    """The kind of evaluation that is asked for.

    Raises:
      UsageError: for none, for two, or for an option of another.
    """
    asked = {
        "text": args.text is not None,
        "tasks": args.tasks is not None,
        "retrieval": args.passkey or args.needle,
    }
    if sum(asked.values()) != 1:
        raise UsageError(
            f"give {'only one' if any(asked.values()) else 'one'} of --tasks NAMES, --text FILE, "
            "and --passkey or --needle (or both); see: llama-jax eval --help"
        )
    kind = next(name for name, is_asked in asked.items() if is_asked)
    own = {"text": _TEXT, "tasks": _TASKS, "retrieval": _RETRIEVAL}
    for name in dict.fromkeys((*_TEXT, *_TASKS, *_RETRIEVAL)):
        if name not in own[kind] and getattr(args, name) not in (None, False):
            options = {"text": "--text", "tasks": "--tasks", "retrieval": "--passkey or --needle"}
            owners = [options[key] for key, names in own.items() if name in names]
            raise UsageError(f"--{name.replace('_', '-')} belongs to {' or '.join(owners)}; leave it out")
    return kind


def _perplexity(args: argparse.Namespace) -> None:
    text = read_text(args.text)
    if not text.strip():
        raise InputError(f"{args.text}: is empty; give a file with text")
    if args.window is not None and args.stride is not None and args.stride > args.window:
        raise InputError(
            f"--stride {args.stride} is larger than --window {args.window}: tokens between two windows would "
            "be lost"
        )
    model = _load(args)

    from llama_jax.eval.perplexity import perplexity

    started = time.perf_counter()
    with terminal.counting_bars() as bars:
        found = perplexity(
            model,
            text,
            window=args.window,
            stride=args.stride,
            batch_size=args.batch_size or 1,
            progress=functools.partial(bars, "windows"),
        )
    seconds = time.perf_counter() - started
    if args.json:
        output.print_json(_about(args) | {"text": args.text, **dataclasses.asdict(found), "seconds": seconds})
        return
    rows = [
        ["tokens scored", f"{found.tokens:,}"],
        ["bytes", f"{found.bytes:,}"],
        ["loss", f"{found.loss:.4f} nats per token"],
        ["perplexity", f"{found.perplexity:.4f}"],
        ["bits per byte", f"{found.bits_per_byte:.4f}"],
    ]
    output.print_table(rows, (args.text, f"windows of {found.window} tokens, {found.stride} apart"))


def _tasks(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("tasks need lm-evaluation-harness: pip install 'llama-jax[eval]'")
    if args.log_samples and args.out is None:
        raise UsageError("--log-samples needs --out DIR, where the samples are written")
    if args.fewshot_as_multiturn and not args.chat_template:
        raise UsageError("--fewshot-as-multiturn needs --chat-template: the examples become its turns")
    names = [name for part in args.tasks.split(",") if (name := part.strip())]
    if not names:
        raise UsageError("--tasks is empty; give names or files, as in --tasks hellaswag,my_task.yaml")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of lm-eval and datasets
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with terminal.spinner("loading tasks ..."), terminal.warnings_as_notes():
        from llama_jax.eval.harness import HarnessModel
        from llama_jax.eval.tasks import evaluate_tasks, finite, load_tasks

        tasks = load_tasks(names, download=args.download)
    model = _load(args)
    started = time.perf_counter()
    with terminal.counting_bars() as bars:
        harness = HarnessModel(
            model, batch_size=args.batch_size or 8, max_length=args.max_length, report=bars
        )
        results = evaluate_tasks(
            harness,
            tasks,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            log_samples=args.log_samples,
            chat=args.chat_template,
            multiturn=args.fewshot_as_multiturn,
            system=args.system,
        )
    kept = ("results", "groups", "n-shot", "n-samples", "versions", "higher_is_better")
    report = _about(args) | {name: results[name] for name in kept if name in results}
    report |= {"truncated": harness.truncated, "seconds": time.perf_counter() - started}
    report = finite(report)
    if harness.truncated:
        terminal.note(
            f"{harness.truncated} requests are longer than the context, and lost their first tokens"
        )
    files = {"results.json": json.dumps(report, indent=1, allow_nan=False) + "\n"}
    for name, samples in results.get("samples", {}).items() if args.log_samples else ():
        lines = (json.dumps(finite(sample), ensure_ascii=False) + "\n" for sample in samples)
        files[f"samples_{name.replace('/', '_')}.jsonl"] = "".join(lines)
    _write(args.out, files)
    if args.json:
        output.print_json(report)
    else:
        _print_results(report)


def _print_results(report: Mapping[str, Any]) -> None:
    rows = []
    for task, metrics in (report["results"] | report.get("groups", {})).items():
        count = report["n-samples"].get(task, {}).get("effective", "")
        shots = report["n-shot"].get(task, "")
        for name, value in metrics.items():
            metric, _, filtered = name.partition(",")
            if not isinstance(value, float) or metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{filtered}")
            deviation = f"± {error:.4f}" if isinstance(error, float) else ""
            label = metric if filtered == "none" else f"{metric}, {filtered}"
            rows.append([task, str(count), str(shots), label, f"{value:.4f}", deviation])
    output.print_table(rows, ("task", "n", "shots", "metric", "value", ""), right=(1, 2, 4, 5))


def _retrieval(args: argparse.Namespace) -> None:
    from llama_jax.eval import heat_map
    from llama_jax.eval.retrieval import Kind, check_lengths, retrieval, split_sentences

    if args.out is not None:
        heat_map.check_plots()
    lengths = args.lengths or [1024, 2048]
    depths = [0.0, 0.25, 0.5, 0.75, 1.0] if args.depths is None else args.depths
    if args.haystack is not None and not args.needle:
        raise UsageError("--haystack belongs to --needle; the passkey test has a text of its own")
    haystack = None if args.haystack is None else read_text(args.haystack)
    if haystack is not None:
        split_sentences(haystack)
    model = _load(args)
    check_lengths(model.config.max_position_embeddings, lengths, depths)
    kinds: list[Kind] = [kind for kind in ("passkey", "needle") if getattr(args, kind)]
    found = {}
    with terminal.counting_bars() as bars:
        for kind in kinds:
            bar = functools.partial(bars, kind)
            found[kind] = retrieval(
                model,
                kind,
                lengths,
                depths,
                samples=args.samples or 1,
                haystack=haystack,
                seed=args.seed or 0,
                batch_size=args.batch_size or 1,
                progress=bar,
            )
    report = _about(args) | {kind: dataclasses.asdict(result) for kind, result in found.items()}
    files: dict[str, str | bytes] = {}
    for kind, result in found.items() if args.out is not None else ():
        maps, label = {f"{args.model}": result.found}, "keys found"
        title = f"{kind}: {args.model}"
        notes = [f"{result.samples} text(s) of each length and depth, {args.dtype}; greedy decoding"]
        files[f"{kind}.png"] = heat_map.png(maps, lengths, depths, label)
        files[f"{kind}.html"] = heat_map.page(maps, lengths, depths, label, title=title, notes=notes)
    if args.out is not None:
        files["retrieval.json"] = json.dumps(report, indent=1) + "\n"
    _write(args.out, files)
    if args.json:
        output.print_json(report)
        return
    for kind, result in found.items():
        rows = [
            [f"{length:,} tokens", *(f"{share:.0%}" for share in shares)]
            for length, shares in zip(result.lengths, result.found, strict=True)
        ]
        header = (f"{kind}: found at", *(f"{depth:.0%}" for depth in result.depths))
        output.print_table(rows, header, right=range(1, len(header)))


def _load(args: argparse.Namespace) -> Model:
    return loading.load(args.model, args.dtype, args.bits, args.adapter, args.tokenizer)


def _about(args: argparse.Namespace) -> dict[str, Any]:
    return {"model": args.model, "dtype": args.dtype, "bits": args.bits}


def _check_folder(name: str) -> None:
    """Checks before long work that files can be written into a folder, which may be made."""
    folder = Path(name).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"--out {name}: {existing} is no folder that can be written to; give another one")


def _write(folder: str | None, files: Mapping[str, str | bytes]) -> None:
    """Writes files, each of them whole or not at all."""
    from llama_jax.storage.atomic import write_atomically

    if folder is not None:
        for name, content in files.items():
            write_atomically(Path(folder) / name, content)
        terminal.note(f"wrote {', '.join(files)} to {folder}")


def _parse_lengths(text: str) -> list[int]:
    return [parse_positive_int(part.strip()) for part in text.split(",")]


def _parse_depths(text: str) -> list[float]:
    depths = [parse_float(part.strip()) for part in text.split(",")]
    for depth in depths:
        if not 0 <= depth <= 1:
            raise argparse.ArgumentTypeError(f"depth {depth:g} must be from 0, the beginning, to 1, the end")
    return depths


def _parse_count(text: str) -> int:
    return 0 if text.strip() == "0" else parse_positive_int(text)


def _parse_limit(text: str) -> int | float:
    value = parse_float(text)
    if not (0 < value < 1 or (value >= 1 and math.isfinite(value) and value == int(value))):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, or a share below 1")
    return value if value < 1 else int(value)


def _parser() -> ModelParser:
    parser = ModelParser("llama-jax eval", DESCRIPTION, EXAMPLES)
    parser.add_model()
    what = parser.add_argument_group("what to evaluate").add_argument
    what("--text", metavar="FILE", help="perplexity of a UTF-8 text file")
    what(
        "--tasks",
        metavar="NAMES",
        help="tasks, separated by commas: names of lm-eval's, * for several; YAML files; folders of them",
    )
    what("--passkey", action="store_true", help="find a pass key in four sentences that repeat themselves")
    what("--needle", action="store_true", help="find a number in prose")
    count: dict[str, Any] = {"type": parse_positive_int, "metavar": "N"}
    text = parser.add_argument_group("of --text").add_argument
    text("--window", **count, help="tokens that the model reads at once (default: its context)")
    text("--stride", **count, help="tokens scored by each window after the first (default: half of --window)")
    tasks = parser.add_argument_group("of --tasks").add_argument
    tasks("--num-fewshot", type=_parse_count, metavar="N", help="examples before each question")
    tasks(
        "--limit",
        type=_parse_limit,
        metavar="N",
        help="the first N questions of each task, or a share below 1",
    )
    tasks("--chat-template", action="store_true", help="ask in the model's chat template")
    tasks("--fewshot-as-multiturn", action="store_true", help="with it: the examples are turns")
    tasks("--system", metavar="TEXT", help="the system message")
    tasks("--max-length", **count, help="tokens that the model reads at once (default: its context)")
    tasks(
        "--log-samples", action="store_true", help="write every question and answer to --out, as JSON lines"
    )
    tasks("--download", action="store_true", help="fetch data that is not on disk from the Hugging Face Hub")
    retrieval = parser.add_argument_group("of --passkey and --needle").add_argument
    retrieval("--lengths", type=_parse_lengths, metavar="N,...", help="in tokens (default: 1024,2048)")
    retrieval(
        "--depths",
        type=_parse_depths,
        metavar="X,...",
        help="0 is the beginning, 1 the end (default: 0,0.25,0.5,0.75,1)",
    )
    retrieval("--samples", **count, help="texts of each length and depth (default: 1)")
    retrieval(
        "--haystack", metavar="FILE", help="the prose of --needle (default: a built-in page of English)"
    )
    retrieval("--seed", type=_parse_count, metavar="N", help="draws the numbers (default: 0)")
    parser.add_argument(
        "--batch-size", **count, help="texts in a forward pass (default: 8 for tasks, otherwise 1)"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="also write results there: JSON; for --passkey and --needle PNG and HTML"
    )
    parser.add_adapter()
    parser.add_tokenizer()
    parser.add_dtype()
    parser.add_json()
    return parser
