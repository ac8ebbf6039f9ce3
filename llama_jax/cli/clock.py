"""Times tokens as they come, apart from the time that compiling takes."""

from __future__ import annotations

import time
from typing import Any

import jax


class TokenClock:
    """Times the first token and the later ones, without the time that JAX spends on tracing and compiling."""

    def __init__(self) -> None:
        self._compiling: list[tuple[float, float]] = []  # disjoint spans, in order
        self._ticks: list[float] = []
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            end = time.perf_counter()
            start = end - duration_secs
            while self._compiling and self._compiling[-1][0] >= start:  # one program traced inside another
                self._compiling.pop()
            self._compiling.append((start, end))

    @property
    def compiling(self) -> float:
        """Seconds spent on compiling so far."""
        return sum(end - start for start, end in self._compiling)

    def tick(self) -> None:
        """Marks the beginning, and then each token."""
        self._ticks.append(time.perf_counter() - self.compiling)

    def rates(self, prompt_tokens: int) -> tuple[float, float | None]:
        """Returns prefill and decode tokens/s; the latter is None where there was one token only."""
        begin, first, *later = self._ticks
        decode = len(later) / (later[-1] - first) if later else None
        return prompt_tokens / (first - begin), decode
