"""Rows from this process's data to the devices of the mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax.errors import ConfigError
from llama_jax.sharding import TOKENS_BT, named


def batch_arrays(objective: str, *, reference: bool = False) -> dict[str, np.dtype]:
    """The arrays [B, T] of an objective's batches, and their dtypes; see `objectives.Batch`.

    Pairs whose `reference` log-probabilities were computed beforehand carry them.
    """
    whole, number = np.dtype(np.int32), np.dtype(np.float32)
    arrays = dict.fromkeys(("tokens", "segment_ids", "positions"), whole)
    if objective == "pretrain":
        return arrays
    return {**arrays, "mask": whole, "value": number, **({"reference": number} if reference else {})}


def arrays_of(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A batch without what else is said of it, such as how many bytes of text it spells."""
    return {name: x for name, x in batch.items() if isinstance(x, np.ndarray)}


@dataclasses.dataclass(frozen=True)
class Feed:
    """Which share of every global batch this process reads, and where it goes.

    Processes whose devices hold the same rows (a `tensor` axis that spans processes) read the same share.
    Which share goes to which devices follows the mesh, so on pods whose devices are not in order of their
    processes a batch's rows are permuted: the same ones in every step.

    Attributes:
      share, shares: this process reads share number `share` of so many, each batch_size / shares rows.
    """

    share: int
    shares: int
    _layout: Any
    _shape: tuple[int, int]
    _place: Mapping[int, int]  # first row of a device's part -> its place among the rows read here

    @staticmethod
    def over(mesh: Mesh | None, batch_size: int, seq_len: int) -> Feed:
        """Works out the shares.

        Raises:
          ConfigError: if the mesh does not divide the batch, or splits it in a way that no equal shares fit.
        """
        if mesh is None:
            return Feed(0, 1, None, (batch_size, seq_len), {})
        sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
        parts = sizes["data"] * sizes["fsdp"]
        if batch_size % parts:
            raise ConfigError(
                f"train.global_batch_size is {batch_size}, which mesh.data x mesh.fsdp = {parts} does not divide; "
                f"make it {-(-batch_size // parts) * parts}"
            )
        if seq_len % sizes["context"]:
            raise ConfigError(
                f"train.seq_len is {seq_len}, which mesh.context {sizes['context']} does not divide; "
                f"make it {-(-seq_len // sizes['context']) * sizes['context']}"
            )
        layout, shape = named(mesh, TOKENS_BT), (batch_size, seq_len)
        rows: dict[int, set[int]] = {}
        parts_of: Mapping[Any, Any] = layout.devices_indices_map(shape)
        for device, index in parts_of.items():
            rows.setdefault(device.process_index, set()).add(index[0].start or 0)
        shares = sorted({tuple(sorted(starts)) for starts in rows.values()})
        if len({len(share) for share in shares}) > 1 or sum(map(len, shares)) != parts:
            raise ConfigError(
                f"mesh {sizes}: processes would need overlapping rows of a batch; let mesh.tensor x "
                "mesh.context divide the devices of a process, or be a multiple of them"
            )
        mine = tuple(sorted(rows[jax.process_index()])) if jax.process_index() in rows else shares[0]
        size = batch_size // parts
        return Feed(shares.index(mine), len(shares), layout, shape, {s: i * size for i, s in enumerate(mine)})

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """The global arrays of a batch of which this process has read its share, [rows, T] each."""
        arrays = arrays_of(batch)
        if self._layout is None:
            return {name: jax.device_put(x) for name, x in arrays.items()}
        return {name: self._array(x) for name, x in arrays.items()}

    def _array(self, local: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(self._shape[0])
            first = self._place[start]
            return local[first : first + stop - start, index[1]]

        return jax.make_array_from_callback(self._shape, self._layout, part)
