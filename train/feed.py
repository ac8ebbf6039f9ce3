"""Transfers this process's rows of a batch to the devices of the mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax.errors import ConfigError
from llama_jax.sharding import TOKENS_BT, batch_axes, batch_parts, named

from .config.objective import RL_OBJECTIVES


def batch_dtypes(
    objective: str, *, reference: bool = False, logprobs: Sequence[str] = ("old_logprobs",)
) -> dict[str, np.dtype]:
    """Names and dtypes of the arrays [B, T] of an objective's batches; see `objectives.common.Batch`.

    Args:
      objective: `train.objective`.
      reference: whether batches carry precomputed reference log-probabilities.
      logprobs: the log-probabilities that batches of completions carry (`RunConfig.logprob_arrays`).
    """
    int32, float32 = np.dtype(np.int32), np.dtype(np.float32)
    dtypes = dict.fromkeys(("tokens", "segment_ids", "positions"), int32)
    if objective == "pretrain":
        return dtypes
    if objective in RL_OBJECTIVES:
        floats = ("advantages", *logprobs, *(("old_values", "returns") if objective == "ppo" else ()))
        return {**dtypes, "mask": int32, **dict.fromkeys(floats, float32)}
    return {**dtypes, "mask": int32, "value": float32, **({"reference": float32} if reference else {})}


def only_arrays(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Drops a batch's metadata, such as the number of bytes of its text."""
    return {name: x for name, x in batch.items() if isinstance(x, np.ndarray)}


@dataclasses.dataclass(frozen=True)
class Feed:
    """This process's shard of every global batch, and its transfer to the devices.

    Processes whose devices hold the same rows (a `tensor` axis that spans processes) read the same shard.
    The mesh determines which devices a shard goes to, so if devices are not in the order of their processes,
    as on some pods, the rows of a batch are permuted: in every step in the same way.

    Attributes:
      shard, num_shards: this process reads shard `shard` of `num_shards`, batch_size / num_shards rows each.
    """

    shard: int
    num_shards: int
    _sharding: Any
    _shape: tuple[int, int]
    _local_row: Mapping[
        int, int
    ]  # first global row of a device's block -> the same row among those read here

    @staticmethod
    def for_mesh(mesh: Mesh | None, batch_size: int, seq_len: int) -> Feed:
        """Computes the shards.

        Raises:
          ConfigError: if the mesh does not divide the batch, or the shards of processes overlap or differ in
            size.
        """
        if mesh is None:
            return Feed(0, 1, None, (batch_size, seq_len), {})
        sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
        num_blocks = batch_parts(sizes)
        if batch_size % num_blocks:
            axes = batch_axes(sizes, "mesh.")
            raise ConfigError(
                f"train.global_batch_size is {batch_size}, which {axes} = {num_blocks} does "
                f"not divide; make it {-(-batch_size // num_blocks) * num_blocks}"
            )
        chunks = 2 * sizes["context"] if sizes["context"] > 1 else 1  # as in ring attention
        if seq_len % chunks:
            raise ConfigError(
                f"train.seq_len is {seq_len}, which 2 x mesh.context = {chunks} does not divide; "
                f"make it {-(-seq_len // chunks) * chunks}"
            )
        sharding, shape = named(mesh, TOKENS_BT), (batch_size, seq_len)
        starts_of: dict[int, set[int]] = {}  # process -> first rows of its devices' blocks
        indices: Mapping[Any, Any] = sharding.devices_indices_map(shape)
        for device, index in indices.items():
            starts_of.setdefault(device.process_index, set()).add(index[0].start or 0)
        shards = sorted({tuple(sorted(starts)) for starts in starts_of.values()})
        if len({len(shard) for shard in shards}) > 1 or sum(map(len, shards)) != num_blocks:
            raise ConfigError(
                f"mesh {sizes}: processes would need overlapping rows of a batch; let mesh.tensor x "
                "mesh.context divide the devices of a process, or be a multiple of them"
            )
        process = jax.process_index()
        local = tuple(sorted(starts_of[process])) if process in starts_of else shards[0]
        rows = batch_size // num_blocks
        local_row = {start: i * rows for i, start in enumerate(local)}
        return Feed(shards.index(local), len(shards), sharding, shape, local_row)

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Makes the global arrays [B, T] of a batch from this process's shard, [rows, T] each."""
        arrays = only_arrays(batch)
        if self._sharding is None:
            return {name: jax.device_put(x) for name, x in arrays.items()}
        return {name: self._global_array(x) for name, x in arrays.items()}

    def _global_array(self, local: np.ndarray) -> jax.Array:
        def block(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(self._shape[0])
            first = self._local_row[start]
            return local[first : first + stop - start, index[1]]

        return jax.make_array_from_callback(self._shape, self._sharding, block)
