"""Regular expressions as text: their anchors, and those of a JSON schema inside a JSON string."""

from __future__ import annotations

import re
from collections.abc import Iterator

from llama_jax.errors import GrammarError

_START, _END = ("^", r"\A"), ("$", r"\z", r"\Z")
_TOKEN = re.compile(
    r"\\[pP]\{[^}]*\}|\\[xu]\{[0-9A-Fa-f]+\}|\\x[0-9A-Fa-f]{2}|\\u[0-9A-Fa-f]{4}|\\."  # an escape
    r"|\[\^?\]?(?:\[:\^?\w+:\]|\\.|[^\]\\])*\]"  # a class
    r"|\(\?(?:P?<\w+>|[a-zA-Z-]*:|<?[=!]|[a-zA-Z-]+(?=\)))|\(|\)|.",  # a group, or any other character
    re.DOTALL,
)
# In a JSON string: what stands for itself, and what is escaped.
_SAFE = r'[^"\\\x00-\x1f\x7f-\x9f]'
_ESCAPES = {name: rf"(?:\\{name})" for name in "ntrf"} | {name: rf"(?:\\\{name})" for name in '"\\'}
_SHORTHANDS = {"d": "[0-9]", "w": "[0-9A-Za-z_]", "s": " "}
_NEGATED = {"D": "[^0-9]", "W": "[^0-9A-Za-z_]", "S": r"[^\s]"}
# A character of a JSON string.
CHARACTER = rf'(?:{_SAFE}|\\["\\/bfnrt])'


def literal(text: str) -> str:
    """The expression that matches a text and nothing else."""
    return "".join(c if c.isascii() and c.isalnum() else rf"\x{{{ord(c):x}}}" for c in text)


def without_anchors(regex: str, name: str) -> str:
    """The expression without `^` at the start and `$` at the end of its alternatives: all of a text counts.

    Raises:
      GrammarError: for a parenthesis that closes nothing.
    """
    parts = []
    for tokens in _alternatives(regex, name):
        first = bool(tokens) and tokens[0] in _START
        last = len(tokens) > first and tokens[-1] in _END
        parts.append("".join(tokens[first : len(tokens) - last]))
    return "|".join(parts)


def in_json_string(pattern: str, name: str) -> str:
    r"""The JSON strings, without quotes, that hold what a schema's `pattern` searches for.

    Only characters that JSON need not escape, and quotes, backslashes and line ends where the pattern names
    them. `\d`, `\w` and `\s` are ASCII's, `\s` a space.

    Raises:
      GrammarError: for a pattern that cannot be written so.
    """
    parts = []
    for tokens in _alternatives(pattern, name):
        first = bool(tokens) and tokens[0] == "^"
        last = len(tokens) > first and tokens[-1] == "$"
        body = "".join(_json_token(token, name) for token in tokens[first : len(tokens) - last])
        parts.append(("" if first else f"{CHARACTER}*") + f"(?:{body})" + ("" if last else f"{CHARACTER}*"))
    return f"(?:{'|'.join(parts)})"


def _alternatives(regex: str, name: str) -> Iterator[list[str]]:
    """The alternatives of an expression outside all groups, as tokens."""
    depth, tokens = 0, list[str]()
    for match in _TOKEN.finditer(regex):
        token = match[0]
        depth += token.startswith("(") - (token == ")")
        if depth < 0:
            raise GrammarError(
                f"{name} is not a regular expression: unbalanced ) at position {match.start()}"
            )
        if token == "|" and not depth:
            yield tokens
            tokens = []
        else:
            tokens.append(token)
    yield tokens


def _json_token(token: str, name: str) -> str:
    if token == ".":
        return _SAFE
    if token == '"':
        return _ESCAPES[token]
    if token.startswith("(?") and token not in ("(?:",) and not re.match(r"\(\?P?<\w+>", token):
        raise GrammarError(f"{name} has {token!r}, which is not supported in a schema; leave it out")
    if token.startswith("[") and len(token) > 1:
        return f"[{_json_class(token)}&&{_SAFE}]"
    if not token.startswith("\\"):
        return token
    kind = token[1:]
    if kind in _SHORTHANDS:
        return _SHORTHANDS[kind]
    if kind in _NEGATED:
        return f"[{_NEGATED[kind]}&&{_SAFE}]"
    if kind in _ESCAPES:
        return _ESCAPES[kind]
    if kind == "/":
        return "/"
    if len(kind) > 1:  # a code point or a property
        escape = rf"\x{{{kind[1:]}}}" if kind[0] == "u" and kind[1] != "{" else token
        return f"[{escape}&&{_SAFE}]"
    return token


def _json_class(token: str) -> str:
    """A class of ECMAScript in the syntax of Rust's regex crate, where `[`, `&&` and others nest."""
    negated = token.startswith("[^")
    inner = token[2:-1] if negated else token[1:-1]
    out = []
    for match in re.finditer(r"\\u[0-9A-Fa-f]{4}|\\.|.", inner, re.DOTALL):
        part = match[0]
        if part.startswith("\\u") and len(part) == 6:
            part = rf"\x{{{part[2:]}}}"
        elif part in (r"\d", r"\w", r"\s"):
            part = {"d": "0-9", "w": "0-9A-Za-z_", "s": " "}[part[1]]
        elif part == r"\/":
            part = "/"
        elif part in ("[", "&", "~"):
            part = "\\" + part
        out.append(part)
    return f"[{'^' if negated else ''}{''.join(out)}]"
