r"""Matches module names against the regular expressions of an adapter_config.json, in bounded time.

Python's `re` takes exponential time for some expressions, and these come from files. This matcher follows
all paths at once (Thompson, "Regular expression search algorithm", 1968): its time is at most the length of
the expression times the square of the name's, whatever the expression. It knows what module names need:
literals, `.`, `\d`, `\w`, classes, groups, alternatives, quantifiers and anchors.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable

Positions = frozenset[int]
Matcher = Callable[[str, Positions], Positions]  # the ends of all matches that begin at these positions

MAX_LENGTH = 2000
_MAX_DEPTH = 20
_MAX_REPEATS = 200  # no module name is longer
_MAX_STEPS = 20_000  # repetitions tried for one name
_QUANTIFIER = re.compile(r"[*+?]|\{(\d{1,4})(,?)(\d{0,4})\}")
_WORD = frozenset(string.ascii_letters + string.digits + "_")
_SETS = {"d": frozenset(string.digits), "w": _WORD}


class UnsupportedExpression(ValueError):
    """The expression is malformed, or has a construct that this matcher does not know."""


def compile_expression(expression: str) -> Callable[[str], bool]:
    """Returns whether `re.fullmatch(expression, name)` matches, as a function of the name.

    Raises:
      UnsupportedExpression: as it says; the function too, for an expression that takes too long.
    """
    if len(expression) > MAX_LENGTH:
        raise UnsupportedExpression(f"it has {len(expression)} characters; at most {MAX_LENGTH} are read")
    parser = _Parser(expression)
    matcher = parser.alternatives()
    if parser.at < len(expression):
        raise UnsupportedExpression(f"unbalanced {expression[parser.at]!r}")

    def matches(name: str) -> bool:
        parser.steps = 0
        return len(name) in matcher(name, frozenset((0,)))

    return matches


class _Parser:
    """A recursive-descent parser that builds one matcher for each construct."""

    def __init__(self, expression: str) -> None:
        self.expression = expression
        self.at = 0
        self.depth = 0
        self.steps = 0

    def peek(self) -> str:
        return self.expression[self.at : self.at + 1]

    def take(self) -> str:
        character = self.peek()
        if not character:
            raise UnsupportedExpression("it ends too early")
        self.at += 1
        return character

    def alternatives(self) -> Matcher:
        options = [self.sequence()]
        while self.peek() == "|":
            self.at += 1
            options.append(self.sequence())
        if len(options) == 1:
            return options[0]
        return lambda name, starts: frozenset[int]().union(*(option(name, starts) for option in options))

    def sequence(self) -> Matcher:
        parts: list[Matcher] = []
        while self.peek() not in ("", "|", ")"):
            parts.append(self.quantified(self.atom()))

        def match(name: str, starts: Positions) -> Positions:
            for part in parts:
                if not starts:
                    break
                starts = part(name, starts)
            return starts

        return match

    def quantified(self, matcher: Matcher) -> Matcher:
        found = _QUANTIFIER.match(self.expression, self.at)
        if found is None:
            return matcher
        self.at = found.end()
        if self.peek() == "+":
            raise UnsupportedExpression("it has a possessive quantifier")
        self.at += self.peek() == "?"  # a lazy quantifier matches the same names
        low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(found[0], (0, None))
        if found[1] is not None:
            low = int(found[1])
            high = int(found[3]) if found[3] else None if found[2] else low
        if max(low, high or 0) > _MAX_REPEATS or (high is not None and high < low):
            raise UnsupportedExpression(f"it repeats {found[0]}; at most {_MAX_REPEATS} times are supported")

        def match(name: str, starts: Positions) -> Positions:
            for _ in range(low):
                before, starts = starts, self.step(matcher, name, starts)
                if starts == before:
                    break
            ends, count = starts, low
            while starts and (high is None or count < high):
                starts = self.step(matcher, name, starts) - ends
                ends, count = ends | starts, count + 1
            return ends

        return match

    def step(self, matcher: Matcher, name: str, starts: Positions) -> Positions:
        self.steps += 1
        if self.steps > _MAX_STEPS:
            raise UnsupportedExpression("it takes too long to match")
        return matcher(name, starts)

    def atom(self) -> Matcher:
        character = self.take()
        match character:
            case "(":
                return self.group()
            case "[":
                return self.character_class()
            case "^":
                return lambda name, starts: starts & {0}
            case "$":
                return lambda name, starts: starts & {len(name)}
            case ".":
                return _one_of(frozenset("\n"), inverted=True)
            case "\\":
                return _one_of(self.escape())
            case "*" | "+" | "?" | "{" | "}" | "]":
                raise UnsupportedExpression(f"a {character!r} that repeats or closes nothing")
        return _one_of(frozenset(character))

    def group(self) -> Matcher:
        if self.peek() == "?":
            if self.expression[self.at : self.at + 2] != "?:":
                raise UnsupportedExpression("it has a group that begins with (?")
            self.at += 2
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise UnsupportedExpression(f"its groups are nested more than {_MAX_DEPTH} deep")
        inner = self.alternatives()
        self.depth -= 1
        if self.peek() != ")":
            raise UnsupportedExpression("unbalanced '('")
        self.at += 1
        return inner

    def escape(self) -> frozenset[str]:
        character = self.take()
        if character in _SETS:
            return _SETS[character]
        if character.isalnum():
            raise UnsupportedExpression(f"it has the escape \\{character}")
        return frozenset(character)

    def character_class(self) -> Matcher:
        inverted = self.peek() == "^"
        self.at += inverted
        members: set[str] = set()
        while (character := self.take()) != "]" or not members:
            if character == "\\":
                members |= self.escape()
                continue
            if self.peek() == "-" and self.expression[self.at + 1 : self.at + 2] not in ("", "]"):
                self.at += 1
                end = self.take()
                if end == "\\" or not character <= end or ord(end) > 0x7F:
                    raise UnsupportedExpression(f"it has the range {character}-{end}")
                members.update(map(chr, range(ord(character), ord(end) + 1)))
                continue
            members.add(character)
        return _one_of(frozenset(members), inverted=inverted)


def _one_of(characters: frozenset[str], *, inverted: bool = False) -> Matcher:
    return lambda name, starts: frozenset(
        start + 1 for start in starts if start < len(name) and (name[start] in characters) != inverted
    )
