"""Compares two checkpoints in one pass over both: each tensor is read, compared, used, and let go."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.errors import InputError
from llama_jax.eval.verify.reference import load_transformers
from llama_jax.eval.verify.report import (
    Report,
    Side,
    StreamDifference,
    compare_logits,
    compare_streams,
    limits,
)
from llama_jax.eval.verify.stream import Run, Stream
from llama_jax.eval.verify.text import choose_text
from llama_jax.text.pretrained import DTYPES, Progress, resolve
from llama_jax.weights import open_source
from llama_jax.weights.compare import TensorDifference, compare_configs, compare_tensor, stored_type
from llama_jax.weights.names import LEAVES, SCORE, Leaf
from llama_jax.weights.tensors import StoredTensors, Tensors

Program = Literal["llama_jax", "transformers"]

_EMBEDDING, *_LAYER_LEAVES, _FINAL_NORM, _LM_HEAD = LEAVES


def compare(
    a: str | Path,
    b: str | Path,
    *,
    b_runs_in: Program = "llama_jax",
    text: str | None = None,
    outputs: bool = True,
    dtype: str = "float32",
    tolerance: float = 0.0,
    max_kl: float | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compares two checkpoints: configuration, every tensor, and what they predict along a text.

    Memory holds one layer of each at a time, the embeddings, or the output projections; without `outputs`
    one tensor of each. It holds all of a model that is stored stacked (Orbax) or run by transformers.

    Args:
      a: a known name or a path, as `load` takes it; llama_jax runs it.
      b: likewise; for transformers, a Hugging Face directory.
      b_runs_in: which program runs `b`.
      text: what they read, its first 512 tokens; None is a passage of English that is built in.
      outputs: whether to run the models; otherwise only what is stored is compared.
      dtype: to compute in: float32, bfloat16 or float16.
      tolerance: the largest difference that is none, as a share of a tensor's largest value.
      max_kl: the largest KL divergence that is none, in nats, mean over the tokens; by default what rounding
        the tensors makes, see `report.MAX_KL`.
      progress: called with (bytes done, bytes in all, what is being read).

    Returns:
      What was found; `Report.same` is the verdict.

    Raises:
      CheckpointError: for a checkpoint that is not there or cannot be read.
      TokenizerError: for a text that neither model has a vocabulary for.
      InputError: for an empty text, another dtype, or a program that is not there.
    """
    for name, value, known in (("dtype", dtype, DTYPES), ("b_runs_in", b_runs_in, get_args(Program))):
        if value not in known:
            raise InputError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
    two_programs = b_runs_in != "llama_jax"
    first = _open(a, dtype)
    if two_programs and first.tensors.config.labels:
        raise InputError(
            f"{a} is a classifier or reward model; transformers is asked of language models alone"
        )
    models = first, _open_in_transformers(b, dtype) if two_programs else _open(b, dtype)
    configs = models[0].tensors.config, models[1].tensors.config
    if any(config.labels for config in configs):
        for one, other in (models, models[::-1]):
            if not other.tensors.config.labels:
                raise InputError(
                    f"{one.side.path} is a classifier or reward model and {other.side.path} a language "
                    "model; compare two of a kind"
                )
        outputs = False  # they predict no tokens
    homes = models[0].home, models[1].home
    chosen = choose_text(text, homes, configs) if outputs else None
    runs = None
    if chosen is not None and configs[0].vocab_size == configs[1].vocab_size:
        ids = np.array(chosen.ids, np.int32)
        runs = models[0].run(ids), models[1].run(ids)
    walk = _Walk((models[0].tensors, models[1].tensors), runs, tolerance, progress)
    # On GPUs and TPUs a product of f32 is by default one of fewer bits.
    with jax.default_matmul_precision("highest"):
        logits = walk.go()
    most_kl, noise = limits(walk.tensors, dtype, two_programs=two_programs)
    return Report(
        a=models[0].side,
        b=models[1].side,
        fields=tuple(compare_configs(*configs)),
        tensors=tuple(walk.tensors),
        text=chosen,
        outputs=compare_logits(*logits, chosen.ids) if chosen and logits else None,
        streams=tuple(walk.streams),
        max_kl=most_kl if max_kl is None else max_kl,
        noise=noise,
    )


@dataclasses.dataclass(frozen=True)
class _Model:
    """One side: where it is, where its vocabulary is, what it holds, and how it is run over tokens [T]."""

    side: Side
    home: Path
    tensors: Tensors
    run: Callable[[np.ndarray], Run]


def _open(name_or_path: str | Path, dtype: str) -> _Model:
    source = open_source(resolve(name_or_path))
    run = functools.partial(Stream, source.config, dtype=jnp.dtype(dtype))
    return _Model(
        Side(str(source.path), source.format), source.home or source.path, StoredTensors(source), run
    )


def _open_in_transformers(name_or_path: str | Path, dtype: str) -> _Model:
    path = resolve(name_or_path)
    model = load_transformers(path, dtype)
    return _Model(Side(str(path), "transformers"), path, model, model.run)


class _Walk:
    """The pass over both models.

    Attributes:
      tensors: what became of each tensor so far.
      streams: how far apart the runs were so far.
    """

    def __init__(
        self,
        models: tuple[Tensors, Tensors],
        runs: tuple[Run, Run] | None,
        tolerance: float,
        progress: Progress | None,
    ) -> None:
        self.models, self.runs, self.tolerance = models, runs, tolerance
        self.tensors: list[TensorDifference] = []
        self.streams: list[StreamDifference] = []
        self._progress = progress or (lambda *_: None)
        self._depths = [model.config.num_hidden_layers for model in models]
        # Two tied outputs are the embeddings again, needed only to run.
        both_tied = all(model.config.tie_word_embeddings for model in models)
        self._leaves = LEAVES[:-1] if both_tied and runs is None else LEAVES
        if all(model.config.labels for model in models):
            self._leaves = (*LEAVES[:-1], SCORE)
        self._done, self._total = 0, sum(_nbytes(model, self._leaves) for model in models)
        # Runs go layer by layer.
        self._readers = [_LeafByLeaf(model) if runs and model.stacked else model for model in models]

    def go(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Goes through both; returns their logits f32 [T, V] if they are run."""
        if self.runs is not None:
            return self._run(self.runs)
        for leaf in self._leaves:
            for layer in range(max(self._depths)) if leaf.per_layer else (None,):
                self._read(leaf, layer)
        return None

    def _run(self, runs: tuple[Run, Run]) -> tuple[np.ndarray, np.ndarray]:
        tables = self._read(_EMBEDDING)
        self._stream(None, {side: runs[side].embed(table) for side, table in tables.items()})
        del tables
        for layer in range(max(self._depths)):
            tensors: dict[int, dict[Leaf, np.ndarray]] = {}
            for leaf in _LAYER_LEAVES:
                for side, tensor in self._read(leaf, layer).items():
                    tensors.setdefault(side, {})[leaf] = tensor
            self._stream(layer, {side: runs[side].layer(tensors[side]) for side in tensors})
        norms, outputs = self._read(_FINAL_NORM), self._read(_LM_HEAD)
        return runs[0].logits(norms[0], outputs[0]), runs[1].logits(norms[1], outputs[1])

    def _read(self, leaf: Leaf, layer: int | None = None) -> dict[int, np.ndarray]:
        """Reads one tensor of each model that has it, A's as 0 and B's as 1, and compares the two."""
        sides = [side for side in (0, 1) if layer is None or layer < self._depths[side]]
        places = [_place(leaf, model) for model in self.models]
        with ThreadPoolExecutor(2) as pool:
            reads = {side: pool.submit(self._readers[side].read, places[side], layer) for side in sides}
        arrays = {side: read.result() for side, read in reads.items()}
        again = leaf is _LM_HEAD and places == [_EMBEDDING, _EMBEDDING]
        if len(sides) == 2 and not again:
            a, b = (stored_type(self.models[side], places[side], layer) for side in sides)
            found = compare_tensor(leaf, layer, (arrays[0], arrays[1]), (a, b), self.tolerance)
            self.tensors.append(found)
        self._done += sum(array.nbytes for array in arrays.values())
        self._progress(self._done, self._total, leaf.name("hf", layer))
        return arrays

    def _stream(self, layer: int | None, states: dict[int, np.ndarray]) -> None:
        """Notes how far apart two residual streams [T, D] are, if both are there and can be compared."""
        if len(states) == 2 and states[0].shape == states[1].shape:
            self.streams.append(compare_streams(states[0], states[1], layer))


class _LeafByLeaf:
    """Tensors that are stored stacked: all layers of a leaf are read for the first, and kept for theirs."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._kept: dict[Leaf, dict[int, np.ndarray]] = {}

    def read(self, leaf: Leaf, layer: int | None) -> np.ndarray:
        if layer is None:
            return self._tensors.read(leaf, None)
        if leaf not in self._kept:
            layers = range(self._tensors.config.num_hidden_layers)
            self._kept[leaf] = {layer: self._tensors.read(leaf, layer) for layer in layers}
        return self._kept[leaf].pop(layer)


def _place(leaf: Leaf, model: Tensors) -> Leaf:
    """Where a model keeps a leaf: a tied output is the embedding."""
    return _EMBEDDING if leaf is _LM_HEAD and model.config.tie_word_embeddings else leaf


def _nbytes(model: Tensors, leaves: Sequence[Leaf]) -> int:
    """The bytes of all that is read of a model."""
    total = 0
    for leaf in leaves:
        place = _place(leaf, model)
        for layer in range(model.config.num_hidden_layers) if leaf.per_layer else (None,):
            shape = place.stored_shape(model.config, "hf")
            total += math.prod(shape) * model.dtype(place, layer).itemsize
    return total
