"""A headless Chromium, driven by its DevTools protocol over two pipes: nothing listens, nothing is downloaded here.

The protocol is JSON messages, each ended by a NUL byte, on file descriptors 3 (to the browser) and 4 (from it). One
page, one caller, one thread: everything waits with a deadline, and what the page did meanwhile (console, exceptions,
requests) is kept as it came.
"""

from __future__ import annotations

import base64
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

FLAGS = (
    *("--headless", "--remote-debugging-pipe", "--no-first-run", "--no-default-browser-check", "--mute-audio"),
    "--no-sandbox",  # the page is ours; containers and root have no user namespaces to make a sandbox of
    *("--no-zygote", "--disable-dev-shm-usage", "--disable-gpu", "--disable-software-rasterizer"),
    *("--disable-background-networking", "--disable-component-update", "--disable-default-apps", "--disable-sync"),
    *("--disable-extensions", "--metrics-recording-only", "--no-pings", "--disable-breakpad"),
    "--disable-features=Translate,OptimizationHints,MediaRouter,InterestFeedContentSuggestions,AutofillServerCommunication",
    # No name resolves: a request that leaves this machine fails, and is seen.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--hide-scrollbars",
)
ON_DESCRIPTORS_3_AND_4 = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(text), fcntl.F_DUPFD, 10) for text in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class BrowserFailed(Exception):
    """The browser did not do what it was asked to, or not in time."""


class Chromium:
    """One browser process with one page. ``home`` is a folder of its own, for profile and caches."""

    def __init__(self, command: Path, environment: Mapping[str, str], home: Path, *, timeout_s: float = 60.0) -> None:
        self._timeout_s = timeout_s
        self._stderr = (home / "chromium.log").open("wb")
        to_child, self._to_browser = os.pipe()
        self._from_browser, from_child = os.pipe()
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-c", ON_DESCRIPTORS_3_AND_4, str(to_child), str(from_child)),
                *(str(command), *FLAGS, f"--user-data-dir={home / 'profile'}", "about:blank"),
            ],
            env={"PATH": "/usr/bin:/bin", "HOME": str(home), "LANG": "C.UTF-8", **environment},
            pass_fds=(to_child, from_child),
            stdin=subprocess.DEVNULL,
            stdout=self._stderr,
            stderr=self._stderr,
        )
        os.close(to_child)
        os.close(from_child)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._from_browser, selectors.EVENT_READ)
        self._buffer = b""
        self._last_id = 0
        self._session_id: str | None = None
        self.events: list[dict[str, Any]] = []
        """Everything the page reported, in order: ``method`` and ``params`` of the DevTools protocol."""

    def __enter__(self) -> Self:
        try:
            targets = self.call("Target.getTargets")["targetInfos"]
            page = next(target["targetId"] for target in targets if target["type"] == "page")
            self._session_id = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
            self.call("Page.setLifecycleEventsEnabled", enabled=True)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the browser: asked first, then killed."""
        os.close(self._to_browser)  # the browser ends when its pipe does
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        self._selector.close()
        os.close(self._from_browser)
        self._stderr.close()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol; its result. Raises ``BrowserFailed``."""
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": parameters}
        if self._session_id is not None and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self._session_id
        os.write(self._to_browser, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + self._timeout_s
        while True:
            answer = self._receive(deadline, method)
            if answer.get("id") == self._last_id:
                if "error" in answer:
                    raise BrowserFailed(f"{method}: {answer['error'].get('message')}")
                result: dict[str, Any] = answer["result"]
                return result

    def wait_for(self, method: str, **parameters: object) -> dict[str, Any]:
        """The parameters of the first event since ``forget`` that has that name and those parameters."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            for event in self.events:
                found = event["params"]
                if event["method"] == method and all(found.get(key) == value for key, value in parameters.items()):
                    return dict(found)
            self._receive(deadline, method)

    def forget(self) -> None:
        """Drops what was reported so far."""
        self.events.clear()

    def open(self, url: str) -> None:
        """Loads a page and waits for its load event."""
        self.forget()
        answer = self.call("Page.navigate", url=url)
        if answer.get("errorText"):
            raise BrowserFailed(f"the page did not open: {answer['errorText']}")
        # The loader tells the load of this page from a late one of the page before.
        self.wait_for("Page.lifecycleEvent", name="load", loaderId=answer["loaderId"])

    def evaluate(self, expression: str) -> Any:
        """Runs JavaScript in the page, awaiting promises; its value, which must be fit for JSON."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise BrowserFailed(str(details.get("exception", {}).get("description") or details.get("text")))
        return answer["result"].get("value")

    def resize(self, width_px: int, height_px: int, *, is_phone: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width_px,
            height=height_px,
            deviceScaleFactor=1,
            mobile=is_phone,
        )

    def prefer_dark(self, is_dark: bool) -> None:
        feature = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def print(self, path: Path) -> None:
        """As a PDF."""
        path.write_bytes(base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"]))

    def screenshot(self, path: Path, *, is_whole_page: bool = True) -> None:
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=is_whole_page)
        path.write_bytes(base64.b64decode(answer["data"]))

    def console_errors(self) -> list[str]:
        """Uncaught exceptions, and what the page or the browser logged as an error or a warning."""
        found: list[str] = []
        for event in self.events:
            parameters = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                details = parameters["exceptionDetails"]
                found.append(str(details.get("exception", {}).get("description") or details.get("text")))
            elif event["method"] == "Runtime.consoleAPICalled" and parameters["type"] in (
                "error",
                "warning",
                "assert",
            ):
                found.append(" ".join(str(one.get("value", one.get("description"))) for one in parameters["args"]))
            elif event["method"] == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
                found.append(str(parameters["entry"]["text"]))
        return found

    def requested_urls(self) -> list[str]:
        """Every address the page asked for, in order; the first is the page itself."""
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]

    def _receive(self, deadline: float, waiting_for: str) -> dict[str, Any]:
        """The next message; events are kept."""
        while b"\0" not in self._buffer:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not self._selector.select(left_s):
                raise BrowserFailed(f"no answer to {waiting_for} within {self._timeout_s:g} s")
            piece = os.read(self._from_browser, 1 << 16)
            if not piece:
                raise BrowserFailed(f"the browser ended during {waiting_for} (exit code {self._process.wait(5)})")
            self._buffer += piece
        raw, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(raw)
        if "method" in message:
            self.events.append(message)
        return message
