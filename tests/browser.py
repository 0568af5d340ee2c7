"""A headless Chromium, driven over the DevTools protocol: pages, events, screenshots. Skips where there is none."""

import base64
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest


NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE = 60.0  # seconds; a loaded machine is slow to start a browser
OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
    *("--hide-scrollbars", "--remote-debugging-port=0", "--remote-allow-origins=*", "about:blank"),
)
WHAT_LEFT = ("Network.requestWillBeSent", "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")


def chromium() -> str:
    """The path of a browser (the variable CHROMIUM first); the test is skipped where there is none."""
    found = next(filter(None, map(shutil.which, filter(None, [os.environ.get("CHROMIUM"), *NAMES]))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed, and CHROMIUM names none")
    return found


class Browser:
    """A process with a profile of its own; `page()` opens tabs."""

    def __init__(self, folder: Path):
        self.client = pytest.importorskip("websocket", reason="websocket-client is not installed (extra dev)")
        words = [chromium(), f"--user-data-dir={folder / 'profile'}", *OPTIONS]
        self.log = open(folder / "browser.log", "w+")  # noqa: SIM115
        self.process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=self.log, stdin=subprocess.DEVNULL)
        self.address = self._wait_for_address(folder / "browser.log")
        self.pages = []

    def _wait_for_address(self, log: Path) -> str:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if found := re.search(r"DevTools listening on (ws://\S+)", log.read_text(errors="replace")):
                return found[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        self.close()
        raise RuntimeError(f"the browser did not start: {log.read_text(errors='replace')[-1000:]}")

    def page(self, **view) -> "Tab":
        """A new tab; see `Tab.view`."""
        root = _Connection(self.client, self.address)
        target = root.call("Target.createTarget", url="about:blank")["targetId"]
        root.close()
        tab = Tab(self.client, re.sub(r"/devtools/.*", f"/devtools/page/{target}", self.address))
        self.pages.append(tab)
        tab.view(**view)
        return tab

    def close(self) -> None:
        """End the process."""
        for tab in getattr(self, "pages", ()):
            tab.connection.close()
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


class _Connection:
    def __init__(self, client, address: str):
        self.client, self.number, self.events = client, 0, []
        self.socket = client.create_connection(address, timeout=PATIENCE, suppress_origin=True)

    def call(self, method: str, **params):
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while True:
            told = json.loads(self.socket.recv())
            if told.get("id") == self.number:
                if "error" in told:
                    raise RuntimeError(f"{method}: {told['error']}")
                return told["result"]
            self.events.append(told)

    def close(self) -> None:
        self.socket.close()


class Tab:
    """One tab. `requests` are the addresses asked for, `problems` exceptions, console errors and refusals."""

    def __init__(self, client, address: str):
        self.connection = _Connection(client, address)
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params):
        """A command of the protocol."""
        return self.connection.call(method, **params)

    def view(self, width: int = 1200, height: int = 900, dark: bool = False, script: bool = True) -> None:
        """Size in CSS pixels, colour scheme, and whether scripts run."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setScriptExecutionDisabled", value=not script)

    def open(self, address: str) -> None:
        """Load a page, and wait until it has."""
        self.call("Page.navigate", url=address)
        self.wait_for_event("Page.loadEventFired")

    def wait_for_event(self, name: str) -> None:
        """Wait for an event of the protocol."""
        end = time.monotonic() + PATIENCE
        while not any(event.get("method") == name for event in self.connection.events):
            assert time.monotonic() < end, f"{name} did not come"
            self.connection.events.append(json.loads(self.connection.socket.recv()))

    def run(self, expression: str):
        """The value of a JavaScript expression."""
        told = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def wait(self, expression: str, patience: float = PATIENCE):
        """Wait until an expression is true, and return its value."""
        end = time.monotonic() + patience
        while not (value := self.run(expression)):
            assert time.monotonic() < end, f"never true: {expression}; {self.problems}"
            time.sleep(0.1)
        return value

    def move(self, selector: str, click: bool = False) -> None:
        """The pointer over the middle of an element, and a click."""
        self.run(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        place = self.run(
            f"(() => {{ const r = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        where = {"x": place[0], "y": place[1]}
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **where)
        if click:
            for kind in ("mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **where)

    def key(self, name: str, code: int) -> None:
        """Press a key, such as ("ArrowLeft", 37), in the element that has the focus."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)

    def screenshot(self, file: Path, whole: bool = True) -> Path:
        """A PNG of the whole page, or of what is in view."""
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(base64.b64decode(picture["data"]))
        return file

    def _told(self, name: str) -> list[dict]:
        return [event["params"] for event in self.connection.events if event.get("method") == name]

    @property
    def requests(self) -> list[str]:
        """Addresses that the page asked for, without those inside itself."""
        return [p["request"]["url"] for p in self._told(WHAT_LEFT[0]) if not p["request"]["url"].startswith("data:")]

    @property
    def problems(self) -> list[str]:
        """Uncaught exceptions, errors and warnings of the console, and what the browser logged (also refusals)."""
        found = [p["exceptionDetails"]["text"] for p in self._told(WHAT_LEFT[1])]
        found += [str(p["args"]) for p in self._told(WHAT_LEFT[2]) if p["type"] in ("error", "warning", "assert")]
        return found + [p["entry"]["text"] for p in self._told(WHAT_LEFT[3])]


def screenshots(fallback: Path) -> Path:
    """Where screenshots go: the folder named by MANTICORE_SCREENSHOTS, which CI keeps, or `fallback`."""
    return Path(os.environ.get("MANTICORE_SCREENSHOTS") or fallback)
