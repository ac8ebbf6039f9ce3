"""Stop strings: where a text that comes in parts has to end."""

from __future__ import annotations

from collections.abc import Sequence

from llama_jax.errors import InputError


class StopStrings:
    """Ends a text before the first of some strings, however the text is cut into parts.

    The first is the one that is complete soonest as the text grows; of two complete at the same character,
    the one that began first. What may yet turn out to be the beginning of one is held back until it is
    known. Each string is matched by Knuth, Morris and Pratt's automaton, so the work is proportional to the
    text, whatever the strings.

    Args:
      stops: one string, or several; none at all never stops.

    Raises:
      InputError: for an empty string, or what is none.
    """

    def __init__(self, stops: str | Sequence[str] = ()):
        if not isinstance(stops, str | list | tuple):
            raise InputError(f"stop_strings is {str(stops)[:40]!r}; it must be a string, or a list of them")
        self._stops = [stops] if isinstance(stops, str) else list(stops)
        for i, stop in enumerate(self._stops):
            if not isinstance(stop, str):
                raise InputError(f"stop_strings[{i}] is {str(stop)[:40]}; it must be a string")
            if not stop:
                raise InputError(f"stop_strings[{i}] is empty, and would stop every text; leave it out")
        self._borders = [_borders(stop) for stop in self._stops]
        self._restart()

    @property
    def any(self) -> bool:
        """Whether there is any string to stop at."""
        return bool(self._stops)

    def _restart(self) -> None:
        self._held = ""  # the longest end of the text so far that begins a stop string
        self._matched = [0] * len(self._stops)  # of each, how much the text so far ends with
        self.stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Takes the next part of the text.

        Returns:
          What can be shown of it and of what was held back, and whether a stop string has come, which is
          not shown itself. After that nothing is.
        """
        if self.stopped:
            return "", True
        seen = self._held + text
        for at, character in enumerate(text, len(self._held) + 1):
            complete = 0
            for i, stop in enumerate(self._stops):
                matched = self._matched[i]
                while matched and stop[matched] != character:
                    matched = self._borders[i][matched]
                matched += stop[matched] == character
                self._matched[i] = matched
                if matched == len(stop):
                    complete = max(complete, matched)
            if complete:
                self.stopped, self._held = True, ""
                return seen[: at - complete], True
        shown = len(seen) - max(self._matched, default=0)
        self._held = seen[shown:]
        return seen[:shown], False

    def flush(self) -> str:
        """Ends the text: returns what was held back, and is ready for another."""
        held = self._held
        self._restart()
        return held


def _borders(stop: str) -> list[int]:
    """For each n, the length of the longest string that both begins and ends `stop[:n]`, and is shorter."""
    borders = [0, 0]
    for character in stop[1:]:
        length = borders[-1]
        while length and stop[length] != character:
            length = borders[length]
        borders.append(length + (stop[length] == character))
    return borders
