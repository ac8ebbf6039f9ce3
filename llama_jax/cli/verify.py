"""`llama-jax verify`: whether two checkpoints hold the same model, and if not, where they part."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.cli import output
from llama_jax.cli.arguments import ModelParser
from llama_jax.console import loading, terminal
from llama_jax.console.parser import UsageError, number
from llama_jax.errors import InputError

if TYPE_CHECKING:
    from llama_jax.eval.verify import Report, StreamDifference, Text
    from llama_jax.weights.compare import FieldDifference, TensorDifference

EXAMPLES = """
llama-jax verify smollm2-135m path/to/converted
llama-jax verify path/to/model path/to/model.gguf --prompt "The capital of France is"
llama-jax verify path/to/model path/to/other --tensors-only --json
llama-jax verify path/to/hf-directory --with transformers
"""

RULE = """\
Every tensor and every field of the configuration is compared, then what both predict at each token of a
text. OTHER holds the same model if
  - each tensor has the same bits; or, where the two store different types, one is exactly the other's
    rounding to its own type, Q8_0 and other blocks too; or they are within --tolerance;
  - no field differs that the numbers depend on (the context's length does not count, nor two ways to
    write the same rotary frequencies, nor an output that is tied in one and equal in the other);
  - the vocabularies agree, where both have one;
  - KL(MODEL || OTHER), mean over the text's tokens, is at most --max-kl.

exit status: 0 the same model; 1 not the same; 2 bad input, or a checkpoint that cannot be read.
"""

_BYTES_READ = 1 << 16  # more than 512 tokens are never read, and few are longer than 128 bytes


def run(argv: Sequence[str]) -> None:
    """Runs the command; exits with 1 where the models are not the same."""
    args = _parser().parse(argv)
    if args.other is None and args.program is None:
        raise UsageError("missing OTHER; give another checkpoint, or --with transformers to run MODEL there")
    if args.prompt is not None and args.text is not None:
        raise UsageError("--prompt and --text are both given; leave one of them out")
    text = args.prompt if args.text is None else _read_text(args.text)

    from llama_jax.eval.verify import compare

    loading.start_jax()
    a = loading.resolve(args.model)
    b = a if args.other is None else loading.resolve(args.other)
    with terminal.warnings_as_notes(), terminal.progress_bar("comparing") as progress:
        report = compare(
            a,
            b,
            b_runs_in=args.program or "llama_jax",
            text=text,
            outputs=not args.tensors_only,
            dtype=args.dtype,
            tolerance=args.tolerance,
            max_kl=args.max_kl,
            progress=progress,
        )
    if args.json:
        output.print_json(_as_json(report))
    else:
        _show(report)
    if not report.same:
        sys.stdout.flush()
        sys.exit(1)


def _parser() -> ModelParser:
    summary = "Compare two checkpoints of any formats and types, tensor by tensor and in what they predict."
    parser = ModelParser("llama-jax verify", summary, EXAMPLES)
    parser.add_model()
    option = parser.add_argument
    option("other", metavar="OTHER", nargs="?", help="likewise (default, with --with: MODEL)")
    option(
        "--with",
        dest="program",
        choices=("transformers",),
        help="run OTHER, a Hugging Face directory, in transformers itself (needs torch and transformers)",
    )
    option("--prompt", metavar="TEXT", help="what both read (default: a page of English that is built in)")
    option("--text", metavar="FILE", help="the same from a file; at most 512 tokens are read")
    option(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="compute in this type (default: float32)",
    )
    option("--tensors-only", action="store_true", help="do not run the models")
    option(
        "--tolerance",
        type=_not_negative,
        default=0.0,
        metavar="X",
        help="let tensors differ by this share of their largest value (default: 0); see also --max-kl",
    )
    option(
        "--max-kl",
        type=_not_negative,
        metavar="NATS",
        help="let predictions differ by this KL divergence (default: 1e-8; where tensors are rounded, or "
        "transformers computes, in float16 1e-4, in bfloat16 or 8 bits 1e-2, in fewer 1)",
    )
    parser.add_json()
    parser.epilog = f"{RULE}\n{parser.epilog}"
    return parser


def _not_negative(text: str) -> float:
    value = number(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be at least 0")
    return value


def _read_text(name: str) -> str:
    """Reads the beginning of a text file.

    Raises:
      InputError: if it cannot be read, or is not UTF-8.
    """
    try:
        with Path(name).expanduser().open("rb") as file:
            data = file.read(_BYTES_READ)
            whole = not file.read(1)
    except (OSError, RuntimeError, ValueError) as error:  # a path with a NUL, no such user's home
        raise InputError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if not whole and error.start >= len(data) - 3:  # cut within a character
            return data[: error.start].decode()
        where = f"byte {data[error.start]:#04x} at offset {error.start}"
        raise InputError(f"{name}: is not UTF-8 text: {where}; convert it first") from None


def _as_json(report: Report) -> dict[str, Any]:
    fields = dataclasses.asdict(report)
    parted = None if report.parted is None else dataclasses.asdict(report.parted)
    verdict = {"same": report.same, "problems": report.problems, "parted": parted}
    return dict(_finite(verdict | fields))


def _finite(value: Any) -> Any:
    """`value` with None for numbers that JSON has not."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _show(report: Report) -> None:
    """Prints tables, and the verdict as the last line."""
    print(f"A  {report.a.path}  {report.a.format}\nB  {report.b.path}  {report.b.format}\n")
    if report.fields:
        rows = [_field_row(field) for field in report.fields]
        output.print_table(rows, ("config", "A", "B", ""))
    header = ("tensor", "type", "count", "", "max |A - B|", "of the largest", "in layer")
    output.print_table([_kind_row(kind) for kind in _kinds(report.tensors)], header, right=(2, 4, 5, 6))
    for tensor in report.tensors:
        if any(tensor.not_finite):
            a, b = tensor.not_finite
            print(f"{tensor.name} has values that are NaN or infinite: {a} in A, {b} in B")
    if report.text is not None:
        _show_outputs(report, report.text)
    if not report.same and report.parted is not None:
        rows = [[_place(at), f"{at.mean:.2g}", f"{at.most:.2g}"] for at in report.streams]
        output.print_table(rows, ("residual stream after", "mean |A - B| / |A|", "largest"), right=(1, 2))
        print(_where_they_part(report, report.parted))
    print(_verdict(report))


def _show_outputs(report: Report, text: Text) -> None:
    rows = [["text", f"{text.what}, {len(text.ids)} tokens"]]
    if text.differences is not None:
        rows.append(["vocabularies", "; ".join(text.differences) or "alike"])
    rows += [["", note] for note in text.notes]
    found = report.outputs
    if found is None:
        rows.append(["outputs", "not compared: the vocabularies have different sizes"])
    else:
        rows.append(["KL(A || B)", f"mean {found.mean_kl:.2g}, largest {found.max_kl:.2g} nats"])
        rows.append(["logits", f"differ by {found.max_difference:.2g} at most"])
        rows.append(["likeliest token", f"the same at {found.top1} of {found.tokens}"])
        if found.perplexity is not None:
            rows.append(["perplexity", " A, ".join(f"{value:.6g}" for value in found.perplexity) + " B"])
    output.print_table(rows, ("outputs", ""))


def _field_row(field: FieldDifference) -> list[str]:
    a, b = (f"{value:.10g}" if isinstance(value, float) else str(value) for value in field.values)
    return [field.name, a, b, "" if field.matters else "without effect on the numbers"]


def _kinds(tensors: Sequence[TensorDifference]) -> Iterator[list[TensorDifference]]:
    """Yields the tensors of each leaf, those of all layers together."""
    kinds: dict[str, list[TensorDifference]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.leaf, []).append(tensor)
    return iter(kinds.values())


def _kind_row(kind: Sequence[TensorDifference]) -> list[str]:
    first = kind[0]
    name = first.name if first.layer is None else first.name.replace(f".{first.layer}.", ".*.", 1)
    types = [", ".join(sorted({tensor.types[side] for tensor in kind})) for side in (0, 1)]
    counts = Counter(_result(tensor) for tensor in kind)
    several = len(counts) > 1
    results = ", ".join(f"{count} {what}" if several else what for what, count in counts.items())
    row = [name, " / ".join(dict.fromkeys(types)), str(len(kind)), results]
    worst = max(kind, key=lambda tensor: tensor.relative or 0.0)
    if not worst.relative:
        return [*row, "", "", ""]
    layer = "" if worst.layer is None else str(worst.layer)
    return [*row, f"{worst.max_difference:.2g}", f"{worst.relative:.2g}", layer]


def _result(tensor: TensorDifference) -> str:
    if tensor.verdict == "rounded":
        return f"rounded to {tensor.rounded_to}"
    if tensor.verdict == "shape":
        a, b = tensor.shapes
        return f"shape {list(a)} / {list(b)}"
    return tensor.verdict


def _place(at: StreamDifference) -> str:
    return "the embedding" if at.layer is None else f"layer {at.layer}"


def _where_they_part(report: Report, parted: StreamDifference) -> str:
    def there(tensor: TensorDifference) -> bool:
        return tensor.layer == parted.layer if parted.layer is not None else tensor.leaf.startswith("embed")

    names = [tensor.name for tensor in report.tensors if there(tensor) and not tensor.same]
    tensors = f"of its tensors these differ: {', '.join(names)}" if names else "none of its tensors differs"
    return f"They part at {_place(parted)}; {tensors}."


def _verdict(report: Report) -> str:
    if not report.same:
        return f"Not the same model: {'; '.join(report.problems)}."
    if any(tensor.verdict == "close" for tensor in report.tensors):
        return "The same model, within the tolerance."
    types = sorted({tensor.rounded_to for tensor in report.tensors if tensor.rounded_to is not None})
    if types:
        return f"The same model, rounded to {', '.join(types)}."
    alike = all(tensor.types[0] == tensor.types[1] for tensor in report.tensors)
    return f"The same model, {'bit for bit' if alike else 'value for value'}."
