"""A training state as Orbax stores it: the parameters, and all other leaves by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.errors import CheckpointError
from llama_jax.weights.orbax import describe_tree
from llama_jax.weights.runs import PARAMS
from llama_jax.weights.source import brief


def split_state(state: Any) -> tuple[Any, dict[str, Any]]:
    """Takes a state apart into its parameters and the other leaves by name, keys as their words.

    By name, since a tree of named tuples would come back from Orbax as one of dicts.
    """
    rest = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    params = rest.pop(PARAMS)
    found, _ = jax.tree_util.tree_flatten_with_path(rest)
    return params, {
        jax.tree_util.keystr(path, simple=True, separator="."): _words(leaf) for path, leaf in found
    }


def join_state(like: Any, params: Any, leaves: Mapping[str, Any]) -> Any:
    """Undoes `split_state`, with the structure and the keys' kinds of `like`."""
    rest = {field.name: getattr(like, field.name) for field in dataclasses.fields(like)}
    del rest[PARAMS]
    found, structure = jax.tree_util.tree_flatten_with_path(rest)
    values = [leaves[jax.tree_util.keystr(path, simple=True, separator=".")] for path, _ in found]
    values = [
        jax.random.wrap_key_data(value, impl=_key_kind(leaf)) if _is_key(leaf) else value
        for value, (_, leaf) in zip(values, found, strict=True)
    ]
    return dataclasses.replace(like, params=params, **jax.tree_util.tree_unflatten(structure, values))


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_kind(leaf: Any) -> Any:
    kinds: list[Any] = []
    jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), leaf)
    return kinds[0]


def _words(leaf: Any) -> Any:
    """Returns a random key's words in its place, since Orbax stores numbers alone."""
    if not _is_key(leaf):
        return leaf
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.random.key_data(leaf)
    words = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=leaf.sharding)


def compare_tree(folder: Path, wanted: Any) -> None:
    """Compares names, shapes and dtypes, since Orbax casts what differs without a word.

    Raises:
      CheckpointError: naming each tensor that differs, and how.
    """
    found, _ = jax.tree_util.tree_flatten_with_path(wanted)
    asked = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in found}
    saved = describe_tree(folder)

    def show(leaf: Any) -> str:
        return f"{leaf.dtype.name} {list(leaf.shape)}"

    problems = [
        f"{name} is {show(saved[name])} in the checkpoint and {show(leaf)} in this run"
        for name, leaf in asked.items()
        if name in saved and show(saved[name]) != show(leaf)
    ]
    for what, names in (
        ("this run alone has", set(asked) - set(saved)),
        ("the checkpoint alone has", set(saved) - set(asked)),
    ):
        if names:
            problems.append(f"{what} {brief(sorted(names), 6)}")
    if problems:
        raise CheckpointError(
            f"{folder}: of another model or optimizer: {brief(problems, 6)}; resume with the configuration "
            "that the run began with, or choose another train.run_dir"
        )
