"""Compares two checkpoints in one pass: each tensor is read, compared, used, and freed."""

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
from llama_jax.eval.verify.stream import LayerwiseRun, Run
from llama_jax.eval.verify.text import encode_text
from llama_jax.text.pretrained import DTYPES, Progress, open_model, resolve
from llama_jax.weights.compare import TensorDifference, compare_configs, compare_tensor, stored_type
from llama_jax.weights.names import LEAVES, SCORE, Leaf, leaves
from llama_jax.weights.tensors import Tensors

Backend = Literal["llama_jax", "transformers"]

_EMBEDDING, *_, _FINAL_NORM, _LM_HEAD = LEAVES


def compare(
    a: str | Path,
    b: str | Path,
    *,
    b_backend: Backend = "llama_jax",
    text: str | None = None,
    tokenizer: str | Path | None = None,
    outputs: bool = True,
    dtype: str = "float32",
    tolerance: float = 0.0,
    max_kl: float | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compares two checkpoints: configuration, every tensor, and the predictions on a text.

    Host memory holds one layer of each model at a time, the embeddings, or the output projections; without
    `outputs` one tensor of each. A model stored with stacked layers (Orbax), or run by transformers, is held
    as a whole.

    Args:
      a: a known name or a path, as for `load`; run by llama_jax.
      b: a known name or a path; for transformers, a Hugging Face directory.
      b_backend: the program that runs `b`.
      text: input text, of which the first 512 tokens are used; None is a built-in passage of English.
      tokenizer: the tokenizer of the text for both models, whose own are then not compared: a path or a known
        name.
      outputs: whether to run the models; otherwise only configurations and tensors are compared.
      dtype: dtype of the computation: float32, bfloat16 or float16.
      tolerance: allowed difference of two tensors, relative to the largest absolute value of the tensor.
      max_kl: allowed mean KL divergence over the tokens, in nats; by default what rounding of the tensors
        explains, see `report.MAX_KL`.
      progress: called with (bytes done, total bytes, name of what is being read).

    Returns:
      The report; `Report.same` is the verdict.

    Raises:
      CheckpointError: for a checkpoint that does not exist or cannot be read.
      TokenizerError: for a text if neither model has a tokenizer.
      InputError: for an empty text, an unsupported dtype, or transformers if it is not installed.
    """
    for name, value, known in (("dtype", dtype, DTYPES), ("b_backend", b_backend, get_args(Backend))):
        if value not in known:
            raise InputError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
    two_backends = b_backend != "llama_jax"
    first = _open(a, dtype)
    if two_backends and first.tensors.config.labels:
        raise InputError(
            f"{a} is a classifier or reward model; only language models can be compared with transformers"
        )
    models = first, _open_with_transformers(b, dtype) if two_backends else _open(b, dtype)
    configs = models[0].tensors.config, models[1].tensors.config
    if any(config.labels for config in configs):
        for classifier, other in (models, models[::-1]):
            if not other.tensors.config.labels:
                raise InputError(
                    f"{classifier.side.path} is a classifier or reward model and {other.side.path} a "
                    "language model; compare two models of the same kind"
                )
        outputs = False  # they do not predict tokens
    given = None if tokenizer is None else resolve(tokenizer)
    encoded = None
    if outputs:
        encoded = encode_text(
            text, (given or models[0].tokenizer_dir, given or models[1].tokenizer_dir), configs
        )
    if encoded is not None and given is not None:
        note = f"encoded with {given}; the models' own tokenizers were not compared"
        encoded = dataclasses.replace(encoded, differences=None, notes=(*encoded.notes, note))
    runs = None
    if encoded is not None and configs[0].vocab_size == configs[1].vocab_size:
        ids = np.array(encoded.ids, np.int32)
        runs = models[0].run(ids), models[1].run(ids)
    comparison = _Comparison((models[0].tensors, models[1].tensors), runs, tolerance, progress)
    # On GPUs and TPUs f32 matmuls use a lower precision by default.
    with jax.default_matmul_precision("highest"):
        logits = comparison.run()
    default_max_kl, noise = limits(comparison.tensors, dtype, two_backends=two_backends)
    return Report(
        a=models[0].side,
        b=models[1].side,
        fields=tuple(compare_configs(*configs)),
        tensors=tuple(comparison.tensors),
        text=encoded,
        outputs=compare_logits(*logits, encoded.ids) if encoded and logits else None,
        streams=tuple(comparison.streams),
        max_kl=default_max_kl if max_kl is None else max_kl,
        noise=noise,
    )


@dataclasses.dataclass(frozen=True)
class _Model:
    """One side: its description, tokenizer directory, tensors, and a function that runs it on tokens [T]."""

    side: Side
    tokenizer_dir: Path
    tensors: Tensors
    run: Callable[[np.ndarray], Run]


def _open(name_or_path: str | Path, dtype: str) -> _Model:
    opened = open_model(name_or_path)  # of a run that trains an adapter, the base with the adapter
    source, tensors = opened.source, opened.plain_tensors()
    run = functools.partial(LayerwiseRun, tensors.config, dtype=jnp.dtype(dtype))
    side = Side(str(resolve(name_or_path) if opened.adapters else source.path), source.format)
    return _Model(side, source.tokenizer_dir or source.path, tensors, run)


def _open_with_transformers(name_or_path: str | Path, dtype: str) -> _Model:
    path = resolve(name_or_path)
    model = load_transformers(path, dtype)
    return _Model(Side(str(path), "transformers"), path, model, model.run)


class _Comparison:
    """One pass over both models.

    Attributes:
      tensors: comparison of the tensors read so far.
      streams: comparison of the residual streams so far.
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
        self._num_layers = [model.config.num_hidden_layers for model in models]
        # Two tied output projections equal the embeddings, and are only needed to run the models.
        both_tied = all(model.config.tie_word_embeddings for model in models)
        every = (leaf for model in models for leaf in leaves(model.config))
        self._layer_leaves = tuple(dict.fromkeys(leaf for leaf in every if leaf.per_layer))
        self._leaves = (_EMBEDDING, *self._layer_leaves, _FINAL_NORM)
        if all(model.config.labels for model in models):
            self._leaves += (SCORE,)
        elif runs is not None or not both_tied:
            self._leaves += (_LM_HEAD,)
        self._done, self._total = 0, sum(_nbytes(model, self._leaves) for model in models)
        # The models are run layer by layer.
        self._readers = [_StackedReader(model) if runs and model.stacked else model for model in models]

    def run(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Compares all tensors; runs the models if there are runs, and returns their logits f32 [T, V]."""
        if self.runs is not None:
            return self._run_models(self.runs)
        for leaf in self._leaves:
            for layer in range(max(self._num_layers)) if leaf.per_layer else (None,):
                self._read(leaf, layer)
        return None

    def _run_models(self, runs: tuple[Run, Run]) -> tuple[np.ndarray, np.ndarray]:
        tables = self._read(_EMBEDDING)
        self._compare_streams(None, {side: runs[side].embed(table) for side, table in tables.items()})
        del tables
        for layer in range(max(self._num_layers)):
            tensors: dict[int, dict[Leaf, np.ndarray]] = {}
            for leaf in self._layer_leaves:
                for side, tensor in self._read(leaf, layer).items():
                    tensors.setdefault(side, {})[leaf] = tensor
            self._compare_streams(layer, {side: runs[side].layer(tensors[side]) for side in tensors})
        norms, outputs = self._read(_FINAL_NORM), self._read(_LM_HEAD)
        return runs[0].logits(norms[0], outputs[0]), runs[1].logits(norms[1], outputs[1])

    def _read(self, leaf: Leaf, layer: int | None = None) -> dict[int, np.ndarray]:
        """Reads and compares one tensor; returns it by side (0 is A, 1 is B) for the sides that have it."""
        sides = [side for side in (0, 1) if layer is None or layer < self._num_layers[side]]
        sides = [side for side in sides if _has(self.models[side], leaf)]
        stored = [_stored_leaf(leaf, model) for model in self.models]
        with ThreadPoolExecutor(2) as pool:
            reads = {side: pool.submit(self._readers[side].read, stored[side], layer) for side in sides}
        arrays = {side: read.result() for side, read in reads.items()}
        both_tied = leaf is _LM_HEAD and stored == [_EMBEDDING, _EMBEDDING]
        if len(sides) == 2 and not both_tied:
            a, b = (stored_type(self.models[side], stored[side], layer) for side in sides)
            difference = compare_tensor(leaf, layer, (arrays[0], arrays[1]), (a, b), self.tolerance)
            self.tensors.append(difference)
        self._done += sum(array.nbytes for array in arrays.values())
        self._progress(self._done, self._total, leaf.name("hf", layer))
        return arrays

    def _compare_streams(self, layer: int | None, states: dict[int, np.ndarray]) -> None:
        """Compares the residual streams [T, D], if both exist and have the same shape."""
        if len(states) == 2 and states[0].shape == states[1].shape:
            self.streams.append(compare_streams(states[0], states[1], layer))


class _StackedReader:
    """Reads all layers of a stacked leaf at the first access, and keeps each until it is used."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._layers: dict[Leaf, dict[int, np.ndarray]] = {}

    def read(self, leaf: Leaf, layer: int | None) -> np.ndarray:
        if layer is None:
            return self._tensors.read(leaf, None)
        if leaf not in self._layers:
            layers = range(self._tensors.config.num_hidden_layers)
            self._layers[leaf] = {layer: self._tensors.read(leaf, layer) for layer in layers}
        return self._layers[leaf].pop(layer)


def _has(model: Tensors, leaf: Leaf) -> bool:
    """Whether the model has this leaf, of those that only some models have."""
    return not leaf.per_layer or leaf in leaves(model.config)


def _stored_leaf(leaf: Leaf, model: Tensors) -> Leaf:
    """The leaf that is stored: for a tied output projection, the embedding."""
    return _EMBEDDING if leaf is _LM_HEAD and model.config.tie_word_embeddings else leaf


def _nbytes(model: Tensors, every: Sequence[Leaf]) -> int:
    """Total bytes to read of a model."""
    total = 0
    for leaf in every:
        if not _has(model, leaf):
            continue
        stored = _stored_leaf(leaf, model)
        for layer in range(model.config.num_hidden_layers) if leaf.per_layer else (None,):
            shape = stored.stored_shape(model.config, "hf")
            total += math.prod(shape) * model.dtype(stored, layer).itemsize
    return total
