"""Which tests take long: `FAST=1` and `make test-jax` leave them out, and workers take long files first.

`durations.txt` holds the seconds of each test that took one or more when `make durations` last ran the suite.
A test that it does not name counts as fast.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

FILE = Path(__file__).with_suffix(".txt")
LEAST = 1.0  # seconds


def read(path: Path = FILE) -> dict[str, float]:
    """Seconds by the name of the test."""
    lines = (line.split(" ", 1) for line in path.read_text(encoding="utf-8").splitlines())
    return {name: float(seconds) for seconds, name in lines}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("llama_jax")
    group.addoption(
        "--shorter-than",
        type=float,
        metavar="SECONDS",
        help=f"leave out the tests that took longer, by {FILE.name}",
    )
    group.addoption("--store-durations", action="store_true", help=f"write {FILE.name} anew")


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


_measured: dict[str, float] = defaultdict(float)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _measured[report.nodeid] += report.duration  # set-up, call and teardown


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.option.store_durations and not hasattr(session.config, "workerinput"):
        long = sorted((name, seconds) for name, seconds in _measured.items() if seconds >= LEAST)
        FILE.write_text("".join(f"{seconds:.1f} {name}\n" for name, seconds in long), encoding="utf-8")
