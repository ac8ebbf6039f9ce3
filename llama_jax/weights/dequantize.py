"""The arithmetic of quantized Hugging Face checkpoints: integer codes and scales to f32.

Values are rounded to the dtype of the scales, as the reference implementations do, and returned as f32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# Column i of the eight in a word is at position _AWQ_ORDER[i] (autoawq, awq/utils/packing_utils.py).
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def unpack_words(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Unpacks unsigned codes of `bits` bits from little-endian 32-bit words.

    The codes of a row are one stream of bits; with 3, 5, 6 or 7 bits some lie in two words.

    Args:
      words: int32 [rows, W].
      bits: 1 to 8.
      count: codes in a row; `count * bits <= 32 * W`.

    Returns:
      uint8 [rows, count].
    """
    if words.dtype != np.int32 or words.ndim != 2 or count * bits > 32 * words.shape[1]:
        raise ValueError(f"{words.dtype} {list(words.shape)} does not hold rows of {count} {bits}-bit codes")
    raw = np.ascontiguousarray(words).view(np.uint8).reshape(len(words), -1)  # little-endian, as the stream
    if bits == 8:
        return raw[:, :count]
    stream = np.unpackbits(raw, axis=1, bitorder="little")[:, : count * bits]
    codes = np.zeros((len(words), count), np.uint8)
    for bit in range(bits):
        codes |= stream[:, bit::bits] << np.uint8(bit)
    return codes


def gptq(
    qweight: np.ndarray,
    qzeros: np.ndarray,
    scales: np.ndarray,
    groups: np.ndarray,
    bits: int,
    zero_offset: int,
) -> np.ndarray:
    """GPTQ (arXiv 2210.17323), as GPTQModel's `dequantize_weight` computes it.

    Args:
      qweight: int32 [in * bits / 32, out], packed along the inputs.
      qzeros: int32 [G, out * bits / 32], packed along the outputs.
      scales: [G, out].
      groups: the group of each input, int [in].
      bits: of a code.
      zero_offset: what is added to each zero point: 1 in the format `gptq`, 0 in `gptq_v2`.

    Returns:
      f32 [out, in].
    """
    codes = unpack_words(qweight.T, bits, len(groups))
    zeros = unpack_words(qzeros, bits, scales.shape[1]).astype(np.float32) + zero_offset
    return _rounded(codes - zeros.T[:, groups], scales.T[:, groups], scales.dtype)


def awq(qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, group_size: int) -> np.ndarray:
    """AWQ's 4-bit `gemm` layout (arXiv 2306.00978), as autoawq's `dequantize_gemm` computes it.

    Args:
      qweight: int32 [in, out / 8].
      qzeros: int32 [G, out / 8].
      scales: [G, out].
      group_size: inputs of a group.

    Returns:
      f32 [out, in].
    """
    codes, zeros = (_awq_codes(words, scales.shape[1]) for words in (qweight, qzeros))
    difference = codes.astype(np.float32) - np.repeat(zeros, group_size, 0).astype(np.float32)
    return np.ascontiguousarray(_rounded(difference, np.repeat(scales, group_size, 0), scales.dtype).T)


def _awq_codes(words: np.ndarray, count: int) -> np.ndarray:
    codes = unpack_words(words, 4, count)
    return codes.reshape(len(codes), -1, 8)[..., _AWQ_ORDER].reshape(codes.shape)


def blockwise_4bit(
    packed: np.ndarray, code: np.ndarray, absmax: np.ndarray, blocksize: int, dtype: np.dtype[Any]
) -> np.ndarray:
    """bitsandbytes' NF4 and FP4 (QLoRA, arXiv 2305.14314): two codes a byte, the first in the high half.

    Args:
      packed: uint8 [n / 2].
      code: the values of the 16 codes, f32.
      absmax: the scale of each block, f32.
      blocksize: values in a block.
      dtype: what `dequantize_4bit` rounds to.

    Returns:
      f32 [n].
    """
    values = np.stack([code[packed >> 4], code[packed & 15]], -1).reshape(-1)
    return _rounded(values, _by_block(absmax, blocksize, values.size), dtype)


def blockwise_8bit(
    codes: np.ndarray, code: np.ndarray, absmax: np.ndarray, blocksize: int, offset: float
) -> np.ndarray:
    """bitsandbytes' 8-bit blocks, in which QLoRA's double quantization stores the scales of 4-bit blocks."""
    return code[codes] * _by_block(absmax, blocksize, codes.size) + np.float32(offset)


def _by_block(scales: np.ndarray, blocksize: int, size: int) -> np.ndarray:
    """Repeats each scale over its block of a vector of `size` values."""
    blocks = -(-size // blocksize)
    if len(scales) != blocks:
        raise ValueError(f"there are {len(scales)} scales for {blocks} blocks of {blocksize}")
    return np.repeat(scales, min(blocksize, size))[:size]


def scaled(
    values: np.ndarray, scale: np.ndarray, zeros: np.ndarray | None, dtype: np.dtype[Any]
) -> np.ndarray:
    """Values times a scale for each block of a grid, minus the block's zero point.

    Args:
      values: [out, in], of any dtype that f32 holds.
      scale: [], [1], [out] or [rows, columns]; rows divide out and columns in.
      zeros: zero points, of the shape of `scale`; or None.
      dtype: what the reference rounds to.

    Returns:
      f32 [out, in].
    """
    result = values.astype(np.float32)
    if zeros is not None:
        result -= _spread(zeros.astype(np.float32), result.shape)
    return _rounded(result, _spread(scale, result.shape), dtype)


def _spread(grid: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Repeats each entry of a grid over its block of a matrix."""
    if grid.ndim < 2:
        grid = grid.reshape(-1, 1)
    if (
        len(grid.shape) != len(shape)
        or not grid.size
        or any(size % max(n, 1) for size, n in zip(shape, grid.shape, strict=True))
    ):
        raise ValueError(f"scales {list(grid.shape)} do not divide a matrix {list(shape)}")
    for axis, size in enumerate(shape):
        if grid.shape[axis] not in (1, size):
            grid = np.repeat(grid, size // grid.shape[axis], axis)
    return grid


def _rounded(values: np.ndarray, scale: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """`values * scale`, rounded once: products of short codes and 16-bit scales are exact in f32."""
    product = values * scale.astype(np.float32)
    return product if dtype == np.float32 else product.astype(dtype).astype(np.float32)
