"""Stop strings for streamed text."""

from __future__ import annotations

from collections.abc import Sequence

from llama_jax.errors import InputError
from llama_jax.tokenizer import Tokenizer


class StopStrings:
    """Truncates a streamed text before its first stop string, independently of the chunk boundaries.

    The first match is the one that is completed first; of two completed at the same character, the longer
    one. Text that may be the start of a stop string is buffered until that is decided. Matching uses the
    Knuth-Morris-Pratt automaton, so the cost is linear in the text.

    Args:
      stops: one stop string, or several; with none the text is never truncated.

    Raises:
      InputError: for an empty stop string, or one that is not a string.
    """

    def __init__(self, stops: str | Sequence[str] = ()):
        if not isinstance(stops, str | list | tuple):
            raise InputError(f"stop_strings is {str(stops)[:40]!r}; it must be a string, or a list of them")
        self._stops = [stops] if isinstance(stops, str) else list(stops)
        for i, stop in enumerate(self._stops):
            if not isinstance(stop, str):
                raise InputError(f"stop_strings[{i}] is {str(stop)[:40]}; it must be a string")
            if not stop:
                raise InputError(f"stop_strings[{i}] is empty and would match everywhere; leave it out")
        self._prefix_tables = [_prefix_table(stop) for stop in self._stops]
        self._reset()

    @property
    def strings(self) -> list[str]:
        """The stop strings."""
        return list(self._stops)

    @property
    def any(self) -> bool:
        """Whether there is any stop string."""
        return bool(self._stops)

    def _reset(self) -> None:
        self._buffer = ""  # the longest suffix of the text that is a prefix of a stop string
        self._matched = [0] * len(self._stops)  # the length of that suffix for each stop string
        self.stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Appends a chunk of text.

        Returns:
          The text, from the buffer and this chunk, that is now known to precede any stop string, and whether
          a stop string has been found. After that the text is always empty.
        """
        if self.stopped:
            return "", True
        pending = self._buffer + text
        for end, character in enumerate(text, len(self._buffer) + 1):
            completed = 0
            for i, stop in enumerate(self._stops):
                matched = self._matched[i]
                while matched and stop[matched] != character:
                    matched = self._prefix_tables[i][matched]
                matched += stop[matched] == character
                self._matched[i] = matched
                if matched == len(stop):
                    completed = max(completed, matched)
            if completed:
                self.stopped, self._buffer = True, ""
                return pending[: end - completed], True
        safe = len(pending) - max(self._matched, default=0)
        self._buffer = pending[safe:]
        return pending[:safe], False

    def flush(self) -> str:
        """Ends the text: returns the buffered text and resets for the next text."""
        buffered = self._buffer
        self._reset()
        return buffered


def split_stop_strings(
    tokenizer: Tokenizer, stop_strings: str | Sequence[str]
) -> tuple[tuple[int, ...], list[str]]:
    """Returns the tokens that end a text, and the stop strings that are no control tokens.

    Control tokens are not part of a text, so one that is a stop string ends it as EOS does.

    Raises:
      InputError: for a stop string that is a control token and more.
    """
    stops, special = StopStrings(stop_strings).strings, tokenizer.special_tokens
    strings = [stop for stop in stops if stop not in special]
    for stop in strings:
        if name := next((name for name in special if name and name in stop), None):
            raise InputError(
                f"stop string {stop!r} holds the control token {name!r}, which is not part of a text; "
                f"give {name!r} alone"
            )
    ids = [special[stop] for stop in stops if stop in special]
    return tuple(dict.fromkeys([*tokenizer.eos_ids, *ids])), strings


def _prefix_table(stop: str) -> list[int]:
    """For each n, the length of the longest proper prefix of `stop[:n]` that is also its suffix."""
    table = [0, 0]
    for character in stop[1:]:
        length = table[-1]
        while length and stop[length] != character:
            length = table[length]
        table.append(length + (stop[length] == character))
    return table
