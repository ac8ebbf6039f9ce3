"""Regular expressions to automata over bytes, by outlines-core in a process of its own (worker.py)."""

from __future__ import annotations

import atexit
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llama_jax.errors import GrammarError
from llama_jax.sandbox.process import Worker

TIMEOUT = 10.0  # seconds; an ordinary expression takes milliseconds
MAX_CHARACTERS = 1 << 20  # of an expression


class ByteAutomaton(NamedTuple):
    """A deterministic automaton over bytes; it starts in state 0.

    Attributes:
      transitions: int32 [S, 256], the state after each byte; -1 for none.
      accepting: bool [S].
    """

    transitions: np.ndarray
    accepting: np.ndarray


class Compiler:
    """Compiles expressions in a worker process, one per client process.

    The worker starts at the first request. Thread-safe: requests are serialized.
    """

    def __init__(self) -> None:
        file = Path(__file__).with_name("worker.py")
        self._worker = Worker(file, "grammars are compiled", "outlines_core", GrammarError)

    def compile(self, regex: str, name: str) -> ByteAutomaton:
        """Compiles an expression that must match a whole text.

        Args:
          regex: in the syntax of Rust's regex crate.
          name: what it is, for messages.

        Raises:
          GrammarError: if it is rejected, matches nothing, or exceeds the limits on size, time or memory.
        """
        if len(regex) > MAX_CHARACTERS:
            raise GrammarError(
                f"{name} is too large: as a regular expression it has {len(regex)} characters, and the limit "
                f"is {MAX_CHARACTERS}; make it simpler"
            )
        response, data, _ = self._worker.request(regex, TIMEOUT)
        if response is None or response.get("error") == "memory":
            raise GrammarError(
                f"{name} is too large: its automaton takes more than {TIMEOUT:.0f} s or 2 GB to build; make "
                "repetitions such as {30} shorter, or remove nested ones"
            )
        if "too_many" in response:
            raise GrammarError(
                f"{name} is too large: its automaton over bytes has {response['too_many']} states, and the "
                f"limit is {response['limit']}; make repetitions such as {{30}} shorter"
            )
        if "error" in response:
            raise GrammarError(f"{name} {_reason(regex, response['error'])}")
        states = response["states"]
        table = np.frombuffer(data, np.int32, states * 256).reshape(states, 256)
        return ByteAutomaton(table, np.frombuffer(data, np.uint8, states, offset=table.nbytes) > 0)

    def close(self) -> None:
        """Kills the worker, if it runs; the next request starts another."""
        self._worker.close()


# What a deterministic automaton cannot have, or the library does not; the first that is found is named.
_UNSUPPORTED = (
    (r"\(\?<?[=!]", "look-around"),
    (r"\\[1-9]|\(\?P=|\\k<", "a backreference"),
    (r"\\[bB]", "a word boundary"),
    (r"\(\?\(", "a conditional group"),
    (r"\(\?>|[*+?}]\+", "an atomic group or possessive repetition"),
    (r"\\[AzZG]|[\^$]", "an anchor that is neither at its start nor at its end"),
)


def _reason(regex: str, error: str) -> str:
    """What is wrong with an expression that the library rejects, as the end of a sentence."""
    outside = re.sub(r"\[\^?\]?(?:\\.|[^\]\\])*\]", "", regex)  # without classes
    found = next(
        (what for pattern, what in _UNSUPPORTED if re.search(r"(?<!\\)(?:\\\\)*" + pattern, outside)), None
    )
    if found:
        return f"has {found}, which grammars do not support: a finite automaton cannot, or does not need to"
    if "incompatible" in error:
        return "accepts no text, or has a part that can match nothing"
    try:
        re.compile(regex)
    except re.error as reason:
        if not reason.msg.startswith("bad escape"):  # Rust has others
            return f"is not a regular expression: {reason}"
    except (RecursionError, OverflowError):
        pass
    return "is not a regular expression of Rust's regex crate, whose syntax this is, or is nested too deeply"


COMPILER = Compiler()
atexit.register(COMPILER.close)
if hasattr(os, "register_at_fork"):  # a forked child must not share the parent's worker
    os.register_at_fork(after_in_child=COMPILER.__init__)  # type: ignore[misc]
