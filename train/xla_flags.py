"""Checks `XLA_FLAGS` before JAX is imported: XLA ends the process for what it cannot parse."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import subprocess
import sys

from llama_jax.errors import InputError

# Flags that every XLA of the last years has, in contrast to those of accelerators.
_COMMON_FLAGS = re.compile(r"--xla_(cpu|dump|llvm|backend|force_host)_")
_PARSE = "from jaxlib import xla_client; xla_client.make_cpu_client()"


@functools.cache
def check_xla_flags(flags: str) -> None:
    """Raises an `InputError` for a value of `XLA_FLAGS` that XLA would abort the process for.

    It is parsed in a process of its own (half a second), unless it has only flags that every XLA has.
    """
    values: dict[str, str] = {}
    for name, value in re.findall(r"--(\w+)=?(\S*)", flags):
        if values.setdefault(name, value) != value:
            raise InputError(f"XLA_FLAGS sets --{name} to {values[name]} and to {value}; keep one of them")
    if all(_COMMON_FLAGS.match(word) for word in flags.split()):
        return
    environ = {**os.environ, "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", _PARSE], env=environ, capture_output=True, text=True, check=False
    )
    if done.returncode == 0 or "XLA_FLAGS" not in done.stderr:
        return
    found = re.search(r"(Unknown flag|Couldn't interpret|Illegal value|Could not open).*", done.stderr)
    reason = found[0].strip() if found else "XLA cannot parse it"
    hint = "; flags of TPUs go to LIBTPU_INIT_ARGS" if "--xla_tpu" in reason else ""
    raise InputError(
        f"XLA_FLAGS is {flags!r}: {reason[:200].rstrip('.')}; remove the flag, or correct it for jaxlib "
        f"{importlib.metadata.version('jaxlib')}{hint}"
    )
