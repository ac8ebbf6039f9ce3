"""What tests of compiled programs share: a count of compiles, and the text of a decode loop."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def counting_compiles() -> Iterator[list[str]]:
    """Collects an event for each program that XLA compiles."""
    compiled: list[str] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def loop_body(text: str) -> str:
    """The compiled decode loop: every line of its body and of the fusions and calls within."""
    parts = re.split(r"^(?=%|ENTRY )", text, flags=re.M)
    computations = {match[1]: part for part in parts if (match := re.match(r"(?:ENTRY )?%([\w.\-]+) ", part))}
    loops = re.findall(r"while\(.*?body=%([\w.\-]+)", text)
    todo, done = [max(loops, key=lambda name: len(computations[name]))], {}
    while todo:
        name = todo.pop()
        done[name] = computations[name]
        called = re.findall(r"(?:calls|to_apply|body|condition)=%([\w.\-]+)", computations[name])
        todo += [other for other in called if other not in done]
    return "\n".join(done.values())
