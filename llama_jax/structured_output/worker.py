"""Compiles regular expressions in a worker process (`sandbox`), which compiler.py kills after a timeout.

A short expression can have an automaton of any size (`(a|b)*a(a|b){30}` has 2^31 states), and the library
that builds it, outlines-core, has no limit: that takes a process that can be killed, with limited memory.

A request is an expression. The response has `error`; `too_many` states and their `limit`; or the number of
`states`, and bytes: int32 [states, 256], the state after each byte (-1: none), and uint8 [states], whether
the expression matches up to there. The start is state 0.
"""

from __future__ import annotations

import numpy as np
from outlines_core import Index, Vocabulary

MAX_MEMORY = 1 << 31  # bytes of address space
MAX_STATES = 1 << 16
_BYTES = 256
# outlines-core searches for the leftmost match, and drops longer alternatives after a shorter one: `a|ab`
# would never match `ab`. With this character after the expression, which then no text has, it goes on to its
# end.
_END = "\U0010ffff"
# The library also builds the automaton of a search that starts anywhere, which has exponential size where
# expressions count. The empty alternative after the first character here ends that search at once. A match
# would leave its mark on the next state, which is why two more characters follow, as one token.
_START = r"\x01(?:\x01\x01(?:", "|)"
_START_TOKEN = b"\x01\x01\x01"


def compile_regex(regex: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the transitions int32 [S, 256] and accepting states uint8 [S] of an expression.

    Raises:
      ValueError: outlines-core's, for an expression that it rejects or that matches nothing.
    """
    tokens = {bytes([byte]): [byte] for byte in range(_BYTES)} | {_START_TOKEN: [_BYTES + 1]}
    index = Index(f"{_START[0]}{regex}){_END}{_START[1]}", Vocabulary(_BYTES, tokens))
    transitions, final = index.get_transitions(), index.get_final_states()
    start = transitions[index.get_initial_state()][_BYTES + 1]
    ids = {state: i for i, state in enumerate(dict.fromkeys([start, *transitions]))}
    table = np.full((len(ids), _BYTES + 2), -1, np.int32)
    for state, row in transitions.items():
        table[ids[state], list(row)] = [ids[after] for after in row.values()]
    table = np.ascontiguousarray(table[:, :_BYTES])
    ends = np.zeros(len(ids) + 1, bool)  # the last entry is that of no state
    ends[[ids[state] for state in final if state in ids]] = True
    state = np.arange(len(ids))
    for byte in _END.encode():
        state = np.where(state < 0, -1, table[state, byte])
    return table, ends[state].astype(np.uint8)


def respond(regex: str) -> tuple[dict[str, int | str], bytes]:
    """The response to a request, and the data that follow it."""
    try:
        table, accepting = compile_regex(regex)
    except MemoryError:
        return {"error": "memory"}, b""
    except Exception as error:
        return {"error": str(error)[:2000]}, b""
    if len(table) > MAX_STATES:
        return {"too_many": len(table), "limit": MAX_STATES}, b""
    return {"states": len(table)}, table.tobytes() + accepting.tobytes()
