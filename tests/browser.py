"""Headless Chromium over its debugging pipe: what a page logs, fetches and measures, and how it looks."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def _runs(program: str) -> bool:
    """Whether it is one: what stands for a snap that is not there is not."""
    return subprocess.run([program, "--version"], capture_output=True, timeout=30).returncode == 0


_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in _NAMES if (found := shutil.which(name)) and _runs(found)), None)
# The protocol is spoken on descriptors 3 and 4, which a process takes on before it becomes Chromium.
_BECOME = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
_QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe",
)  # fmt: skip


class Browser:
    """One browser with one page. profile: an empty directory."""

    def __init__(self, profile: Path) -> None:
        if CHROMIUM is None:
            raise RuntimeError("no Chromium")
        there, self._out = os.pipe()
        self._in, back = os.pipe()
        pair = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (there, back)]
        command = [sys.executable, "-c", _BECOME, *map(str, pair), CHROMIUM, *_QUIET, f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(command, pass_fds=pair, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for fd in (there, back, *pair):
            os.close(fd)
        self._held, self._count = b"", 0
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", session=None, url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", session=None, targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        """End the browser."""
        self._process.terminate()
        self._process.wait(10)
        os.close(self._in)
        os.close(self._out)

    def call(self, method: str, session: str | None = "", **params: Any) -> dict[str, Any]:
        """One command of the DevTools protocol, and its result; events that come meanwhile are kept."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (found := self._read()).get("id") != self._count:
            self.events.append(found)
        if "error" in found:
            raise RuntimeError(f"{method}: {found['error']}")
        return dict(found["result"])

    def _read(self, patience: float = 30.0) -> dict[str, Any]:
        until = time.monotonic() + patience
        while b"\0" not in self._held:
            if not select.select([self._in], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError("Chromium says nothing")
            if not (more := os.read(self._in, 1 << 20)):
                raise RuntimeError("Chromium has ended")
            self._held += more
        text, _, self._held = self._held.partition(b"\0")
        return dict(json.loads(text))

    def open(self, page: Path, *, width: int, dark: bool = False, height: int = 900) -> None:
        """Load a file at a width in CSS pixels, as a phone does below 500, and wait until it has loaded."""
        phone = width < 500
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if phone else 1, mobile=phone
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self._read())

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript gives."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def complaints(self) -> list[str]:
        """Console messages, log entries and exceptions since the page was opened."""
        names = ("Runtime.consoleAPICalled", "Log.entryAdded", "Runtime.exceptionThrown")
        return [json.dumps(e["params"]) for e in self.events if e.get("method") in names]

    def requests(self) -> list[str]:
        """Addresses asked for since the page was opened."""
        return [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]

    def screenshot(self, file: Path, *, whole: bool = True) -> None:
        """What the page looks like, as PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(shot["data"]))
