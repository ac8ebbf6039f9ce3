"""Quantized Hugging Face checkpoints, dequantized on reading: bitsandbytes, GPTQ, AWQ, fp8, and more.

Each quantized matrix is several tensors of the files. They become one, `NAME.weight`, with the values that
the reference implementation multiplies by; activations are not quantized.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.errors import CheckpointError
from llama_jax.weights import dequantize
from llama_jax.weights.json_fields import parse_json
from llama_jax.weights.source import (
    FLOAT8,
    FLOAT_DTYPES,
    PART_DTYPES,
    TensorInfo,
    quote,
    read_bytes,
    slice_rows,
)

_WEIGHT = ".weight"
_MAX_STATE = 1 << 16  # bytes of bitsandbytes' description of one matrix
Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class QuantizedInfo(TensorInfo):
    """A matrix that is stored quantized.

    Attributes:
      parts: the tensors that it is computed from.
      compute: makes f32 of `shape` from them; and some rows from those rows of `by_rows` and all of the rest.
      by_rows: the parts that lie in the file row by row, or by blocks of as many rows; none where the outputs
        are packed, as in GPTQ and AWQ, or the values are a list, as in 4 bits of bitsandbytes.
    """

    parts: Mapping[str, TensorInfo]
    compute: Callable[[Arrays], np.ndarray]
    by_rows: tuple[str, ...] = ()

    def read(self, name: str) -> np.ndarray:
        """Reads and dequantizes it, to f32 of `shape`.

        Raises:
          CheckpointError: if its bytes can no longer be read, or do not fit each other.
        """
        try:
            result = self.compute({key: read_part(name, info) for key, info in self.parts.items()})
        except (ValueError, IndexError, TypeError) as error:
            raise self._malformed(name, str(error)) from None
        if result.shape != self.shape:
            raise self._malformed(name, f"they make {list(result.shape)}, not {list(self.shape)}")
        return np.ascontiguousarray(result, np.float32)

    def read_rows(self, name: str, begin: int, end: int) -> np.ndarray:
        """Reads and dequantizes some rows, to f32, and no other bytes where the layout allows it.

        Raises:
          CheckpointError: as `read`.
        """
        height = self.shape[0]
        divided = {key: self.parts[key] for key in self.by_rows if key in self.parts}
        divided = {key: info for key, info in divided.items() if info.shape and info.shape[0] > 1}
        if not divided or any(height % info.shape[0] for info in divided.values()):
            return self.read(name)[begin:end]
        blocks = {key: height // info.shape[0] for key, info in divided.items()}
        step = math.lcm(*blocks.values())
        first, last = begin - begin % step, end + -end % step
        parts = {
            key: slice_rows(info, first // blocks[key], last // blocks[key]) if key in blocks else info
            for key, info in self.parts.items()
        }
        rows = dataclasses.replace(self, shape=(last - first, self.shape[1]), parts=parts)
        return rows.read(name)[begin - first : end - first]

    def _malformed(self, name: str, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self.file}: the parts of the {self.dtype} tensor {quote(name)} do not fit each other: "
            f"{' '.join(reason.split())[:200]}; download it again"
        )


def read_part(name: str, info: TensorInfo) -> np.ndarray:
    """Reads a tensor of any dtype of safetensors."""
    dtype = FLOAT_DTYPES.get(info.dtype) or PART_DTYPES[info.dtype]
    return read_bytes(name, info).view(dtype).reshape(info.shape)


class Unsupported(ValueError):
    """A quantization that is not read."""


def dequantized(
    origin: Path, settings: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> dict[str, TensorInfo]:
    """Replaces the parts of quantized matrices by the matrices.

    Args:
      origin: the config.json, for messages.
      settings: its `quantization_config`; empty if there is none.
      tensors: the tensors of the files.

    Raises:
      CheckpointError: for a method or a layout that is not read, and if a part is missing.
    """
    try:
        return _dequantized(settings, tensors)
    except Unsupported as error:
        raise CheckpointError(f"{origin}: {error}") from None


def _dequantized(settings: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    method = str(settings.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in settings else ""))
    readers: dict[str, Callable[[Mapping[str, Any], str, _Parts], QuantizedInfo | None]] = {
        "bitsandbytes": _bitsandbytes,
        "gptq": _gptq,
        "awq": _awq,
        "fp8": _scaled,
        "fbgemm_fp8": _scaled,
        "compressed-tensors": _scaled,
        "": _scaled,
    }
    if method not in readers:
        raise Unsupported(
            f"quantization_config has the method {quote(method)}; {', '.join(filter(None, readers))} and "
            "GGUF files are read: take the model unquantized, or in one of them"
        )
    result: dict[str, TensorInfo] = {}
    for module, parts in _modules(tensors).items():
        info = readers[method](settings, module, parts)
        if info is None:
            result |= {module + suffix: part for suffix, part in parts.items()}
            continue
        result[module + _WEIGHT] = info
        result |= {module + suffix: part for suffix, part in parts.items() if suffix == ".bias"}
    return result


_Parts = Mapping[str, TensorInfo]
_MATRICES = (".qweight", ".qzeros", ".scales", ".weight_packed")
_SUFFIXES = (
    *(_WEIGHT, ".bias", ".qweight", ".qzeros", ".scales", ".g_idx", ".SCB", ".weight_format"),
    *(".weight_scale", ".weight_scale_inv", ".weight_zero_point"),
    *(".weight_packed", ".weight_shape", ".weight_g_idx"),
    *(".input_scale", ".input_zero_point", ".output_scale", ".activation_scale", ".input_scale_ub"),
)


def _modules(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Groups tensors by the module whose parts they are."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        before, marker, after = name.partition(_WEIGHT + ".")  # bitsandbytes: X.weight.absmax
        suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), "")
        module = before if marker else name.removesuffix(suffix)
        modules.setdefault(module, {})[marker + after if marker else suffix] = info
    return modules


def _info(
    label: str,
    shape: tuple[int, ...],
    parts: _Parts,
    compute: Callable[[Arrays], np.ndarray],
    by_rows: tuple[str, ...] = (),
) -> QuantizedInfo:
    first = next(iter(parts.values()))
    nbytes = sum(info.nbytes for info in parts.values())
    return QuantizedInfo(shape, label, nbytes, first.file, first.offset, parts, compute, by_rows)


def _require(module: str, parts: _Parts, *suffixes: str) -> None:
    for suffix in suffixes:
        if suffix not in parts:
            first = next(iter(parts.values()))
            raise CheckpointError(
                f"{first.file}: {quote(module + suffix)}, a part of a quantized matrix, is missing; "
                "download the model again"
            )
        if len(parts[suffix].shape) != 2 and suffix in _MATRICES:
            raise CheckpointError(
                f"{parts[suffix].file}: {quote(module + suffix)} has the shape {list(parts[suffix].shape)}; "
                "it must be a matrix: take a fresh copy"
            )


def _bits(settings: Mapping[str, Any], default: int = 4) -> int:
    bits = settings.get("bits", settings.get("w_bit", default))
    if bits not in (2, 3, 4, 5, 6, 7, 8):
        raise Unsupported(f"quantization_config has bits {quote(str(bits))}; 2 to 8 are read")
    return int(bits)


def _gptq(settings: Mapping[str, Any], module: str, parts: _Parts) -> QuantizedInfo | None:
    if ".qweight" not in parts:
        return _scaled(settings, module, parts)
    _require(module, parts, ".qweight", ".qzeros", ".scales")
    bits = _bits(settings)
    layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise Unsupported(
            f"quantization_config has the checkpoint_format {quote(str(layout))}; gptq and gptq_v2 are "
            "read: save the model in one of them"
        )
    inputs = parts[".qweight"].shape[0] * 32 // bits
    count = parts[".scales"].shape[0]
    size = settings.get("group_size")
    size = size if type(size) is int and size > 0 else max(inputs, 1)

    def compute(arrays: Arrays) -> np.ndarray:
        groups = arrays.get(".g_idx")
        groups = np.arange(inputs) // size if groups is None else groups
        if len(groups) != inputs or groups.min() < 0 or groups.max() >= count:
            raise ValueError(f"g_idx has not the groups 0 to {count - 1} of {inputs} inputs")
        words = (arrays[".qweight"], arrays[".qzeros"], arrays[".scales"])
        return dequantize.gptq(*words, groups, bits, zero_offset=int(layout == "gptq"))

    used = {
        suffix: parts[suffix] for suffix in (".qweight", ".qzeros", ".scales", ".g_idx") if suffix in parts
    }
    return _info(f"GPTQ{bits}", (parts[".qweight"].shape[-1], inputs), used, compute)


def _awq(settings: Mapping[str, Any], module: str, parts: _Parts) -> QuantizedInfo | None:
    if ".qweight" not in parts:
        return _scaled(settings, module, parts)
    _require(module, parts, ".qweight", ".qzeros", ".scales")
    version = str(settings.get("version") or "gemm").lower()
    if version != "gemm" or _bits(settings) != 4:
        raise Unsupported(
            f"quantization_config has version {quote(version)} with {_bits(settings)} bits; of AWQ the "
            "4-bit gemm layout is read: save the model in it"
        )
    inputs = parts[".qweight"].shape[0]
    size = -(-inputs // max(parts[".scales"].shape[0], 1))

    def compute(arrays: Arrays) -> np.ndarray:
        return dequantize.awq(arrays[".qweight"], arrays[".qzeros"], arrays[".scales"], size)

    used = {suffix: parts[suffix] for suffix in (".qweight", ".qzeros", ".scales")}
    return _info("AWQ", (parts[".scales"].shape[-1], inputs), used, compute)


def _bitsandbytes(settings: Mapping[str, Any], module: str, parts: _Parts) -> QuantizedInfo | None:
    weight = parts.get(_WEIGHT)
    if weight is not None and weight.dtype == "I8" and ".SCB" in parts:  # LLM.int8 (arXiv 2208.07339)

        def rows(arrays: Arrays) -> np.ndarray:
            scale = arrays[".SCB"].astype(np.float32)
            return dequantize.scaled(arrays[_WEIGHT], scale, None, scale.dtype) * np.float32(1 / 127)

        names = (_WEIGHT, ".SCB")
        return _info("INT8", weight.shape, {suffix: parts[suffix] for suffix in names}, rows, names)
    state = next((suffix for suffix in parts if suffix.startswith(".weight.quant_state.")), None)
    if weight is None or state is None:
        return _scaled(settings, module, parts)
    nested = [".weight.nested_quant_map"] if ".weight.nested_absmax" in parts else []
    _require(module, parts, ".weight.absmax", ".weight.quant_map", *nested)
    fields = _quant_state(module, parts[state])
    used = {suffix: info for suffix, info in parts.items() if suffix.startswith(_WEIGHT) and suffix != state}

    def compute(arrays: Arrays) -> np.ndarray:
        absmax = arrays[".weight.absmax"].reshape(-1)
        if ".weight.nested_absmax" in arrays:
            scales = (arrays[".weight.nested_quant_map"], arrays[".weight.nested_absmax"])
            absmax = dequantize.blockwise_8bit(
                absmax, *scales, fields["nested_blocksize"], fields["nested_offset"]
            )
        values = (arrays[_WEIGHT].reshape(-1), arrays[".weight.quant_map"], absmax.astype(np.float32))
        return dequantize.blockwise_4bit(*values, fields["blocksize"], fields["dtype"]).reshape(
            fields["shape"]
        )

    return _info(fields["quant_type"].upper(), tuple(fields["shape"]), used, compute)


def _quant_state(module: str, info: TensorInfo) -> dict[str, Any]:
    """Reads bitsandbytes' description of a 4-bit matrix, JSON in a tensor of bytes."""
    if info.nbytes > _MAX_STATE:
        raise CheckpointError(
            f"{info.file}: {quote(module)}: a quant_state of {info.nbytes} bytes; take a fresh copy"
        )
    fields = parse_json(info.file, read_bytes(module, info).tobytes())
    shape, dtypes = fields.get("shape"), {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    sizes = {key: fields.get(key, 256) for key in ("blocksize", "nested_blocksize")}
    valid = (
        isinstance(shape, list)
        and len(shape) == 2
        and all(type(size) is int and 0 < size < 1 << 31 for size in [*shape, *sizes.values()])
        and isinstance(offset := fields.get("nested_offset", 0.0), int | float)
        and math.isfinite(offset)
        and str(fields.get("dtype")) in dtypes
        and str(fields.get("quant_type")) in ("nf4", "fp4")
    )
    if not valid:
        raise CheckpointError(
            f"{info.file}: {quote(module)}: the quant_state {quote(str(fields))} is not that of a 4-bit "
            "matrix; take a fresh copy"
        )
    dtype = FLOAT_DTYPES[dtypes[fields["dtype"]]]
    return {"nested_offset": 0.0, **fields, **sizes, "dtype": dtype}


def _scaled(settings: Mapping[str, Any], module: str, parts: _Parts) -> QuantizedInfo | None:
    """Scaled floats and integers of 8 bits, and packed integers: fp8, fbgemm_fp8 and compressed-tensors."""
    if ".weight_packed" in parts:
        return _packed(settings, module, parts)
    weight = parts.get(_WEIGHT)
    scale = next((suffix for suffix in (".weight_scale_inv", ".weight_scale") if suffix in parts), None)
    if weight is None or (weight.dtype not in FLOAT8 and not (weight.dtype == "I8" and scale)):
        return None
    if scale is None and settings:
        _require(module, parts, ".weight_scale")
    suffixes = (_WEIGHT, scale or "", ".weight_zero_point")
    used = {suffix: parts[suffix] for suffix in suffixes if suffix in parts}

    def compute(arrays: Arrays) -> np.ndarray:
        one = np.ones(1, np.float32)
        factors = arrays[scale] if scale else one
        if factors.dtype == np.uint8:  # exponents, of 8-bit blocks in MX formats
            factors = np.exp2(factors.astype(np.float32) - 127)
        rounding = factors.dtype if factors.dtype.itemsize >= 2 else np.dtype(np.float32)
        zeros = arrays.get(".weight_zero_point")
        return dequantize.scaled(arrays[_WEIGHT], factors, zeros, rounding)

    return _info("FP8" if weight.dtype in FLOAT8 else "INT8", weight.shape, used, compute, suffixes)


def _packed(settings: Mapping[str, Any], module: str, parts: _Parts) -> QuantizedInfo:
    """compressed-tensors' `pack-quantized`: signed codes of 2 to 8 bits, packed along the inputs."""
    _require(module, parts, ".weight_packed", ".weight_scale", ".weight_shape")
    packed, size = parts[".weight_packed"], parts[".weight_shape"]
    if packed.dtype != "I32" or size.dtype not in ("I64", "I32"):
        raise Unsupported(
            f"{packed.file}: {quote(module)} is packed in {packed.dtype}; packed I32 words are read"
        )
    shape = tuple(int(n) for n in read_part(module, size).reshape(-1)[:2])
    if len(shape) != 2 or shape[0] != packed.shape[0] or not 0 < shape[1] <= packed.shape[1] * 32:
        raise CheckpointError(
            f"{packed.file}: {quote(module)} has the weight_shape {list(shape)}; take a fresh copy"
        )
    bits = _scheme_bits(settings, packed.shape[1], shape[1])
    suffixes = (".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_g_idx")
    used = {suffix: parts[suffix] for suffix in suffixes if suffix in parts}
    offset = 1 << (bits - 1)

    def compute(arrays: Arrays) -> np.ndarray:
        codes = dequantize.unpack_words(arrays[".weight_packed"], bits, shape[1]).astype(np.float32) - offset
        factors, zeros = arrays[".weight_scale"], arrays.get(".weight_zero_point")
        if zeros is not None and zeros.dtype == np.int32:
            zeros = dequantize.unpack_words(zeros.T, bits, shape[0]).T.astype(np.float32) - offset
        if (order := arrays.get(".weight_g_idx")) is not None and order.min() >= 0:
            if len(order) != shape[1] or order.max() >= factors.shape[1]:
                raise ValueError(f"weight_g_idx has not the groups of {shape[1]} inputs")
            factors, zeros = factors[:, order], None if zeros is None else zeros[:, order]
        return dequantize.scaled(codes, factors, zeros, factors.dtype)

    zeros = parts.get(".weight_zero_point")  # packed along the outputs, if they are packed
    by_rows = suffixes[:3] if zeros is None or zeros.dtype != "I32" else ()
    return _info(f"INT{bits}", shape, used, compute, by_rows)


def _scheme_bits(settings: Mapping[str, Any], words: int, inputs: int) -> int:
    """The bits of a code: those of config.json's schemes that fit the packed width."""
    groups = settings.get("config_groups")
    schemes = groups.values() if isinstance(groups, dict) else ()
    found = {
        weights["num_bits"]
        for scheme in schemes
        if isinstance(scheme, dict)
        and isinstance(weights := scheme.get("weights"), dict)
        and "num_bits" in weights
    }
    fitting = [
        bits for bits in sorted(found, key=str) if bits in range(2, 9) and -(-inputs * bits // 32) == words
    ]
    if len(fitting) != 1:
        widths = ", ".join(map(str, sorted(found, key=str))) or "no"
        raise Unsupported(
            f"quantization_config has schemes of {widths} bits for "
            f"rows of {inputs} weights in {words * 32} bits; take a fresh copy of config.json"
        )
    return int(fitting[0])
