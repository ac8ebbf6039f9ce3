"""One checkpoint against another, tensor by tensor and field by field: what is equal, rounded, different."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import gguf
import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.rope import rotary_frequencies
from llama_jax.weights.llama2c import INT8
from llama_jax.weights.names import Leaf
from llama_jax.weights.source import FLOAT_DTYPES
from llama_jax.weights.tensors import StoredTensors, Tensors

Verdict = Literal["equal", "rounded", "close", "different", "shape"]

_CHUNK = 1 << 20  # values compared at a time: what is formed from them stays near the cache
_NAMES = {dtype: name for name, dtype in FLOAT_DTYPES.items()}
# Formats keep a number in 32 bits, or what it was made from: half a unit there is 6e-8.
_SAME_EPS, _SAME_ROTARY = 1e-6, 1e-5


@dataclasses.dataclass(frozen=True)
class TensorDifference:
    """What became of one tensor.

    Attributes:
      name: Hugging Face's name of it.
      leaf: its place in `params`.
      layer: its layer; None outside them.
      shapes: of the two, [out, in].
      types: the types they are stored in, as their files call them.
      verdict: `equal`: the same bits, after widening where the types differ; `rounded`: one is exactly the
        other's rounding to its own type; `close`: within the tolerance; `different`; or `shape`.
      rounded_to: the type that was rounded to, where that is all.
      max_difference: the largest |a - b|, 0 where both are NaN, infinite where one is; None for two shapes.
      relative: that, as a share of the largest |a|.
      not_finite: how many values of each are NaN or infinite.
    """

    name: str
    leaf: str
    layer: int | None
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    types: tuple[str, str]
    verdict: Verdict
    rounded_to: str | None = None
    max_difference: float | None = 0.0
    relative: float | None = 0.0
    not_finite: tuple[int, int] = (0, 0)

    @property
    def same(self) -> bool:
        """Whether the two hold one tensor, as far as their types let them."""
        return self.verdict not in ("different", "shape")


@dataclasses.dataclass(frozen=True)
class FieldDifference:
    """A field of the configuration that the two give differently.

    Attributes:
      name: the field.
      values: its two values.
      matters: whether the models compute something else by it. Two ways to write one set of rotary
        frequencies, the length of the context, and a tied output (whose tensors are compared) do not.
    """

    name: str
    values: tuple[Any, Any]
    matters: bool


def compare_tensor(
    leaf: Leaf,
    layer: int | None,
    arrays: tuple[np.ndarray, np.ndarray],
    types: tuple[str, str],
    tolerance: float,
) -> TensorDifference:
    """Compares two tensors value by value.

    Args:
      leaf: which tensor they are.
      layer: of which layer.
      arrays: the two, in Hugging Face's layout, any float dtypes.
      types: what their files store, F32 or Q8_0: to which each may have been rounded.
      tolerance: the largest |a - b| to call close, as a share of the largest |a|.
    """
    a, b = arrays
    name, path, shapes = leaf.name("hf", layer), ".".join(leaf.path), (a.shape, b.shape)
    if a.shape != b.shape:
        return TensorDifference(name, path, layer, shapes, types, "shape", None, None, None)
    wide = np.float64 if np.float64 in (a.dtype, b.dtype) else np.float32
    rows, odd = max(1, _CHUNK // a.shape[-1]), [0, 0]
    a, b = (array.reshape(-1, array.shape[-1]) for array in (a, b))
    # Which of the two, seen so far, could be the other rounded to its own type.
    rounded = {0, 1} if types[0] != types[1] else set()
    equal, most, largest = True, 0.0, 0.0
    for at in range(0, len(a), rows):
        x, y = (array[at : at + rows].astype(wide) for array in (a, b))
        for side, values in enumerate((x, y)):
            odd[side] += int(values.size - np.isfinite(values).sum())
        largest = max(largest, float(np.max(np.abs(x), where=np.isfinite(x), initial=0.0)))
        if _same_bits(x, y):
            continue
        equal = False
        most = max(most, max_difference(x, y))
        rounded = {side for side in rounded if _is_rounding((x, y)[side], (y, x)[side], types[side])}
    relative = most / largest if largest else math.inf if most else 0.0
    verdict: Verdict = (
        "equal" if equal else "rounded" if rounded else "close" if relative <= tolerance else "different"
    )
    # Both may hold, and then the finer type is what happened: blocks of 4 bits survive bfloat16.
    finest = min(rounded, key=lambda side: (types[side] not in FLOAT_DTYPES, side), default=0)
    to = types[finest] if verdict == "rounded" else None
    return TensorDifference(
        name, path, layer, shapes, types, verdict, to, most, relative, not_finite=(odd[0], odd[1])
    )


def _same_bits(x: np.ndarray, y: np.ndarray) -> bool:
    bits = f"u{x.dtype.itemsize}"
    return np.array_equal(x.view(bits), y.view(bits))


def max_difference(x: np.ndarray, y: np.ndarray) -> float:
    """The largest |x - y| of two arrays of one shape; 0 where both are NaN, infinite where one is."""
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(x - y)
    if np.isnan(most := apart.max()):  # of a NaN, or of two infinities
        apart[(x == y) | (np.isnan(x) & np.isnan(y))] = 0
        most = np.nan_to_num(apart, nan=np.inf, posinf=np.inf).max()
    return float(most)


def _is_rounding(x: np.ndarray, y: np.ndarray, to: str) -> bool:
    """Whether `x` is what storing `y` in the type `to` makes of it."""
    if to in FLOAT_DTYPES:
        with np.errstate(over="ignore"):
            rounded = y.astype(FLOAT_DTYPES[to]).astype(x.dtype)
        return _same_bits(x, rounded) or np.array_equal(x, rounded, equal_nan=True)
    if to.startswith(INT8):
        rows = y.astype(np.float32).reshape(-1, int(to.removeprefix(f"{INT8}/")))
        scales = np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)
        steps = np.rint(rows / np.where(scales == 0, 1, scales))
        return np.array_equal(x.reshape(rows.shape), steps * scales)
    if to not in gguf.GGMLQuantizationType.__members__:
        return False
    kind = gguf.GGMLQuantizationType[to]
    try:
        # Blocks run along a row, so that neither layout of the rotary rows nor the cut into chunks matters.
        return np.array_equal(
            x, gguf.quants.dequantize(gguf.quants.quantize(y.astype(np.float32), kind), kind)
        )
    except (NotImplementedError, gguf.quants.QuantError):  # which rounding llama.cpp alone knows
        return False


def stored_type(tensors: Tensors, leaf: Leaf, layer: int | None) -> str:
    """The type that a tensor is stored in, as its file calls it: BF16, Q4_1; or INT8/64, for groups of 64."""
    if isinstance(tensors, StoredTensors):
        info = tensors.source.tensors[leaf.name(tensors.source.format, layer)]
        values = math.prod(info.shape)
        return f"{INT8}/{4 * values // (info.nbytes - values)}" if info.dtype == INT8 else info.dtype
    dtype = tensors.dtype(leaf, layer)
    return _NAMES.get(dtype, dtype.name)


def compare_configs(a: LlamaConfig, b: LlamaConfig) -> list[FieldDifference]:
    """Lists the fields in which two configurations differ."""
    rope = ("rope_theta", "rope_scaling")
    indifferent = {"max_position_embeddings", "tie_word_embeddings"}
    if _same_rotary(a, b):
        indifferent.update(rope)
    if math.isclose(a.rms_norm_eps, b.rms_norm_eps, rel_tol=_SAME_EPS):
        indifferent.add("rms_norm_eps")
    pairs = (
        (field.name, getattr(a, field.name), getattr(b, field.name))
        for field in dataclasses.fields(LlamaConfig)
    )
    return [FieldDifference(name, (x, y), name not in indifferent) for name, x, y in pairs if x != y]


def _same_rotary(a: LlamaConfig, b: LlamaConfig) -> bool:
    (x, x_factor), (y, y_factor) = (
        rotary_frequencies(head_dim=c.head_dim, theta=c.rope_theta, scaling=c.rope_scaling) for c in (a, b)
    )
    if x.shape != y.shape:  # then head_dim says so
        return (a.rope_theta, a.rope_scaling) == (b.rope_theta, b.rope_scaling)
    return np.allclose(x, y, rtol=_SAME_ROTARY, atol=0) and math.isclose(
        x_factor, y_factor, rel_tol=_SAME_ROTARY
    )
