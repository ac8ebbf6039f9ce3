"""Compares a checkpoint's tensors with those that its configuration asks for."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from llama_jax.errors import CheckpointError
from llama_jax.weights.names import STACKED, Entry, entries, is_harmless
from llama_jax.weights.source import Source, brief, quote


def check_tensors(source: Source) -> list[Entry]:
    """Compares a checkpoint's tensors with those its configuration asks for.

    Raises:
      CheckpointError: naming all that are missing, unexpected or of the wrong shape.
    """
    config, tensors = source.config, source.tensors
    if config.num_hidden_layers > len(tensors) and source.format not in STACKED:
        raise CheckpointError(
            f"{source.path}: the configuration has {config.num_hidden_layers} layers but there are only "
            f"{len(tensors)} tensors; the two do not belong together"
        )
    wanted = list(entries(config, source.format))
    known = {entry.name for entry in wanted}
    missing = [(getattr(leaf, source.format), layer) for name, leaf, layer in wanted if name not in tensors]
    unexpected = [
        _without_layer(name)
        for name in tensors
        if name not in known and not is_harmless(name, config, source.format)
    ]
    wrong = [
        (f"{getattr(leaf, source.format)} {list(tensors[name].shape)} should be {list(shape)}", layer)
        for name, leaf, layer in wanted
        if name in tensors and tensors[name].shape != (shape := leaf.stored_shape(config, source.format))
    ]
    problems = []
    if missing:
        problems.append(f"missing tensors: {brief(_by_layers(missing))}")
    if unexpected:
        problems.append(f"unexpected tensors: {brief(map(quote, _by_layers(unexpected)))}")
    if wrong:
        problems.append(f"wrong shapes: {brief(_by_layers(wrong))}")
    if problems:
        raise CheckpointError(
            f"{source.path}: the tensors are not those of its configuration: {'; '.join(problems)}; use the "
            "configuration that was saved with them"
        )
    return wanted


def _without_layer(name: str) -> tuple[str, int | None]:
    """Takes a stored name apart as the table of names has it: a.{layer}.b, and the layer's number."""
    found = re.search(r"(?<=\.)\d{1,4}(?=\.)", name)
    if found is None:
        return name, None
    return name[: found.start()] + "{layer}" + name[found.end() :], int(found[0])


def _by_layers(names: Iterable[tuple[str, int | None]]) -> list[str]:
    """Writes names that differ in the layer alone as one: a.0-29.b, or a.{1, 3}.b if scattered."""
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
    return parts[0] if len(parts) == 1 else "{" + brief(parts, 10) + "}"
