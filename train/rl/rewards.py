"""Calls reward functions, each in a process of its own, with a time limit.

The calling convention is TRL's: f(prompts=..., completions=..., completion_ids=..., **columns) -> a number
for each completion, or None where the function does not apply. Where a call raises or takes too long, each
example is tried alone, to find which one it is: those that fail alone get `rl.failed_reward` and are named in
the log.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from llama_jax.errors import ConfigError, DataError

from ..config.rl import RLConfig, model_of
from .worker import receive, send

_START_SECONDS = 120.0  # importing a reward function may import much
_NAMED = 5  # failures of one batch that are named one by one


class RewardError(DataError):
    """A reward function that returns what is no reward, or fails on every example."""


@dataclasses.dataclass(frozen=True)
class Completions:
    """What reward functions get of N completions.

    Attributes:
      prompts: texts, or lists of messages.
      completions: texts; a list with the assistant's message where the prompt is messages.
      completion_ids: their tokens.
      columns: the data's other columns, by name.
      places: returns file and line of an example, for messages.
    """

    prompts: Sequence[Any]
    completions: Sequence[Any]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]]
    places: Callable[[int], str]

    def request(self, index: int | None = None) -> dict[str, Any]:
        """The arguments of a reward function, for all or for one of them."""
        arguments = {
            **self.columns,
            "prompts": self.prompts,
            "completions": self.completions,
            "completion_ids": self.completion_ids,
        }
        part = slice(None) if index is None else slice(index, index + 1)
        return {name: list(values[part]) for name, values in arguments.items()}


class Rewards:
    """The reward functions of a run; a context that ends their processes."""

    def __init__(self, config: RLConfig, log: Callable[[str], None]) -> None:
        """Starts the processes, which import the functions.

        Raises:
          ConfigError: for a function that cannot be imported.
        """
        self._config, self._log = config, log
        specs = [spec for spec in config.rewards if model_of(spec) is None]
        self._functions = [_Function(spec, config.reward_timeout) for spec in specs]
        self._threads = max(len(specs), 1)
        try:
            with concurrent.futures.ThreadPoolExecutor(self._threads) as pool:
                list(pool.map(_Function.start, self._functions))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes."""
        for function in self._functions:
            function.stop()

    def __call__(self, batch: Completions) -> np.ndarray:
        """The scores f64 [N, F] of N completions by the F functions; NaN where one does not apply.

        Raises:
          RewardError: for a function that returns what is no reward, or fails on every example.
        """
        with concurrent.futures.ThreadPoolExecutor(self._threads) as pool:
            scores = list(pool.map(lambda function: self._score(function, batch), self._functions))
        return np.array(scores).reshape(-1, len(batch.completions)).T

    def _score(self, function: _Function, batch: Completions) -> np.ndarray:
        count = len(batch.completions)
        answer = function.call(batch.request())
        if not isinstance(answer, _Failure):
            return _checked(function.spec, answer, count)
        scores, failures = np.full(count, self._config.failed_reward), {}
        for index in range(count):
            answer = function.call(batch.request(index))
            if isinstance(answer, _Failure):
                failures[index] = answer
            else:
                scores[index] = _checked(function.spec, answer, 1)[0]
        if len(failures) == count:
            first = failures[0]
            raise RewardError(
                f"{batch.places(0)}: the reward function {function.spec!r} {first.what}, and on every other "
                "example of the batch; correct it"
            )
        rule = f"scored {self._config.failed_reward:g} (rl.failed_reward)"
        for index, failure in list(failures.items())[:_NAMED]:
            self._log(f"{batch.places(index)}: the reward function {function.spec!r} {failure.what}; {rule}")
        if len(failures) > _NAMED:
            self._log(f"and {len(failures) - _NAMED} more examples of this batch, all {rule}")
        if not failures:
            self._log(
                f"the reward function {function.spec!r} failed on a batch, and on none of its examples alone"
            )
        return scores


@dataclasses.dataclass(frozen=True)
class _Failure:
    what: str


class _Function:
    """A reward function and its process."""

    def __init__(self, spec: str, timeout: float) -> None:
        self.spec, self._timeout = spec, timeout
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the process.

        Raises:
          ConfigError: if the function cannot be imported.
        """
        paths = os.pathsep.join([str(Path.cwd()), *filter(None, sys.path)])
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.worker", self.spec],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
        )
        kind, value = self._exchange(None, _START_SECONDS)
        if kind != "ready":
            self.stop()
            why = {"late": f"not within {_START_SECONDS:.0f} s", "dead": "its process ended"}.get(kind, value)
            raise ConfigError(f"rl.rewards: {self.spec!r} cannot be imported ({why}); correct the name or it")

    def stop(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def call(self, request: Mapping[str, Any]) -> Any:
        """Returns what the function returns, or how it failed."""
        if self._process is None:
            self.start()
        kind, value = self._exchange(request, self._timeout)
        if kind in ("late", "dead"):
            self.stop()
        match kind:
            case "ok":
                return value
            case "late":
                return _Failure(f"took more than {self._timeout:g} s (rl.reward_timeout)")
            case "dead":
                return _Failure("ended its process")
            case _:
                return _Failure(f"raised {value}")

    def _exchange(self, request: Any, timeout: float) -> tuple[str, Any]:
        """Sends a request, if there is one, and waits for the answer; a late process is killed."""
        process, late = self._process, threading.Event()
        assert process is not None and process.stdin is not None and process.stdout is not None

        def kill() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(timeout, kill)
        timer.daemon = True
        timer.start()
        try:
            if request is not None:
                send(process.stdin, request)  # type: ignore[arg-type]
            answer: tuple[str, Any] = receive(process.stdout)  # type: ignore[arg-type]
        except (OSError, EOFError):
            return ("late" if late.is_set() else "dead"), None
        finally:
            timer.cancel()
            timer.join()
        return answer


def names_of(specs: Sequence[str]) -> list[str]:
    """Short names, told apart by a number where two functions have the same."""
    names: list[str] = []
    for spec in specs:
        place, _, last = spec.rpartition(":")
        last = Path(last).name if model_of(spec) else last
        name = spec.partition(":")[0] if spec.startswith(("format:", "overlong:")) or not place else last
        same = sum(known.partition("_")[0] == name or known == name for known in names)
        names.append(f"{name}_{same + 1}" if name in names else name)
    return names


def _checked(spec: str, values: Any, count: int) -> np.ndarray:
    """Rewards f64 [count], NaN for None.

    Raises:
      RewardError: for anything but a number or None for each completion.
    """
    of = f"the reward function {spec!r} returned"
    if not isinstance(values, list):
        raise RewardError(
            f"{of} a value of type {values}; it must return a list of numbers, one a completion"
        )
    if len(values) != count:
        raise RewardError(f"{of} {len(values)} rewards for {count} completions; it must return one for each")
    for value in values:
        if isinstance(value, str):
            raise RewardError(f"{of} {value} as a reward; it must be a number, or None")
        if value is not None and not math.isfinite(value):
            raise RewardError(f"{of} {value} as a reward; it must be a finite number, or None")
    return np.array([math.nan if value is None else float(value) for value in values])
