"""Compares two checkpoints tensor by tensor, and two configurations field by field."""

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
from llama_jax.weights.source import DTYPE_NAMES, FLOAT_DTYPES
from llama_jax.weights.tensors import StoredTensors, Tensors

Verdict = Literal["equal", "rounded", "close", "different", "shape"]

_CHUNK = 1 << 20  # values compared at a time, so that temporaries fit in the cache
# Relative tolerances. Some formats store these values, or inputs to them, in f32: half an ulp is 6e-8.
_EPS_TOLERANCE, _ROTARY_TOLERANCE = 1e-6, 1e-5


@dataclasses.dataclass(frozen=True)
class TensorDifference:
    """The result of comparing one tensor of two checkpoints, a and b.

    Attributes:
      name: Hugging Face's name of the tensor.
      leaf: its path in `params`.
      layer: its layer; None outside the layers.
      shapes: the two shapes, [out, in].
      types: the two stored dtypes or quantizations, by the files' names.
      verdict: `equal`: bitwise equal, after widening if the types differ; `rounded`: one is exactly the other
        rounded to its own type; `close`: within the tolerance; `different`; or `shape`: the shapes differ.
      rounded_to: the type rounded to, if the verdict is `rounded`.
      max_difference: the largest |a - b|; NaN equals NaN, and only one NaN is infinite; None for `shape`.
      relative: `max_difference` relative to the largest |a|.
      not_finite: the number of NaN and infinite values in each.
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
        """Whether the tensors are equal up to rounding and the tolerance."""
        return self.verdict not in ("different", "shape")


@dataclasses.dataclass(frozen=True)
class FieldDifference:
    """A configuration field in which two models differ.

    Attributes:
      name: the field.
      values: its two values.
      matters: whether the difference changes what the model computes. Equivalent rope settings, the context
        length, and tied embeddings (whose tensors are compared) do not.
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
      leaf: the leaf.
      layer: its layer; None outside the layers.
      arrays: the two tensors, in Hugging Face's layout, any float dtypes.
      types: their stored types, such as F32 or Q8_0, to which each may have been rounded.
      tolerance: the largest |a - b| that counts as close, relative to the largest |a|.
    """
    a, b = arrays
    name, path, shapes = leaf.name("hf", layer), ".".join(leaf.path), (a.shape, b.shape)
    if a.shape != b.shape:
        return TensorDifference(name, path, layer, shapes, types, "shape", None, None, None)
    wide = np.float64 if np.float64 in (a.dtype, b.dtype) else np.float32
    rows, not_finite = max(1, _CHUNK // a.shape[-1]), [0, 0]
    a, b = (array.reshape(-1, array.shape[-1]) for array in (a, b))
    # The sides that could be the other side rounded to their own type, judging by the rows so far.
    rounded = {0, 1} if types[0] != types[1] else set()
    equal, difference, largest = True, 0.0, 0.0
    for start in range(0, len(a), rows):
        x, y = (array[start : start + rows].astype(wide) for array in (a, b))
        for side, values in enumerate((x, y)):
            not_finite[side] += int(values.size - np.isfinite(values).sum())
        largest = max(largest, float(np.max(np.abs(x), where=np.isfinite(x), initial=0.0)))
        if _bitwise_equal(x, y):
            continue
        equal = False
        difference = max(difference, max_difference(x, y))
        rounded = {side for side in rounded if _is_rounding((x, y)[side], (y, x)[side], types[side])}
    relative = difference / largest if largest else math.inf if difference else 0.0
    verdict: Verdict = (
        "equal" if equal else "rounded" if rounded else "close" if relative <= tolerance else "different"
    )
    # If both sides qualify, the finer type was rounded to: 4-bit blocks survive a cast to bfloat16.
    finest = min(rounded, key=lambda side: (types[side] not in FLOAT_DTYPES, side), default=0)
    return TensorDifference(
        name,
        path,
        layer,
        shapes,
        types,
        verdict,
        rounded_to=types[finest] if verdict == "rounded" else None,
        max_difference=difference,
        relative=relative,
        not_finite=(not_finite[0], not_finite[1]),
    )


def _bitwise_equal(x: np.ndarray, y: np.ndarray) -> bool:
    bits = f"u{x.dtype.itemsize}"
    return np.array_equal(x.view(bits), y.view(bits))


def max_difference(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the largest |x - y|, where NaN equals NaN; infinite if only one of two values is NaN."""
    with np.errstate(invalid="ignore", over="ignore"):
        differences = np.abs(x - y)
    if np.isnan(largest := differences.max()):  # from a NaN, or from inf - inf
        differences[(x == y) | (np.isnan(x) & np.isnan(y))] = 0
        largest = np.nan_to_num(differences, nan=np.inf, posinf=np.inf).max()
    return float(largest)


def _is_rounding(x: np.ndarray, y: np.ndarray, type_: str) -> bool:
    """Whether `x` equals `y` rounded to the stored type `type_`."""
    if type_ in FLOAT_DTYPES:
        with np.errstate(over="ignore"):
            rounded = y.astype(FLOAT_DTYPES[type_]).astype(x.dtype)
        return _bitwise_equal(x, rounded) or np.array_equal(x, rounded, equal_nan=True)
    if type_.startswith(INT8):
        rows = y.astype(np.float32).reshape(-1, int(type_.removeprefix(f"{INT8}/")))
        scales = np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)
        steps = np.rint(rows / np.where(scales == 0, 1, scales))
        return np.array_equal(x.reshape(rows.shape), steps * scales)
    if type_ not in gguf.GGMLQuantizationType.__members__:
        return False
    kind = gguf.GGMLQuantizationType[type_]
    try:
        # Blocks are within rows, so neither the order of rotary rows nor chunking matters.
        return np.array_equal(
            x, gguf.quants.dequantize(gguf.quants.quantize(y.astype(np.float32), kind), kind)
        )
    except (NotImplementedError, gguf.quants.QuantError):  # only llama.cpp can quantize to this type
        return False


def stored_type(tensors: Tensors, leaf: Leaf, layer: int | None) -> str:
    """Returns the stored type of a tensor by its file's name: BF16, Q4_1; or INT8/64, for groups of 64."""
    if isinstance(tensors, StoredTensors):
        info = tensors.source.tensors[leaf.name(tensors.source.format, layer)]
        values = math.prod(info.shape)
        return f"{INT8}/{4 * values // (info.nbytes - values)}" if info.dtype == INT8 else info.dtype
    dtype = tensors.dtype(leaf, layer)
    return DTYPE_NAMES.get(dtype, dtype.name)


def compare_configs(a: LlamaConfig, b: LlamaConfig) -> list[FieldDifference]:
    """Lists the fields in which two configurations differ."""
    ignored = {"max_position_embeddings", "tie_word_embeddings"}
    if _same_rotary(a, b):
        ignored.update(("rope_theta", "rope_scaling"))
    if math.isclose(a.rms_norm_eps, b.rms_norm_eps, rel_tol=_EPS_TOLERANCE):
        ignored.add("rms_norm_eps")
    pairs = (
        (field.name, getattr(a, field.name), getattr(b, field.name))
        for field in dataclasses.fields(LlamaConfig)
    )
    return [FieldDifference(name, (x, y), name not in ignored) for name, x, y in pairs if x != y]


def _same_rotary(a: LlamaConfig, b: LlamaConfig) -> bool:
    (x, x_factor), (y, y_factor) = (
        rotary_frequencies(head_dim=c.head_dim, theta=c.rope_theta, scaling=c.rope_scaling) for c in (a, b)
    )
    if x.shape != y.shape:  # head_dim differs, and is reported as such
        return (a.rope_theta, a.rope_scaling) == (b.rope_theta, b.rope_scaling)
    return np.allclose(x, y, rtol=_ROTARY_TOLERANCE, atol=0) and math.isclose(
        x_factor, y_factor, rel_tol=_ROTARY_TOLERANCE
    )
