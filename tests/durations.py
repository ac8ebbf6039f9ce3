"""Which tests take long: `FAST=1` and `make test-jax` leave them out, and workers take long files first.

`durations.txt` holds the processor seconds of each test that took one or more when `make durations` last ran
the suite, with those of the processes that it started: they do not depend on what else runs. A test that the
file does not name counts as fast.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path

import pytest

FILE = Path(__file__).with_suffix(".txt")
LEAST = 1.0  # seconds


def read(path: Path = FILE) -> dict[str, float]:
    """Processor seconds by the name of the test."""
    lines = (line.split(" ", 1) for line in path.read_text(encoding="utf-8").splitlines())
    return {name: float(seconds) for seconds, name in lines}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("llama_jax")
    group.addoption(
        "--shorter-than",
        type=float,
        metavar="SECONDS",
        help=f"leave out the tests that took as much processor time or more, by {FILE.name}",
    )
    group.addoption(
        "--store-durations", action="store_true", help=f"measure the tests of this run anew, in {FILE.name}"
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seconds = read()
    if limit := config.option.shorter_than:
        long = [item for item in items if seconds.get(item.nodeid, 0.0) >= limit]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if seconds.get(item.nodeid, 0.0) < limit]
    if hasattr(config, "workerinput"):  # with `--no-loadscope-reorder`, workers take files in this order
        files: dict[str, float] = defaultdict(float)
        for item in items:
            files[item.nodeid.split("::")[0]] += seconds.get(item.nodeid, 0.02)
        items.sort(key=lambda item: -files[item.nodeid.split("::")[0]])


def processor_seconds(process: int) -> float:
    """Of a process and its descendants, living and ended, since they started; Linux."""
    try:
        # After the name, which may have spaces: fields 14 to 17 are user and system time, and those of
        # children that were waited for.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        children = [path.read_text().split() for path in Path(f"/proc/{process}/task").glob("*/children")]
    except OSError:  # it has ended
        return 0.0
    own = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return own + sum(processor_seconds(int(child)) for of_thread in children for child in of_thread)


_measured: dict[str, float] = defaultdict(float)
_clock = {"last report": 0.0}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds the processor seconds since the last report: those of set-up, call or teardown."""
    report = yield
    now = processor_seconds(os.getpid())
    # What a process took that was killed and not waited for is gone.
    report.user_properties.append(("processor_seconds", max(now - _clock["last report"], 0.0)))
    _clock["last report"] = now
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _measured[report.nodeid] += dict(report.user_properties).get("processor_seconds", 0.0)  # type: ignore[arg-type]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.option.store_durations and not hasattr(session.config, "workerinput"):
        kept = {name: seconds for name, seconds in read().items() if name not in _measured and _exists(name)}
        long = {name: seconds for name, seconds in _measured.items() if seconds >= LEAST}
        lines = [f"{seconds:.1f} {name}\n" for name, seconds in sorted((kept | long).items())]
        FILE.write_text("".join(lines), encoding="utf-8")


def _exists(name: str) -> bool:
    """Whether there is a test of that name, parameters aside: one that this run left out."""
    file, _, rest = name.partition("::")
    path = FILE.parents[1] / file
    return path.is_file() and f"def {rest.partition('[')[0].split('::')[-1]}(" in path.read_text("utf-8")
