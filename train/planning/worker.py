"""The process that compiles: a request on stdin, lines of JSON on stdout, the last of which is the answer."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import sys
import threading
from typing import Any


def main() -> int:
    """Reads one request, answers it; ends at once where the caller does."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libtpu prints is no answer

    def answer(line: Any) -> None:
        print(json.dumps(line), file=answers, flush=True)

    run, model, topology = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_the_caller, daemon=True).start()
    from llama_jax.errors import LlamaJaxError

    from .lowering import lower_step
    from .reading import compile_step, read_plan

    try:
        answer({"phase": "tracing the step"})
        lowered = lower_step(run, model, topology)
        answer({"phase": "compiling the step"})
        compiled = compile_step(lowered, run)
        answer({"phase": "reading the program"})
        plan = read_plan(compiled, lowered, run, model, topology)
        answer({"plan": dataclasses.asdict(plan)})
    except LlamaJaxError as error:
        fields = {name: getattr(error, name) for name in ("needed", "capacity") if hasattr(error, name)}
        answer({"error": {"type": type(error).__name__, "message": str(error), **fields}})
    return 0


def _end_with_the_caller() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # libtpu's threads take seconds to end
