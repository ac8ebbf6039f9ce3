"""What a comparison found, and the rule by which it calls two models the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from llama_jax.eval.verify.text import Text
from llama_jax.weights.compare import FieldDifference, TensorDifference, max_difference

# What KL divergence (nats, mean over the tokens) rounding explains, by the type that was rounded to, and the
# same for the relative difference of residual streams: several times what SmolLM2-135M shows over the
# built-in text. In f32 what is left is the order of sums: 2e-11 nats, and 1e-6, against transformers.
MAX_KL = {"F32": 1e-8, "F64": 1e-8, "F16": 1e-4, "BF16": 1e-2, "Q8_0": 1e-2, "INT8": 1e-2}
NOISE = {"F32": 1e-5, "F64": 1e-5, "F16": 1e-2, "BF16": 1e-1, "Q8_0": 1e-1, "INT8": 1e-1}
_COARSE_KL, _COARSE_NOISE = 1.0, 0.5  # in fewer bits
_COMPUTE = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two models.

    Attributes:
      path: where it is.
      format: of its files, or the program that runs it.
    """

    path: str
    format: str


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The two models' next-token predictions over the text.

    Attributes:
      tokens: how many were read, each of which predicts the next.
      max_difference: the largest |difference| of two logits.
      mean_kl: KL(A || B) in nats, its mean over the tokens.
      max_kl: its largest.
      top1: at how many tokens both find the same one likeliest.
      perplexity: of the text, for A and B; None for a text of one token.
    """

    tokens: int
    max_difference: float
    mean_kl: float
    max_kl: float
    top1: int
    perplexity: tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class StreamDifference:
    """How far the residual streams are apart at one place: |a - b| / |a| of each token's vector.

    Attributes:
      layer: after which layer; None is after the embedding.
      mean: over the tokens.
      most: at the worst of them.
    """

    layer: int | None
    mean: float
    most: float


@dataclasses.dataclass(frozen=True)
class Report:
    """All that was found.

    Attributes:
      a: the first model.
      b: the second.
      fields: where their configurations differ.
      tensors: every tensor that both have.
      text: what they read; None where only tensors were compared.
      outputs: what they predicted; None where that was not compared, or their vocabularies differ in size.
      streams: where their residual streams were, layer by layer; empty where they cannot be compared.
      max_kl: the largest mean KL divergence that is none.
      noise: the relative difference of residual streams that says nothing.
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
        """Why the two are not the same model, a line each; empty if they are."""
        lines = []
        if fields := [field.name for field in self.fields if field.matters]:
            lines.append(f"the configurations differ in {', '.join(fields)}")
        if count := sum(not tensor.same for tensor in self.tensors):
            lines.append(f"{count} of {len(self.tensors)} tensors differ")
        if self.text is not None and self.text.differences:
            lines.append("the vocabularies differ")
        if self.outputs is not None and not self.outputs.mean_kl <= self.max_kl:
            lines.append(f"KL(A || B) is {self.outputs.mean_kl:.2g} nats a token, above {self.max_kl:.2g}")
        return tuple(lines)

    @property
    def same(self) -> bool:
        """Whether the two are one model, as far as their types let them."""
        return not self.problems

    @property
    def parted(self) -> StreamDifference | None:
        """The first place at which the residual streams are further apart than noise."""
        return next((at for at in self.streams if not at.mean <= self.noise), None)


def limits(tensors: Sequence[TensorDifference], dtype: str, *, two_programs: bool) -> tuple[float, float]:
    """What rounding explains: mean KL divergence, and mean relative difference of residual streams.

    Args:
      tensors: the comparison; only types that one of two tensors was rounded to count.
      dtype: that the outputs were computed in.
      two_programs: whether another program than llama_jax ran one of the models; otherwise equal tensors
        give equal numbers, whatever `dtype` is.
    """
    types = {tensor.rounded_to.partition("/")[0] for tensor in tensors if tensor.rounded_to is not None}
    if two_programs:
        types.add(_COMPUTE[dtype])
    kl = max((MAX_KL.get(name, _COARSE_KL) for name in types), default=MAX_KL["F32"])
    return kl, max((NOISE.get(name, _COARSE_NOISE) for name in types), default=0.0)


def compare_logits(a: np.ndarray, b: np.ndarray, ids: Sequence[int]) -> Outputs:
    """Compares two models' logits f32 [T, V] over the tokens `ids` [T], in f64."""
    kl, losses = [], []
    for at in range(len(ids)):  # a row at a time: [T, V] in f64 would be the largest thing in memory
        p, q = _log_softmax(a[at]), _log_softmax(b[at])
        alike = np.array_equal(a[at], b[at], equal_nan=True)
        kl.append(0.0 if alike else np.sum(np.exp(p) * (p - q)))
        if at + 1 < len(ids):
            losses.append((-p[ids[at + 1]], -q[ids[at + 1]]))
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
        apart = np.linalg.norm(a - b, axis=-1) / np.linalg.norm(a, axis=-1)
    apart = np.where(((a == b) | (np.isnan(a) & np.isnan(b))).all(-1), 0.0, apart)
    return StreamDifference(layer, float(apart.mean()), float(apart.max()))
