"""The process that calls one reward function: `python -m llama_jax.train.rl.worker SPEC`.

Requests and answers are pickled, each after its length, on stdin and what was stdout. What the function
prints goes to stderr. The process ends with its parent.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pickle
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

_LENGTH = struct.Struct("<Q")


def send(file: BinaryIO, message: Any) -> None:
    """Writes one message."""
    data = pickle.dumps(message)
    file.write(_LENGTH.pack(len(data)) + data)
    file.flush()


def receive(file: BinaryIO) -> Any:
    """Reads one message.

    Raises:
      EOFError: if the other side has ended.
    """
    header = file.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        raise EOFError
    data = file.read(_LENGTH.unpack(header)[0])
    return pickle.loads(data)


def load(spec: str) -> Callable[..., Any]:
    """The function that `rl.rewards` names.

    Raises:
      Exception: whatever importing it raises.
    """
    from . import builtin_rewards

    place, _, name = spec.rpartition(":")
    if (found := builtin_rewards.find(spec)) is not None:
        return found
    if not place:
        raise ImportError(
            f"not a built-in reward ({', '.join(builtin_rewards.NAMES)}), and no package.module:function"
        )
    if place.endswith(".py"):
        module_spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        if module_spec is None or module_spec.loader is None or not Path(place).is_file():
            raise ImportError(f"no such file as {place}")
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[module_spec.name] = module
        module_spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    function = getattr(module, name, None)
    if not callable(function):
        raise ImportError(f"{place} has no function {name!r}")
    return function


def describe(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main(spec: str) -> None:
    """Serves until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the group; the trainer ends this process
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        function = load(spec)
    except BaseException as error:
        send(answers, ("error", describe(error)))
        return
    send(answers, ("ready", None))
    while True:
        try:
            request = receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = ("ok", plain(function(**request)))
        except Exception as error:
            answer = ("error", describe(error))
        send(answers, answer)


def plain(values: Any) -> Any:
    """Rewards without the types of NumPy or another library, which the trainer's process may lack."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, (list, tuple)):
        return str(type(values).__name__)
    items = [value.item() if hasattr(value, "item") else value for value in values]
    return [
        x if x is None or isinstance(x, (int, float)) else f"{type(x).__name__} {str(x)[:40]!r}"
        for x in items
    ]


if __name__ == "__main__":
    main(sys.argv[1])
