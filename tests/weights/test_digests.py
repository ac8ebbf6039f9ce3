"""Digests do not depend on how an array is sharded or read, and change with it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.errors import CheckpointError
from llama_jax.meshes import make_mesh
from llama_jax.weights import digests


def digest(array: Any) -> str:
    return digests.text(digests.start({"x": array})["x"])


def whole(values: np.ndarray) -> str:
    return digests.text(digests.of_blocks(values.shape, [((0,) * values.ndim, values)]))


@pytest.mark.parametrize("small", [0, 1 << 20])  # on the devices, and on the host
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
def test_shards_and_the_whole_have_one_digest(
    dtype: str, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_SMALL", small)
    values = np.random.default_rng(0).integers(0, 200, (8, 6, 4)).astype(jnp.dtype(dtype))
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    shardings = [
        P(),
        P("fsdp", None, "tensor"),
        P(("data", "tensor"), "fsdp"),
        P(None, None, ("fsdp", "data")),
    ]
    tree = {str(spec): jax.device_put(values, NamedSharding(mesh, spec)) for spec in shardings}
    found = {digests.text(digest) for digest in digests.start(tree).values()}
    assert found == {whole(values)} == {digest(jnp.asarray(values))}


@given(st.integers(0, 7), st.integers(1, 5), st.integers(1, 100))
def test_blocks_of_any_size_have_the_digest_of_the_whole(first: int, second: int, most: int) -> None:
    values = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    blocks = [((0, 0), values[:first]), ((first, 0), values[first:, :second])]
    blocks.append(((first, second), values[first:, second:]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "_MAX_VALUES", most)
        assert digests.text(digests.of_blocks(values.shape, blocks)) == whole(values)


@given(st.data())
def test_every_changed_bit_and_every_swap_changes_it(data: st.DataObject) -> None:
    values = np.random.default_rng(1).normal(size=(5, 7)).astype(np.float32)
    changed = values.copy()
    place = data.draw(st.integers(0, values.size - 1))
    if data.draw(st.booleans()):
        changed.view(np.uint32).reshape(-1)[place] ^= np.uint32(1 << data.draw(st.integers(0, 31)))
    else:
        other = (place + data.draw(st.integers(1, values.size - 1))) % values.size
        changed.reshape(-1)[[place, other]] = changed.reshape(-1)[[other, place]]
    assert whole(changed) != whole(values)


def test_arrays_that_differ_are_named(tmp_path: Any) -> None:
    tree = {"a": {"b": jnp.arange(3)}, "c": jnp.ones((2, 2)), "d": jnp.zeros(())}
    digests.write(tmp_path, digests.start(tree))
    digests.check(tmp_path, digests.start(tree))
    with pytest.raises(CheckpointError, match=r"damaged: a\.b, d is not what was saved"):
        digests.check(tmp_path, digests.start(tree | {"a": {"b": jnp.arange(1, 4)}, "d": jnp.ones(())}))
    (tmp_path / digests.NAME).write_text('{"a.b": 3}')
    with pytest.raises(CheckpointError, match="damaged: not digests by name"):
        digests.read(tmp_path)
