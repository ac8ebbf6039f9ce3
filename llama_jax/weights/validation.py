"""Checks the names and shapes of a checkpoint's tensors against its configuration."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable

from llama_jax.errors import CheckpointError
from llama_jax.weights.names import STACKED, Entry, entries, is_ignored
from llama_jax.weights.source import Source, format_list, quote


def validate_tensors(source: Source) -> list[Entry]:
    """Checks that a checkpoint has exactly the tensors that its configuration requires.

    Warns of more in a Hugging Face directory, which transformers ignores.

    Returns:
      The required tensors.

    Raises:
      CheckpointError: naming all tensors that are missing, unexpected or of the wrong shape.
    """
    config, tensors = source.config, source.tensors
    if config.num_hidden_layers > len(tensors) and source.format not in STACKED:
        raise CheckpointError(
            f"{source.path}: the configuration has {config.num_hidden_layers} layers but there are only "
            f"{len(tensors)} tensors; use the configuration that was saved with them"
        )
    required = list(entries(config, source.format))
    known = {entry.name for entry in required}
    missing = [(leaf.template(source.format), layer) for name, leaf, layer in required if name not in tensors]
    unexpected = [
        _split_layer(name)
        for name in tensors
        if name not in known and not is_ignored(name, config, source.format)
    ]
    wrong_shapes = [
        (f"{leaf.template(source.format)} {list(tensors[name].shape)} should be {list(shape)}", layer)
        for name, leaf, layer in required
        if name in tensors and tensors[name].shape != (shape := leaf.stored_shape(config, source.format))
    ]
    problems = []
    if unexpected and source.format == "hf" and not missing and not wrong_shapes:
        names = format_list(map(quote, _merge_layers(unexpected)), 5)
        warnings.warn(
            f"{source.path}: ignored, as by transformers: {names}, which a Llama does not have", stacklevel=3
        )
        unexpected = []
    if missing:
        problems.append(f"missing tensors: {format_list(_merge_layers(missing))}")
    if unexpected:
        problems.append(f"unexpected tensors: {format_list(map(quote, _merge_layers(unexpected)))}")
    if wrong_shapes:
        problems.append(f"wrong shapes: {format_list(_merge_layers(wrong_shapes))}")
    if problems:
        raise CheckpointError(
            f"{source.path}: the tensors do not match the configuration: {'; '.join(problems)}; use the "
            "configuration that was saved with them"
        )
    return required


def _split_layer(name: str) -> tuple[str, int | None]:
    """Splits a stored name into its template, a.{layer}.b, and the layer index."""
    match = re.search(r"(?<=\.)\d{1,4}(?=\.)", name)
    if match is None:
        return name, None
    return name[: match.start()] + "{layer}" + name[match.end() :], int(match[0])


def _merge_layers(names: Iterable[tuple[str, int | None]]) -> list[str]:
    """Merges names that differ only in the layer: a.0-29.b, or a.{1, 3}.b if not contiguous."""
    layers: defaultdict[str, list[int]] = defaultdict(list)
    for template, layer in names:
        layers[template] += [] if layer is None else [layer]
    return [template.replace("{layer}", _ranges(sorted(numbers))) for template, numbers in layers.items()]


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    parts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return parts[0] if len(parts) == 1 else "{" + format_list(parts, 10) + "}"
