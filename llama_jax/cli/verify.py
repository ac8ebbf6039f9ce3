"""`llama-jax verify`: whether two checkpoints hold the same model, and if not, where they diverge."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llama_jax.cli import output
from llama_jax.cli.arguments import ModelParser, full_dtype, read_text
from llama_jax.console import loading, terminal
from llama_jax.console.parser import UsageError, parse_float

if TYPE_CHECKING:
    from llama_jax.eval.verify import Report, StreamDifference, Text
    from llama_jax.weights.compare import FieldDifference, TensorDifference

EXAMPLES = """
llama-jax verify smollm2-135m path/to/converted
llama-jax verify path/to/model path/to/model.gguf --prompt "The capital of France is"
llama-jax verify path/to/model path/to/other --tensors-only --json
llama-jax verify path/to/hf-directory --with transformers
"""

CRITERIA = """\
Compares every tensor and every configuration field, then the predictions at each token of a text. OTHER is
the same model if
  - each tensor is bit-identical; or, if the dtypes differ, one is exactly the other rounded to its dtype
    (block formats such as Q8_0 included); or the two are within --tolerance;
  - no configuration field that affects the outputs differs (context length does not, nor two spellings of
    the same rotary frequencies, nor an output that is tied in one and equal in the other);
  - the vocabularies agree, if both have one;
  - the KL divergence KL(MODEL || OTHER), averaged over the tokens of the text, is at most --max-kl.

exit status: 0 the same model; 1 not the same; 2 bad input, or a checkpoint that cannot be read.
"""

_MAX_TEXT_BYTES = 1 << 16  # at most 512 tokens are used, and few tokens are longer than 128 bytes


def run(argv: Sequence[str]) -> None:
    """Runs the command; exits with status 1 if the models are not the same."""
    args = _parser().parse(argv)
    if args.other is None and args.program is None:
        raise UsageError("missing OTHER; give a second checkpoint, or --with transformers")
    if args.prompt is not None and args.text is not None:
        raise UsageError("--prompt and --text exclude each other; leave one of them out")
    text = args.prompt if args.text is None else read_text(args.text, _MAX_TEXT_BYTES)

    from llama_jax.eval.verify import compare

    loading.init_jax()
    a = loading.resolve(args.model)
    b = a if args.other is None else loading.resolve(args.other)
    with terminal.warnings_as_notes(), terminal.progress_bar("comparing") as progress:
        report = compare(
            a,
            b,
            b_backend=args.program or "llama_jax",
            text=text,
            tokenizer=args.tokenizer,
            outputs=not args.tensors_only,
            dtype=args.dtype,
            tolerance=args.tolerance,
            max_kl=args.max_kl,
            progress=progress,
        )
    if args.json:
        output.print_json(_as_json(report))
    else:
        _print_report(report)
    if not report.same:
        sys.stdout.flush()
        sys.exit(1)


def _parser() -> ModelParser:
    summary = "Compare two checkpoints of any format and dtype, tensor by tensor and by their predictions."
    parser = ModelParser("llama-jax verify", summary, EXAMPLES)
    parser.add_model()
    option = parser.add_argument
    option("other", metavar="OTHER", nargs="?", help="the second model (default if --with is given: MODEL)")
    option(
        "--with",
        dest="program",
        choices=("transformers",),
        help="run OTHER, a Hugging Face directory, in transformers (needs torch and transformers)",
    )
    option("--prompt", metavar="TEXT", help="input of both models (default: a built-in page of English)")
    option("--text", metavar="FILE", help="read the input from a file; at most 512 tokens are used")
    option("--tokenizer", metavar="PATH", help="tokenizer of the text (default: the models' own, compared)")
    option(
        "--dtype",
        type=full_dtype,
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="dtype of the computation (default: float32)",
    )
    option("--tensors-only", action="store_true", help="do not run the models")
    option(
        "--tolerance",
        type=_parse_non_negative_float,
        default=0.0,
        metavar="X",
        help="allowed max |A - B| relative to the tensor's largest value (default: 0); see also --max-kl",
    )
    option(
        "--max-kl",
        type=_parse_non_negative_float,
        metavar="NATS",
        help="allowed mean KL divergence (default: 1e-8; if tensors are rounded to, or transformers computes "
        "in, float16: 1e-4, bfloat16 or 8 bits: 1e-2, fewer bits: 1)",
    )
    parser.add_json()
    parser.epilog = f"{CRITERIA}\n{parser.epilog}"
    return parser


def _parse_non_negative_float(text: str) -> float:
    value = parse_float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be at least 0")
    return value


def _as_json(report: Report) -> dict[str, Any]:
    fields = dataclasses.asdict(report)
    parted = None if report.divergence is None else dataclasses.asdict(report.divergence)
    verdict = {"same": report.same, "problems": report.problems, "parted": parted}
    return dict(_finite(verdict | fields))


def _finite(value: Any) -> Any:
    """Replaces NaN and infinities, which JSON does not have, by None."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_report(report: Report) -> None:
    """Prints tables, with the verdict on the last line."""
    output.print_line(f"A  {report.a.path}  {report.a.format}\nB  {report.b.path}  {report.b.format}\n")
    if report.fields:
        rows = [_field_row(field) for field in report.fields]
        output.print_table(rows, ("config", "A", "B", ""))
    header = ("tensor", "dtype", "count", "", "max |A - B|", "relative", "in layer")
    output.print_table([_kind_row(kind) for kind in _kinds(report.tensors)], header, right=(2, 4, 5, 6))
    for tensor in report.tensors:
        if any(tensor.not_finite):
            a, b = tensor.not_finite
            output.print_line(f"{tensor.name} has NaN or infinite values: {a} in A, {b} in B")
    if report.text is not None:
        _print_outputs(report, report.text)
    if not report.same and report.divergence is not None:
        rows = [
            [_layer_name(difference), f"{difference.mean:.2g}", f"{difference.most:.2g}"]
            for difference in report.streams
        ]
        output.print_table(rows, ("residual stream after", "mean |A - B| / |A|", "max"), right=(1, 2))
        output.print_line(_divergence(report, report.divergence))
    output.print_line(_verdict(report))


def _print_outputs(report: Report, text: Text) -> None:
    rows = [["text", f"{text.what}, {len(text.ids)} tokens"]]
    if text.differences is not None:
        rows.append(["vocabularies", "; ".join(text.differences) or "identical"])
    rows += [["", note] for note in text.notes]
    found = report.outputs
    if found is None:
        rows.append(["outputs", "not compared: the vocabularies have different sizes"])
    else:
        rows.append(["KL(A || B)", f"mean {found.mean_kl:.2g}, max {found.max_kl:.2g} nats"])
        rows.append(["logits", f"max |A - B| {found.max_difference:.2g}"])
        rows.append(["argmax", f"agrees at {found.top1} of {found.tokens} tokens"])
        if found.perplexity is not None:
            rows.append(["perplexity", " A, ".join(f"{value:.6g}" for value in found.perplexity) + " B"])
    output.print_table(rows, ("outputs", ""))


def _field_row(field: FieldDifference) -> list[str]:
    a, b = (f"{value:.10g}" if isinstance(value, float) else str(value) for value in field.values)
    return [field.name, a, b, "" if field.matters else "no effect on the outputs"]


def _kinds(tensors: Sequence[TensorDifference]) -> Iterator[list[TensorDifference]]:
    """Groups the tensors by parameter leaf, over all layers."""
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


def _layer_name(difference: StreamDifference) -> str:
    return "the embedding" if difference.layer is None else f"layer {difference.layer}"


def _divergence(report: Report, divergence: StreamDifference) -> str:
    def in_layer(tensor: TensorDifference) -> bool:
        if divergence.layer is None:
            return tensor.leaf.startswith("embed")
        return tensor.layer == divergence.layer

    names = [tensor.name for tensor in report.tensors if in_layer(tensor) and not tensor.same]
    tensors = f"its tensors that differ: {', '.join(names)}" if names else "none of its tensors differs"
    return f"The residual streams diverge at {_layer_name(divergence)}; {tensors}."


def _verdict(report: Report) -> str:
    if not report.same:
        return f"Not the same model: {'; '.join(report.problems)}."
    if any(tensor.verdict == "close" for tensor in report.tensors):
        return "The same model, within the tolerance."
    types = sorted({tensor.rounded_to for tensor in report.tensors if tensor.rounded_to is not None})
    if types:
        return f"The same model, rounded to {', '.join(types)}."
    same_types = all(tensor.types[0] == tensor.types[1] for tensor in report.tensors)
    return f"The same model, {'bit for bit' if same_types else 'value for value'}."
