"""A headless Chromium that says what a page looks like, what it asks for and what it complains of.

It is driven by the DevTools protocol over two pipes: no port, no driver, no package. One browser
shows any number of pages, each in a tab of its own.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import select
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_TIMEOUT_S = 60.0
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--remote-debugging-pipe",
)
_MEASURE = """({
  scrollWidth: document.documentElement.scrollWidth,
  brokenImages: [...document.images].filter(image => !image.naturalWidth).length,
})"""


def find_chromium() -> str | None:
    """Path of a Chromium or Chrome, if one is installed."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


@dataclass(frozen=True)
class Look:
    """A page as it was shown.

    Attributes:
        image: All of the page, RGB.
        scroll_width: Pixels from its left to its right; more than the window if it overflows.
        num_broken_images: Pictures that could not be decoded.
        requests: Addresses that it asked for, its own first, without those that hold their data.
        complaints: Errors and warnings on the console.
    """

    image: Image.Image
    scroll_width: int
    num_broken_images: int
    requests: tuple[str, ...]
    complaints: tuple[str, ...]


class Browser:
    """A running browser; a context manager that leaves no process behind."""

    def __init__(self, command: str, folder: Path) -> None:
        """Starts it.

        Args:
            command: See `find_chromium`.
            folder: Where it may keep its files.
        """
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        # Chromium expects the pipes at 3 and 4, which may be taken in this process.
        renumber = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        self._process = subprocess.Popen(
            ["bash", "-c", renumber, "bash", command, *_FLAGS, f"--user-data-dir={folder}"],
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._received = b""
        self._num_sent = 0

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(_TIMEOUT_S)
        os.close(self._write)
        os.close(self._read)

    def look(self, page: Path, *, width: int, is_dark: bool) -> Look:
        """Shows a page and waits until it is loaded.

        Args:
            page: HTML file.
            width: Of the window in pixels; a narrow one is a phone's.
            is_dark: Whether the reader prefers dark pages.
        """
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        tab = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self._call(f"{domain}.enable", tab)
        self._call(
            "Emulation.setDeviceMetricsOverride",
            tab,
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self._call("Emulation.setEmulatedMedia", tab, features=[scheme])
        events: list[dict[str, Any]] = []
        self._call("Page.navigate", tab, events, url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in events):
            events.append(self._receive())
        measured = self._call(
            "Runtime.evaluate", tab, events, expression=_MEASURE, returnByValue=True
        )["result"]["value"]
        size = self._call("Page.getLayoutMetrics", tab, events)["cssContentSize"]
        shot = self._call(
            "Page.captureScreenshot",
            tab,
            events,
            captureBeyondViewport=True,
            clip={"x": 0, "y": 0, "width": width, "height": size["height"], "scale": 1},
        )
        self._call("Target.closeTarget", targetId=target)
        image = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
        return Look(
            image=image,
            scroll_width=measured["scrollWidth"],
            num_broken_images=measured["brokenImages"],
            requests=_requests(events),
            complaints=_complaints(events),
        )

    def _call(
        self,
        method: str,
        session: str = "",
        events: list[dict[str, Any]] | None = None,
        /,
        **parameters: Any,
    ) -> dict[str, Any]:
        """A command's result; events that come before it are noted if somebody wants them."""
        self._num_sent += 1
        message = {"id": self._num_sent, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._num_sent:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            if events is not None:
                events.append(answer)

    def _receive(self) -> dict[str, Any]:
        """The next message, answer or event."""
        deadline = time.monotonic() + _TIMEOUT_S
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._read], [], [], deadline - time.monotonic())
            assert ready, f"the browser said nothing for {_TIMEOUT_S:.0f} s"
            data = os.read(self._read, 1 << 16)
            assert data, f"the browser ended with status {self._process.wait(_TIMEOUT_S)}"
            self._received += data
        message, _, self._received = self._received.partition(b"\0")
        decoded: dict[str, Any] = json.loads(message)
        return decoded


def _requests(events: list[dict[str, Any]]) -> tuple[str, ...]:
    urls = [
        str(event["params"]["request"]["url"])
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    return tuple(url for url in urls if not url.startswith("data:"))


def _complaints(events: list[dict[str, Any]]) -> tuple[str, ...]:
    found = []
    for event in events:
        parameters = event.get("params", {})
        if event["method"] == "Log.entryAdded":
            found.append(str(parameters["entry"]["text"]))
        elif event["method"] == "Runtime.exceptionThrown":
            found.append(str(parameters["exceptionDetails"]["text"]))
        elif event["method"] == "Runtime.consoleAPICalled" and parameters["type"] in {
            "error",
            "warning",
            "assert",
        }:
            found.append(str(parameters["args"]))
    return tuple(found)
