"""The worker process: `python worker.py SECONDS FILE` responds to requests by `respond` of a Python file.

process.py starts it and kills it after a timeout. The file's `MAX_MEMORY` is the limit on address space. This
script imports nothing of the package, so that it starts in a tenth of a second.

Protocol: each line of stdin is a JSON value, given to `respond`, which returns a JSON object, or one and some
bytes. The answer is a line of JSON on stdout: the object as `response`, the number of `bytes`, which follow.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import sys

try:
    import resource
except ImportError:  # Windows: memory is bounded only by the timeout
    resource = None  # type: ignore[assignment]


def _lower_limit(kind: int, limit: int) -> None:
    """Lowers a resource limit to `limit`, unless the hard limit is lower already."""
    _, hard = resource.getrlimit(kind)
    if hard == resource.RLIM_INFINITY or hard > limit:
        resource.setrlimit(kind, (limit, hard))


def main() -> None:
    """Responds to requests until stdin ends."""
    seconds, file = int(sys.argv[1]), sys.argv[2]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends Ctrl-C to the whole process group
    spec = importlib.util.spec_from_file_location("responder", file)
    assert spec is not None
    assert spec.loader is not None
    responder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(responder)
    if resource:
        _lower_limit(resource.RLIMIT_CORE, 0)
        _lower_limit(resource.RLIMIT_AS, responder.MAX_MEMORY)
    out = sys.stdout.buffer
    out.write(b"ready\n")
    out.flush()
    for line in sys.stdin.buffer:
        if resource:  # a CPU limit in case the parent died and cannot enforce the timeout
            usage = resource.getrusage(resource.RUSAGE_SELF)
            _lower_limit(resource.RLIMIT_CPU, int(usage.ru_utime + usage.ru_stime) + seconds + 2)
        found = responder.respond(json.loads(line))
        response, data = found if isinstance(found, tuple) else (found, b"")
        out.write(json.dumps({"response": response, "bytes": len(data)}).encode() + b"\n" + data)
        out.flush()


if __name__ == "__main__":
    main()
