"""The training state in Orbax's form: the parameter tree, and all other leaves by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.errors import CheckpointError
from llama_jax.weights.orbax_tree import tree_metadata
from llama_jax.weights.runs import PARAMS
from llama_jax.weights.source import format_list

from ..trainable import VALUE

_VALUE = "value_function"


def split_state(state: Any) -> tuple[Any, dict[str, Any]]:
    """Splits a state into its parameters and the other leaves by name, random keys as their key data.

    By name, since Orbax would restore named tuples as dicts. A value function is not among the parameters:
    these are a language model, which every reader of a run reads.
    """
    params, rest = _split(state)
    leaves, _ = jax.tree_util.tree_flatten_with_path(rest)
    return params, {
        jax.tree_util.keystr(path, simple=True, separator="."): _key_data(leaf) for path, leaf in leaves
    }


def join_state(like: Any, params: Any, leaves: Mapping[str, Any]) -> Any:
    """The inverse of `split_state`, with the structure and the random-key implementations of `like`."""
    _, rest = _split(like)
    targets, structure = jax.tree_util.tree_flatten_with_path(rest)
    values = [leaves[jax.tree_util.keystr(path, simple=True, separator=".")] for path, _ in targets]
    values = [
        jax.random.wrap_key_data(value, impl=_key_impl(leaf)) if _is_key(leaf) else value
        for value, (_, leaf) in zip(values, targets, strict=True)
    ]
    rest = jax.tree_util.tree_unflatten(structure, values)
    if _VALUE in rest:
        params = {**params, VALUE: rest.pop(_VALUE)}
    return dataclasses.replace(like, params=params, **rest)


def _split(state: Any) -> tuple[Any, dict[str, Any]]:
    rest = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    params = rest.pop(PARAMS)
    if isinstance(params, Mapping) and VALUE in params:
        rest[_VALUE] = params[VALUE]
        params = {name: tree for name, tree in params.items() if name != VALUE}
    return params, rest


def named_leaves(state: Any) -> dict[str, Any]:
    """All leaves of a state by name, random keys as their key data."""
    params, rest = split_state(state)
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    named = {f"{PARAMS}.{jax.tree_util.keystr(path, simple=True, separator='.')}": x for path, x in leaves}
    return {**named, **rest}


def from_named_leaves(like: Any, leaves: Mapping[str, Any]) -> Any:
    """The inverse of `named_leaves`."""
    params, _ = split_state(like)
    paths, structure = jax.tree_util.tree_flatten_with_path(params)
    names = (f"{PARAMS}.{jax.tree_util.keystr(path, simple=True, separator='.')}" for path, _ in paths)
    return join_state(like, jax.tree_util.tree_unflatten(structure, [leaves[name] for name in names]), leaves)


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


def residual_parts(folder: Path) -> int:
    """The first dimension of a saved state's residual of gradients; 0 if it has none."""
    saved = tree_metadata(folder)
    return next((int(leaf.shape[0]) for name, leaf in saved.items() if name.startswith("residual.")), 0)


def check_tree(folder: Path, expected: Any, may_differ: Callable[[str], bool] = lambda _: False) -> set[str]:
    """Checks names, shapes and dtypes of a saved tree, since Orbax silently casts other dtypes.

    Args:
      folder: the directory of the tree.
      expected: its leaves, as `jax.ShapeDtypeStruct`.
      may_differ: whether a leaf of this name may be only in one of the two.

    Returns:
      The names of the expected leaves that the saved tree has not.

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
        if unknown := sorted(name for name in names if not may_differ(name)):
            problems.append(f"{owner} {format_list(unknown, 6)}")
    if problems:
        raise CheckpointError(
            f"{folder}: of another model or optimizer: {format_list(problems, 6)}; resume with the "
            "configuration that the run was started with, or choose another train.run_dir"
        )
    return set(ours) - set(saved)
