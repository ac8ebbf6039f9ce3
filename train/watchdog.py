"""Ends a run that hangs, with the stacks of all threads in its directory; a launcher then starts it again."""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from llama_jax.console.exit_status import report_error
from llama_jax.errors import ExitStatus, LlamaJaxError

from .config.distributed import DistributedConfig
from .coordination import process
from .metrics.clock import Clock

STACKS = "stacks"  # the directory in the run's
_TICK_SECONDS = 0.5
_SUSPENDED_SECONDS = 10.0  # between two ticks: this process was stopped, as by Ctrl-Z
_DUMP_SECONDS = 10.0  # the file system may be what hangs
_EXIT_SECONDS = 20.0  # to tell the other processes, whose first may be what hangs


class Watchdog:
    """A thread that looks whether the training loop moves.

    Args:
      clock: what the loop moves.
      config: the bounds.
      run_dir: the run's directory.
    """

    def __init__(self, clock: Clock, config: DistributedConfig, run_dir: Path) -> None:
        self._clock, self._config, self._folder = clock, config, run_dir / STACKS
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._exit: Callable[[str], object] = _exit_alone

    def start(self, exit_all: Callable[[str], object] | None = None) -> None:
        """Begins to watch.

        Args:
          exit_all: ends all processes of the run, with this error in each; by default the only one ends.
        """
        self._exit = exit_all or _exit_alone
        if self._config.hang_steps:
            self._thread.start()

    def stop(self) -> None:
        """Ends the thread."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def hang(self) -> str | None:
        """Why the run counts as hanging; None while it does not."""
        clock, config = self._clock, self._config
        still = time.monotonic() - clock.moved
        median = statistics.median(clock.step_seconds) if clock.step_seconds else 0.0
        if clock.activity != "steps" or not median:
            bound = float(config.hang_other_seconds)
        else:
            bound = max(config.hang_seconds, config.hang_steps * median)
        if still <= bound:
            return None
        usual = f" (median {median:.3g} s)" if median else ""
        what = "no step has ended" if clock.activity == "steps" else f"{clock.activity} has not ended"
        return (
            f"{what} for {still:.0f} s{usual}, with process {process()[0]} {self._doing()}; the stacks of "
            f"all threads are in {self._folder}; run the same command again to resume"
        )

    def dump(self, reason: str) -> None:
        """Writes this process's stacks; to stderr if the run directory cannot be written."""
        thread = threading.Thread(target=self._write, args=(reason,), daemon=True)
        thread.start()
        thread.join(_DUMP_SECONDS)
        if thread.is_alive():
            faulthandler.dump_traceback(sys.stderr)

    def _write(self, reason: str) -> None:
        with tempfile.TemporaryFile() as file:  # faulthandler wants one that the system knows
            now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
            file.write(f"{now}: {self._doing()}; {reason}\n".encode())
            file.flush()
            faulthandler.dump_traceback(file)
            file.seek(0)
            stacks = file.read() + b"\n"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"process_{process()[0]}.txt"
            path.write_bytes((path.read_bytes() if path.exists() else b"") + stacks)
        except (OSError, LlamaJaxError):
            sys.stderr.write(stacks.decode(errors="replace"))

    def _doing(self) -> str:
        activity = self._clock.activity
        return self._clock.waiting_for or ("waiting for a step" if activity == "steps" else f"in {activity}")

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._stopped.wait(_TICK_SECONDS):
            now = time.monotonic()
            if now - last > _SUSPENDED_SECONDS:
                self._clock.moved += now - last
            last = now
            if reason := self.hang():
                self.dump(reason)
                threading.Thread(target=self._exit, args=(reason,), daemon=True).start()
                time.sleep(_EXIT_SECONDS)
                os._exit(ExitStatus.HUNG)


def _exit_alone(reason: str) -> None:
    report_error(reason)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(ExitStatus.HUNG)
