"""JSON schemas to regular expressions of the JSON that they describe.

The expression describes a part of what a schema allows, and nothing else: every text that it matches is
valid. Properties come in the schema's order, and only those that it lists; a space may follow a comma or
colon, and nowhere else. What a regular expression cannot say is refused, by its name and path.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from llama_jax.errors import GrammarError
from llama_jax.structured_output import json_numbers
from llama_jax.structured_output.compiler import MAX_CHARACTERS
from llama_jax.structured_output.json_formats import FORMATS
from llama_jax.structured_output.json_oneof import disjoint
from llama_jax.structured_output.patterns import CHARACTER, in_json_string, literal

Schema = Mapping[str, Any] | bool

MAX_RECURSION = 3  # how often a definition may occur inside itself
_MAX_NODES = 20_000
_SPACE = " ?"
_ANY_STRING = f'"{CHARACTER}*"'
# The keywords of each type, and those that are refused.
_KEYWORDS = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "integer": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "object": ("properties", "required", "additionalProperties", "minProperties", "maxProperties"),
    "boolean": (),
    "null": (),
}
_REFUSED = {
    "integer": ("multipleOf",),
    "number": ("multipleOf",),
    "array": ("contains", "minContains", "maxContains", "uniqueItems", "additionalItems", "unevaluatedItems"),
    "object": (
        *("patternProperties", "propertyNames", "dependencies", "dependentRequired", "dependentSchemas"),
        "unevaluatedProperties",
    ),
}
_REFUSED_ANYWHERE = ("not", "if", "then", "else", "$dynamicRef", "$recursiveRef", "$anchor")
_COMBINING = ("$ref", "anyOf", "oneOf", "allOf", "enum", "const")
_TYPED = {word for words in (*_KEYWORDS.values(), *_REFUSED.values()) for word in words}
_ASSERTIONS = {"type", *_COMBINING, *_REFUSED_ANYWHERE, *_TYPED}


def regex_of(schema: Schema) -> str:
    """The regular expression of a JSON schema.

    Args:
      schema: of any draft from 4 to 2020-12, within what is supported (docs/structured-output.md).

    Raises:
      GrammarError: naming what is not supported or malformed, and where; or if no value is valid.
    """
    try:
        regex = _Translation(schema).value(schema, "#")
    except RecursionError:
        raise GrammarError("json_schema is nested too deeply; make it simpler") from None
    if regex is None:
        raise GrammarError("json_schema accepts no value: nothing satisfies all of it")
    return regex


def parse(text: str | bytes, name: str) -> Any:
    """The JSON of a schema.

    Raises:
      GrammarError: if it is not JSON; NaN and infinity are not.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"{name} is not JSON: {error}") from None


class _Translation:
    """Of one schema. Methods return an expression, or None where no value is valid."""

    def __init__(self, root: Schema):
        self._root = root
        self._open: list[str] = []  # the references being followed
        self._nodes = 0

    def value(self, schema: Any, path: str) -> str | None:
        """A value of a (sub)schema."""
        self._nodes += 1
        if self._nodes > _MAX_NODES:
            raise GrammarError(f"json_schema is too large: over {_MAX_NODES} parts, with what it refers to")
        if schema is False:
            return None
        if schema is not True and not isinstance(schema, Mapping):
            raise _error(path, f"is {str(schema)[:40]}; a schema is an object or a boolean")
        if schema is True or not _ASSERTIONS & schema.keys():
            return self._anything()
        for word in _REFUSED_ANYWHERE:
            if word in schema:
                raise _unsupported(path, word)
        combining = [word for word in _COMBINING if word in schema]
        if combining:
            regex = self._combined(schema, combining, path)
        else:
            regex = _any_of([self._typed(schema, kind, path) for kind in _types(schema, path)])
        if regex is not None and len(regex) > MAX_CHARACTERS:
            raise GrammarError(
                f"json_schema is too large: up to {path} its regular expression has over {MAX_CHARACTERS} "
                "characters; make it simpler"
            )
        return regex

    def _combined(self, schema: Mapping[str, Any], words: list[str], path: str) -> str | None:
        word = words[0]
        besides = [other for other in schema if other in _TYPED or other in words[1:]]
        typed = "type" in schema and word not in ("enum", "const")
        if besides or (typed and word in ("$ref", "allOf")):
            raise _error(path, f"has {word} beside {(besides or ['type'])[0]}, which is not supported")
        content, at = schema[word], f"{path}/{word}"
        if word == "$ref":
            return self._reference(content, path)
        if word == "const":
            content = [content]
        if not isinstance(content, list) or not content:
            raise _error(at, "must be a list that is not empty")
        if word in ("enum", "const"):
            kinds = _types(schema, path) if "type" in schema else None
            values = [value for value in content if kinds is None or _is_a(value, kinds)]
            return _any_of([_constant(value) for value in values])
        if word == "allOf" and len(content) > 1:
            raise _error(at, "has several schemas; only one is supported: write them as one")
        if word == "oneOf":
            self._check_one_of(content, at)
        branches = [_with_type(branch, schema["type"], path) for branch in content] if typed else content
        return _any_of([self.value(branch, f"{at}/{i}") for i, branch in enumerate(branches)])

    def _check_one_of(self, branches: Sequence[Any], path: str) -> None:
        resolved = [self._resolved(branch, path) for branch in branches]
        for i, first in enumerate(resolved):
            for j, second in enumerate(resolved[:i]):
                if not disjoint(second, first, lambda schema: self._resolved(schema, path)):
                    raise _error(
                        path,
                        f"has branches {j} and {i} that may both be valid: use anyOf, or give them a "
                        "required property with different const values",
                    )

    def _resolved(self, schema: Any, path: str) -> Any:
        """The schema that a chain of references leads to."""
        seen = []
        while isinstance(schema, Mapping) and "$ref" in schema and schema["$ref"] not in seen:
            seen.append(schema["$ref"])
            schema = self._target(schema["$ref"], path)
        return schema

    def _reference(self, pointer: Any, path: str) -> str | None:
        target = self._target(pointer, path)
        if self._open.count(pointer) > MAX_RECURSION:
            return None
        self._open.append(pointer)
        try:
            return self.value(target, pointer)
        finally:
            self._open.pop()

    def _target(self, pointer: Any, path: str) -> Any:
        if not isinstance(pointer, str) or not pointer.startswith("#"):
            raise _error(
                path,
                f"has $ref {str(pointer)[:60]!r}; only references within the schema, #/..., are supported",
            )
        target: Any = self._root
        for step in filter(None, pointer[1:].split("/")):
            key = step.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and key.isdigit() and int(key) < len(target):
                target = target[int(key)]
            elif isinstance(target, Mapping) and key in target:
                target = target[key]
            else:
                raise _error(path, f"has $ref {pointer!r}, which does not exist")
        return target

    def _anything(self) -> str:
        """Any scalar, or an array or object of scalars."""
        scalar = f"(?:{_ANY_STRING}|{json_numbers.NUMBER}|true|false|null)"
        pair = f"{_ANY_STRING}:{_SPACE}{scalar}"
        return f"(?:{scalar}|{_repeat(scalar, 0, None, '[]')}|{_repeat(pair, 0, None, '{}')})"

    def _typed(self, schema: Mapping[str, Any], kind: str, path: str) -> str | None:
        for word in _REFUSED.get(kind, ()):
            harmless = word in ("uniqueItems",) and (
                schema.get(word) is False or schema.get("maxItems", 2) in (0, 1)
            )
            harmless |= word == "multipleOf" and kind == "integer" and schema.get(word) == 1
            if word in schema and not harmless:
                raise _unsupported(path, word)
        if kind in ("boolean", "null"):
            return "(?:true|false)" if kind == "boolean" else "null"
        if kind in ("integer", "number"):
            return _number(schema, kind, path)
        if kind == "string":
            return _string(schema, path)
        return self._array(schema, path) if kind == "array" else self._object(schema, path)

    def _array(self, schema: Mapping[str, Any], path: str) -> str | None:
        low, high = _count(schema, "minItems", path) or 0, _count(schema, "maxItems", path)
        first, rest = schema.get("prefixItems", []), schema.get("items", True)
        if isinstance(rest, list) or not isinstance(first, list):
            raise _error(
                path,
                "has a list of items; write it as prefixItems"
                if isinstance(rest, list)
                else "has prefixItems that is not a list",
            )
        if high is not None and low > high:
            return None
        regex = self._tail(rest, f"{path}/items", max(low - len(first), 0), high, len(first))
        if len(first) < low and regex is None:
            return None
        for i in reversed(range(len(first) if high is None else min(high, len(first)))):
            item = self.value(first[i], f"{path}/prefixItems/{i}")
            whole = None if item is None or regex is None else (f",{_SPACE}" if i else "") + item + regex
            regex = whole if i < low else "" if whole is None else f"(?:{whole})?"
        return None if regex is None else rf"\[{regex}\]"

    def _tail(self, schema: Any, path: str, low: int, high: int | None, before: int) -> str | None:
        """The items after `before` others."""
        high = None if high is None else high - before
        item = None if high is not None and high <= 0 else self.value(schema, path)
        if item is None:
            return None if low else ""
        if before:
            return f"(?:,{_SPACE}{item}){_times(low, high)}"
        return _repeat(item, low, high)

    def _object(self, schema: Mapping[str, Any], path: str) -> str | None:
        low, high = _count(schema, "minProperties", path) or 0, _count(schema, "maxProperties", path)
        listed, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(listed, Mapping) or not isinstance(required, list):
            raise _error(path, "has properties that is no object, or required that is no list")
        others = schema.get("additionalProperties", True)
        if not listed and not required:
            if low > 1:  # a name may come twice
                raise _unsupported(path, "minProperties")
            value = (
                None if others is False or high == 0 else self.value(others, f"{path}/additionalProperties")
            )
            if value is None:
                return None if low else r"\{\}"
            return _repeat(f"{_ANY_STRING}:{_SPACE}{value}", low, high, "{}")
        schemas = {**listed, **{name: others for name in required if name not in listed}}
        if low > len(required):
            raise _unsupported(path, "minProperties")
        if high is not None and high < len(schemas):
            if high < len(set(required)):
                return None
            schemas = {name: schemas[name] for name in schemas if name in required}
        pairs: list[tuple[str, bool]] = []
        for name, content in schemas.items():
            value = self.value(content, f"{path}/properties/{name}")
            if value is None and name in required:
                return None
            if value is not None:
                pairs.append((f"{_constant(name)}:{_SPACE}{value}", name in required))
        return rf"\{{{_pairs(pairs)}\}}"


def _pairs(pairs: list[tuple[str, bool]]) -> str:
    """Pairs (expression, whether it must be there) in their order, with commas between those that are."""
    comma = f",{_SPACE}"
    first = next((i for i, (_, needed) in enumerate(pairs) if needed), None)
    if first is not None:
        before = "".join(f"(?:{pair}{comma})?" for pair, _ in pairs[:first])
        after = "".join(f"(?:{comma}{pair}){'' if needed else '?'}" for pair, needed in pairs[first + 1 :])
        return before + pairs[first][0] + after
    starts = [
        pair + "".join(f"(?:{comma}{other})?" for other, _ in pairs[i + 1 :])
        for i, (pair, _) in enumerate(pairs)
    ]
    return f"(?:{'|'.join(starts)})?" if starts else ""


def _with_type(branch: Any, kind: Any, path: str) -> Any:
    """A branch of a schema that has a type itself."""
    if isinstance(branch, bool):
        return branch and {"type": kind}
    if not isinstance(branch, Mapping) or branch.get("type", kind) != kind or {*_COMBINING} & branch.keys():
        raise _error(path, "has a type beside branches with another, or with references: move it into each")
    return {**branch, "type": kind}


def _number(schema: Mapping[str, Any], kind: str, path: str) -> str | None:
    bounds: dict[str, Decimal] = {}
    for word in _KEYWORDS["number"]:
        if word in schema:
            value = schema[word]
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise _error(path, f"has {word} {str(value)[:40]}; it must be a number")
            bounds[word] = Decimal(str(value))
    low, high = bounds.get("minimum"), bounds.get("maximum")
    more, less = bounds.get("exclusiveMinimum"), bounds.get("exclusiveMaximum")
    above = more is not None and (low is None or more >= low)
    below = less is not None and (high is None or less <= high)
    low, high = more if above else low, less if below else high
    if kind == "number":
        return json_numbers.number(low, high, above=above, below=below)
    low = low + 1 if above and low is not None and low == low.to_integral_value() else low
    high = high - 1 if below and high is not None and high == high.to_integral_value() else high
    return json_numbers.integer(low, high)


def _string(schema: Mapping[str, Any], path: str) -> str | None:
    low, high = _count(schema, "minLength", path) or 0, _count(schema, "maxLength", path)
    pattern, name = schema.get("pattern"), schema.get("format")
    if (pattern is not None) + (name is not None) + bool(low or high is not None) > 1:
        raise _error(path, "has several of pattern, format and a length; only one is supported")
    if pattern is not None:
        if not isinstance(pattern, str):
            raise _error(path, f"has pattern {str(pattern)[:40]}; it must be a string")
        return f'"{in_json_string(pattern, f"the pattern of json_schema at {path}")}"'
    if name is not None:
        if name not in FORMATS:
            raise _error(path, f"has format {str(name)[:40]!r}; supported are {', '.join(sorted(FORMATS))}")
        return f'"{FORMATS[name]}"'
    if high is not None and low > high:
        return None
    return f'"{CHARACTER}{_times(low, high)}"'


def _types(schema: Mapping[str, Any], path: str) -> list[str]:
    """The types that a schema names, or that its keywords belong to."""
    kinds = schema.get("type")
    if kinds is None:
        found = [kind for kind, words in _KEYWORDS.items() if any(word in schema for word in words)]
        found = [kind for kind in found if kind != "integer"]
        refused = [kind for kind, words in _REFUSED.items() if any(word in schema for word in words)]
        return found or [kind for kind in refused if kind != "integer"] or list(_KEYWORDS)
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not isinstance(kinds, list) or not kinds or any(kind not in _KEYWORDS for kind in kinds):
        raise _error(path, f"has type {str(schema['type'])[:40]!r}; the types are {', '.join(_KEYWORDS)}")
    return kinds


def _count(schema: Mapping[str, Any], word: str, path: str) -> int | None:
    value = schema.get(word)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise _error(path, f"has {word} {str(value)[:40]}; it must be a whole number, at least 0")
    return value


def _is_a(value: Any, kinds: Sequence[str]) -> bool:
    if isinstance(value, bool):
        return "boolean" in kinds
    if isinstance(value, int | float):
        return "number" in kinds or ("integer" in kinds and value == int(value))
    types = {str: "string", type(None): "null", list: "array", dict: "object"}
    return types.get(type(value)) in kinds


def _constant(value: Any) -> str:
    """A value as `json.dumps` writes it."""
    try:
        return literal(json.dumps(value, ensure_ascii=False, allow_nan=False))
    except (TypeError, ValueError):
        raise GrammarError(f"json_schema holds {str(value)[:40]}, which is not JSON") from None


def _repeat(item: str, low: int, high: int | None, brackets: str = "") -> str:
    """From low to high items with commas, in brackets."""
    opening, closing = (f"\\{bracket}" for bracket in brackets) if brackets else ("", "")
    more = f"(?:,{_SPACE}{item}){_times(max(low - 1, 0), None if high is None else high - 1)}"
    return f"{opening}(?:{item}{more}){'' if low else '?'}{closing}"


def _times(low: int, high: int | None) -> str:
    return f"{{{low},{'' if high is None else high}}}" if (low, high) != (0, None) else "*"


def _any_of(branches: Sequence[str | None]) -> str | None:
    possible = list(dict.fromkeys(branch for branch in branches if branch is not None))
    return f"(?:{'|'.join(possible)})" if possible else None


def _error(path: str, problem: str) -> GrammarError:
    return GrammarError(f"json_schema at {path} {problem}")


def _unsupported(path: str, word: str) -> GrammarError:
    return _error(path, f"has {word}, which is not supported; leave it out, and check the result for it")
