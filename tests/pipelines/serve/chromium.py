"""Headless Chromium, driven by its DevTools protocol over a WebSocket."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_START_S, _WAIT_S = 60.0, 30.0
_KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "Tab": 9, "Enter": 13, " ": 32}


class Browser:
    """One window."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        self.downloads = profile / "downloads"
        self.downloads.mkdir(parents=True)
        # Without a sandbox, which needs rights that containers do not have; it opens our own page only.
        options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
        options += (
            "--no-first-run",
            "--hide-scrollbars",
            "--remote-debugging-port=0",
            "--disable-extensions",
        )
        self._process = subprocess.Popen(
            [CHROMIUM, *options, f"--user-data-dir={profile / 'data'}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._number = 0
        self.events: list[dict[str, Any]] = []
        self._open = ExitStack()
        self._open.callback(self._end)
        try:
            self._socket = self._attached(profile / "data" / "DevToolsActivePort")
        except BaseException:
            self.close()
            raise
        for domain in ("Page", "Runtime", "Network", "DOM", "Log"):
            self.call(f"{domain}.enable")
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))

    def close(self) -> None:
        self._open.close()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol, and its result."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=_WAIT_S))
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def open(self, address: str) -> None:
        self.events.clear()
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def value(self, expression: str) -> Any:
        """What JavaScript makes of an expression."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression: str) -> None:
        deadline = time.monotonic() + _WAIT_S
        while not self.value(expression):
            assert time.monotonic() < deadline, f"{expression}: {self.value('document.body.innerText')}"
            time.sleep(0.05)

    def choose(self, selector: str, file: Path) -> None:
        """Put a file into an input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def press(self, key: str) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=_KEYS[key])

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        for kind, (x, y), buttons in (
            ("mousePressed", start, 1),
            ("mouseMoved", end, 1),
            ("mouseReleased", end, 0),
        ):
            self.call(
                "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=buttons, clickCount=1
            )

    def touch(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        for kind, points in (("touchStart", [start]), ("touchMove", [end]), ("touchEnd", [])):
            self.call(
                "Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": x, "y": y} for x, y in points]
            )

    def look(self, *, width: int, height: int, scheme: str = "light", is_phone: bool = False) -> None:
        """Size of the window, and what its user prefers."""
        scale = 2 if is_phone else 1
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=scale, mobile=is_phone,
        )  # fmt: skip
        self.call("Emulation.setTouchEmulationEnabled", enabled=is_phone)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def picture(self, path: Path | None = None) -> bytes:
        content = base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])
        if path is not None:
            path.write_bytes(content)
        return content

    def _attached(self, port_file: Path) -> ClientConnection:
        deadline = time.monotonic() + _START_S
        while not (port_file.exists() and port_file.read_text().strip()):
            assert self._process.poll() is None and time.monotonic() < deadline, "chromium does not start"
            time.sleep(0.05)
        port = port_file.read_text().split()[0]
        while True:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=_WAIT_S) as answer:
                pages = [page for page in json.load(answer) if page["type"] == "page"]
            if pages:
                socket = connect(pages[0]["webSocketDebuggerUrl"], max_size=None)
                return self._open.enter_context(socket)
            assert time.monotonic() < deadline, "chromium has no page"
            time.sleep(0.05)

    def _end(self) -> None:
        self._process.terminate()
        self._process.wait(20)
