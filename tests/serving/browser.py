"""A headless Chromium, driven through its debugging pipe: no driver, no package."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find() -> str | None:
    """The path of a browser of this machine."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """A page of the browser."""

    def __init__(self, commands: int, events: int) -> None:
        """File descriptors: to the browser and from it."""
        self._to, self._from = os.fdopen(commands, "wb"), os.fdopen(events, "rb")
        self._count = 0
        self._session: str | None = None
        self._buffer = b""
        self.requests: list[str] = []
        self.problems: list[str] = []
        (target,) = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attach = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attach["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """A command of the DevTools protocol."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer)

    def run(self, script: str) -> Any:
        """The value of an expression, of which promises are awaited."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script: str, seconds: float = 30) -> Any:
        """Waits until an expression is true."""
        for _ in range(int(seconds / 0.05)):
            if value := self.run(script):
                return value
            time.sleep(0.05)
        raise AssertionError(f"{script} is still {value!r}: {self.problems}")

    def type(self, text: str) -> None:
        """Types into what has the focus; a newline is the key Enter."""
        for part in text.split("\n"):
            self.call("Input.insertText", text=part)
            if part is not text.split("\n")[-1]:
                for kind in ("keyDown", "keyUp"):
                    key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
                    self.call("Input.dispatchKeyEvent", type=kind, **key)

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.problems.append(str(params["exceptionDetails"]))
        elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(params["entry"]["text"])

    def _read(self) -> Any:
        while b"\0" not in self._buffer:
            part = os.read(self._from.fileno(), 1 << 16)
            assert part, "the browser has ended"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def opened(path: str, profile: Path) -> Iterator[Page]:
    """Starts the browser at `path`, with an empty page."""
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    command = [path, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
    command += ["--disable-dev-shm-usage", "--no-first-run", f"--user-data-dir={profile}", "about:blank"]
    # The browser reads from descriptor 3 and writes to 4.
    script = f'exec 3<&{to_read} 4>&{from_write}; exec "$@"'
    process = subprocess.Popen(
        ["bash", "-c", script, "-", *command],
        pass_fds=(to_read, from_write),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_read)
    os.close(from_write)
    try:
        yield Page(to_write, from_read)
    finally:
        process.kill()
        process.wait()
