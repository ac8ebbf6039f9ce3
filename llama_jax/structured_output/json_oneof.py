"""Whether two schemas of a `oneOf` exclude each other: where both may be valid, neither is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any


def disjoint(first: Any, second: Any, resolve: Callable[[Any], Any]) -> bool:
    """Whether no value is valid for both, as far as types, constants and required properties tell.

    Args:
      first: a schema that is no reference.
      second: another.
      resolve: follows references.
    """
    if first is False or second is False:
        return True
    if not isinstance(first, Mapping) or not isinstance(second, Mapping):
        return False
    values = _values(first), _values(second)
    if values[0] is not None and values[1] is not None:
        return not values[0] & values[1]
    kinds = _kinds(first), _kinds(second)
    if kinds[0] is not None and kinds[1] is not None and not kinds[0] & kinds[1]:
        return True
    if not {"object"} == kinds[0] == kinds[1]:
        return False
    names = set(first.get("required", ())) & set(second.get("required", ()))
    properties = first.get("properties", {}), second.get("properties", {})
    return any(
        name in properties[0]
        and name in properties[1]
        and disjoint(resolve(properties[0][name]), resolve(properties[1][name]), resolve)
        for name in names
    )


def _values(schema: Mapping[str, Any]) -> set[str] | None:
    """The constants that a schema allows."""
    if "const" in schema:
        return {_key(schema["const"])}
    return set(map(_key, schema["enum"])) if isinstance(schema.get("enum"), list) else None


def _key(value: Any) -> str:
    whole = isinstance(value, float) and value == int(value)  # 1.0 is 1
    return json.dumps(int(value) if whole else value, sort_keys=True)


def _kinds(schema: Mapping[str, Any]) -> set[str] | None:
    """The types that a schema allows, "number" for "integer"; None for any."""
    values = _values(schema)
    if values is not None:
        found = {type(json.loads(value)).__name__ for value in values}
        names = {"str": "string", "int": "number", "float": "number", "bool": "boolean"}
        names |= {"NoneType": "null", "list": "array", "dict": "object"}
        return {names[name] for name in found}
    kinds = schema.get("type")
    if kinds is None:
        return None
    kinds = {kinds} if isinstance(kinds, str) else set(kinds)
    return {"number" if kind == "integer" else kind for kind in kinds}
