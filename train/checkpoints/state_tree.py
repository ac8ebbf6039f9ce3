"""The training state in Orbax's form: the parameter tree, and all other leaves by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.errors import CheckpointError
from llama_jax.weights.orbax import tree_metadata
from llama_jax.weights.runs import PARAMS
from llama_jax.weights.source import format_list


def split_state(state: Any) -> tuple[Any, dict[str, Any]]:
    """Splits a state into its parameters and the other leaves by name, random keys as their key data.

    By name, since Orbax would restore named tuples as dicts.
    """
    rest = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    params = rest.pop(PARAMS)
    leaves, _ = jax.tree_util.tree_flatten_with_path(rest)
    return params, {
        jax.tree_util.keystr(path, simple=True, separator="."): _key_data(leaf) for path, leaf in leaves
    }


def join_state(like: Any, params: Any, leaves: Mapping[str, Any]) -> Any:
    """The inverse of `split_state`, with the structure and the random-key implementations of `like`."""
    rest = {field.name: getattr(like, field.name) for field in dataclasses.fields(like)}
    del rest[PARAMS]
    targets, structure = jax.tree_util.tree_flatten_with_path(rest)
    values = [leaves[jax.tree_util.keystr(path, simple=True, separator=".")] for path, _ in targets]
    values = [
        jax.random.wrap_key_data(value, impl=_key_impl(leaf)) if _is_key(leaf) else value
        for value, (_, leaf) in zip(values, targets, strict=True)
    ]
    return dataclasses.replace(like, params=params, **jax.tree_util.tree_unflatten(structure, values))


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(leaf: Any) -> Any:
    impls: list[Any] = []
    jax.eval_shape(lambda key: impls.append(jax.random.key_impl(key)), leaf)
    return impls[0]


def _key_data(leaf: Any) -> Any:
    """Returns the uint32 data of a random key, which Orbax can store; other leaves as they are."""
    if not _is_key(leaf):
        return leaf
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.random.key_data(leaf)
    data = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def check_tree(folder: Path, expected: Any) -> None:
    """Checks names, shapes and dtypes of a saved tree, since Orbax silently casts other dtypes.

    Raises:
      CheckpointError: naming each tensor that differs, with both shapes and dtypes.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(expected)
    ours = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    saved = tree_metadata(folder)

    def show(leaf: Any) -> str:
        return f"{leaf.dtype.name} {list(leaf.shape)}"

    problems = [
        f"{name} is {show(saved[name])} in the checkpoint and {show(leaf)} in this run"
        for name, leaf in ours.items()
        if name in saved and show(saved[name]) != show(leaf)
    ]
    for owner, names in (
        ("only this run has", set(ours) - set(saved)),
        ("only the checkpoint has", set(saved) - set(ours)),
    ):
        if names:
            problems.append(f"{owner} {format_list(sorted(names), 6)}")
    if problems:
        raise CheckpointError(
            f"{folder}: of another model or optimizer: {format_list(problems, 6)}; resume with the "
            "configuration that the run was started with, or choose another train.run_dir"
        )
