"""The result of a comparison, and the criteria for two models to be the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from llama_jax.eval.verify.text import Text
from llama_jax.weights.compare import FieldDifference, TensorDifference, max_difference

# Mean KL divergence in nats, and relative difference of residual streams, that rounding to a dtype explains:
# several times the values of SmolLM2-135M on the built-in text. In f32 only the order of summation differs:
# 2e-11 nats and 1e-6 compared with transformers.
MAX_KL = {"F32": 1e-8, "F64": 1e-8, "F16": 1e-4, "BF16": 1e-2, "Q8_0": 1e-2, "INT8": 1e-2}
NOISE = {"F32": 1e-5, "F64": 1e-5, "F16": 1e-2, "BF16": 1e-1, "Q8_0": 1e-1, "INT8": 1e-1}
_LOW_BIT_KL, _LOW_BIT_NOISE = 1.0, 0.5  # for fewer than 8 bits
_DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two models.

    Attributes:
      path: the checkpoint's path.
      format: the checkpoint format, or the program that runs the model.
    """

    path: str
    format: str


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Comparison of the two models' next-token predictions on the text.

    Attributes:
      tokens: number of tokens.
      max_difference: the largest absolute difference of two logits.
      mean_kl: mean KL(A || B) over the tokens, in nats.
      max_kl: maximum KL(A || B) over the tokens, in nats.
      top1: number of tokens at which the most likely next token (argmax) is the same.
      perplexity: perplexity of A and B on the text; None for a text of one token.
    """

    tokens: int
    max_difference: float
    mean_kl: float
    max_kl: float
    top1: int
    perplexity: tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class StreamDifference:
    """Relative difference |a - b| / |a| of the residual streams after one layer, per token.

    Attributes:
      layer: layer index; None is after the embedding.
      mean: mean over the tokens.
      most: maximum over the tokens.
    """

    layer: int | None
    mean: float
    most: float


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of a comparison.

    Attributes:
      a: the first model.
      b: the second model.
      fields: the configuration fields that differ.
      tensors: comparison of every tensor that both models have.
      text: the input text; None if only tensors were compared.
      outputs: comparison of the predictions; None if not compared, or if the vocabularies differ in size.
      streams: comparison of the residual streams, layer by layer; empty if they cannot be compared.
      max_kl: the mean KL divergence up to which the models are the same.
      noise: the relative difference of residual streams that rounding explains.
    """

    a: Side
    b: Side
    fields: tuple[FieldDifference, ...]
    tensors: tuple[TensorDifference, ...]
    text: Text | None
    outputs: Outputs | None
    streams: tuple[StreamDifference, ...]
    max_kl: float
    noise: float

    @property
    def problems(self) -> tuple[str, ...]:
        """The reasons why the models are not the same, one line each; empty if they are."""
        lines = []
        if fields := [field.name for field in self.fields if field.matters]:
            lines.append(f"the configurations differ in {', '.join(fields)}")
        if count := sum(not tensor.same for tensor in self.tensors):
            lines.append(f"{count} of {len(self.tensors)} tensors differ")
        if self.text is not None and self.text.differences:
            lines.append("the vocabularies differ")
        if self.outputs is not None and not self.outputs.mean_kl <= self.max_kl:
            lines.append(f"KL(A || B) is {self.outputs.mean_kl:.2g} nats per token, above {self.max_kl:.2g}")
        return tuple(lines)

    @property
    def same(self) -> bool:
        """Whether the models are the same, up to rounding to their dtypes."""
        return not self.problems

    @property
    def divergence(self) -> StreamDifference | None:
        """The first layer at which the residual streams differ by more than `noise`."""
        return next((stream for stream in self.streams if not stream.mean <= self.noise), None)


def limits(tensors: Sequence[TensorDifference], dtype: str, *, two_backends: bool) -> tuple[float, float]:
    """The mean KL divergence, and the mean relative difference of residual streams, that rounding explains.

    Args:
      tensors: the tensor comparison; only dtypes that a tensor was rounded to matter.
      dtype: dtype of the computation.
      two_backends: whether transformers ran one of the models; otherwise equal tensors give equal outputs,
        whatever `dtype` is.
    """
    dtypes = {tensor.rounded_to.partition("/")[0] for tensor in tensors if tensor.rounded_to is not None}
    if two_backends:
        dtypes.add(_DTYPE_NAMES[dtype])
    kl = max((MAX_KL.get(name, _LOW_BIT_KL) for name in dtypes), default=MAX_KL["F32"])
    return kl, max((NOISE.get(name, _LOW_BIT_NOISE) for name in dtypes), default=0.0)


def compare_logits(a: np.ndarray, b: np.ndarray, ids: Sequence[int]) -> Outputs:
    """Compares two models' logits f32 [T, V] over the tokens `ids` [T], in f64."""
    kl, losses = [], []
    for t in range(len(ids)):  # one token at a time: f64 [T, V] would dominate the peak memory
        p, q = _log_softmax(a[t]), _log_softmax(b[t])
        equal = np.array_equal(a[t], b[t], equal_nan=True)
        kl.append(0.0 if equal else np.sum(np.exp(p) * (p - q)))
        if t + 1 < len(ids):
            losses.append((-p[ids[t + 1]], -q[ids[t + 1]]))
    with np.errstate(over="ignore"):
        perplexity = np.exp(np.mean(losses, axis=0)) if losses else None
    return Outputs(
        tokens=len(ids),
        max_difference=max_difference(a, b),
        mean_kl=float(np.mean(kl)),
        max_kl=float(np.max(kl)),
        top1=int(np.sum(a.argmax(-1) == b.argmax(-1))),
        perplexity=None if perplexity is None else (float(perplexity[0]), float(perplexity[1])),
    )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max()
    return np.asarray(x - np.log(np.sum(np.exp(x))))


def compare_streams(a: np.ndarray, b: np.ndarray, layer: int | None) -> StreamDifference:
    """Compares two residual streams f32 [T, D]."""
    with np.errstate(invalid="ignore", divide="ignore"):
        difference = np.linalg.norm(a - b, axis=-1) / np.linalg.norm(a, axis=-1)
    difference = np.where(((a == b) | (np.isnan(a) & np.isnan(b))).all(-1), 0.0, difference)
    return StreamDifference(layer, float(difference.mean()), float(difference.max()))
