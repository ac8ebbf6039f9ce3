"""`plan_compiled`: the step compiled by the TPU compiler in a process of its own.

libtpu reads its flags once per process, needs tens of gigabytes for large programs, cannot be interrupted,
and ends its process where it does not like a flag: none of that may happen to the caller.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pickle
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import llama_jax.errors
from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.ops.compiler_flags import with_flags
from llama_jax.plan.result import StepPlan
from llama_jax.plan.topology import Topology

from ..config.run import RunConfig
from . import cache, errors

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # do not query a TPU VM's metadata server
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compilers may run in parallel, since no device is opened
}
TIMEOUT = 1800.0  # seconds
MEMORY_SHARE = 0.85  # of this machine's memory
_POLL = 0.25  # seconds
WORKER = [sys.executable, "-m", f"{__package__}.worker"]


def plan_compiled(
    run: RunConfig,
    model: LlamaConfig,
    topology: Topology,
    *,
    compiler_flags: Mapping[str, str] | None = None,
    timeout: float | None = TIMEOUT,
    use_cache: bool = True,
) -> StepPlan:
    """Compiles the step of a run for TPU slices, and reads its cost off the program.

    The compiler runs in a process of its own, which ends with this one. The answer is kept in the user's
    cache folder.

    Args:
      run: the run's configuration.
      model: the model that it trains.
      topology: the slices.
      compiler_flags: values of libtpu's flags by name, without dashes, beside those that every run sets.
      timeout: seconds that a compile may take; None for `TIMEOUT`.
      use_cache: whether an answer from before is used.

    Returns:
      The plan, with `source` `compiled`.

    Raises:
      OutOfMemory: if the step needs more memory than a chip has.
      CompilerMissing: without libtpu.
      ConfigError: if mesh, batch or model do not fit the slices.
      InputError: if the compiler refuses the step or a flag, or needs too much time or memory.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise errors.CompilerMissing(
            "the TPU compiler is not installed: pip install libtpu (the version that jax[tpu] names)"
        )
    flags = dict(compiler_flags or {})
    key = cache.cache_key(run, model, topology, flags)
    result = None
    if use_cache and (stored := cache.read(key)) is not None:
        with contextlib.suppress(KeyError, TypeError, ValueError):  # damaged
            result = _result(stored)
    if result is None:
        seconds = TIMEOUT if timeout is None else timeout
        answer = _compile((run, model, topology), flags, seconds, topology.name)
        result = _result(answer)
        if isinstance(result, StepPlan | errors.OutOfMemory):
            cache.write(key, answer)
    if isinstance(result, StepPlan):
        return result
    raise result


def _result(answer: Mapping[str, Any]) -> StepPlan | llama_jax.errors.LlamaJaxError:
    """A plan, or the error to raise.

    Raises:
      KeyError, TypeError, ValueError: if it is neither.
    """
    if "plan" in answer:
        return cache.plan_from_json(answer["plan"])
    error = dict(answer["error"])
    kind, message = error.pop("type"), error.pop("message")
    if kind == "OutOfMemory":
        return errors.OutOfMemory(message, **error)
    known: Any = getattr(errors, kind, None) or getattr(llama_jax.errors, kind, InputError)
    result: llama_jax.errors.LlamaJaxError = known(message)
    return result


def environment(flags: Mapping[str, str]) -> dict[str, str]:
    """The variables of a process that compiles: `flags` override those of LIBTPU_INIT_ARGS."""
    given = os.environ.get("LIBTPU_INIT_ARGS", "").split()
    kept = [word for word in given if re.sub(r"^--|=.*", "", word) not in flags]
    return {
        **os.environ,
        **ENVIRONMENT,
        "LIBTPU_INIT_ARGS": with_flags(" ".join(kept), flags),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }


def _compile(request: Any, flags: Mapping[str, str], timeout: float, name: str) -> dict[str, Any]:
    """The answer of a process that compiles: `plan`, or an `error` of a user's making."""
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            WORKER,
            stdin=subprocess.PIPE,  # which it reads to its end: where the caller ends, so does it
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environment(flags),
            start_new_session=True,  # Ctrl-C is the caller's
        )
        try:
            return _wait(process, request, timeout, name, stderr)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]


def _wait(
    process: subprocess.Popen[bytes], request: Any, timeout: float, name: str, stderr: IO[bytes]
) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    deadline = time.monotonic() + timeout
    limit = MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(BrokenPipeError):  # it has ended; why, stderr says
        pickle.dump(request, process.stdin)
        process.stdin.flush()
    phase, received = "starting", b""
    while True:
        ready, _, _ = select.select([process.stdout], [], [], _POLL)
        if ready:
            read = os.read(process.stdout.fileno(), 1 << 16)
            if not read:
                raise InputError(_why_it_ended(process.wait(), stderr, name))
            received += read
            *lines, received = received.split(b"\n")
            for line in lines:
                answer: dict[str, Any] = json.loads(line)
                if "phase" not in answer:
                    return answer
                phase = answer["phase"]
        if time.monotonic() > deadline:
            raise InputError(
                f"compiling for {name} was ended after {timeout:.0f} s, while {phase}; allow more "
                "(--timeout), or plan by arithmetic (--fast)"
            )
        if (used := _resident_bytes(process.pid)) > limit:
            raise InputError(
                f"compiling for {name} was ended at {used / 1e9:.0f} GB, {MEMORY_SHARE:.0%} of this "
                f"machine's memory, while {phase}; plan by arithmetic (--fast), or on a larger machine"
            )


def _resident_bytes(pid: int) -> int:
    """Physical memory of a process; 0 where the system does not say (libtpu is for Linux alone)."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _why_it_ended(status: int, stderr: IO[bytes], name: str) -> str:
    """One line for a compiler that ended its process."""
    stderr.seek(0)
    text = stderr.read().decode(errors="replace")
    if found := re.search(r"(Unknown (command line )?flag.*|.*[Ii]llegal value.*|.*flag .*invalid.*)", text):
        return f"the TPU compiler refused its flags: {found[0].strip()[:200]}"
    if status == -signal.SIGKILL:
        return f"compiling for {name} was killed: this machine has too little memory; plan by --fast"
    lines = [line for line in text.splitlines() if line.strip()]
    reason = lines[-1].strip()[:200] if lines else f"status {status}"
    return f"the TPU compiler ended while compiling for {name}: {reason}"
