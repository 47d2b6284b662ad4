"""A headless Chromium for tests: what a page asks for, says and paints, with real clicks and keys.

Speaks the DevTools protocol over ``--remote-debugging-pipe``: Chromium reads commands from file descriptor 3 and writes
answers and events to 4, as JSON objects that end with a NUL. So no port is open and no package is needed.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import re
import select
import shutil
import signal
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

FLAGS = (
    "--headless",
    "--no-sandbox",  # it does not start as root without
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)
NAMES = ("chromium", "chromium-headless-shell")
PATIENCE = 30.0  # seconds for an answer
HEIGHT = 800  # pixels
PAINTED = """new Promise(done => new PerformanceObserver(list => {
  for (const entry of list.getEntriesByName("first-contentful-paint")) done(entry.startTime);
}).observe({type: "paint", buffered: true}))"""
KEYS = {"Enter": (13, "\r"), "Tab": (9, ""), "Escape": (27, "")}

Event = dict[str, Any]
T = TypeVar("T")


class BrowserError(AssertionError):
    """Chromium did not start, did not answer, or refused a command."""


def find_chromium() -> str | None:
    """The program: what ``$CHROMIUM`` names, or the Debian packages' one."""
    names = [os.environ.get("CHROMIUM") or "", *NAMES]
    return next((found for name in names if name and (found := shutil.which(name))), None)


class Browser:
    """One running Chromium with a profile of its own, which goes with it; use it in ``with``."""

    def __init__(self, binary: str) -> None:
        self._binary, self._buffer, self._number = binary, b"", 0
        self.events: dict[str, list[Event]] = defaultdict(list)  # by session of a page, in order

    def __enter__(self) -> Browser:
        self._folder = tempfile.TemporaryDirectory(prefix="qexport-chromium-", ignore_cleanup_errors=True)
        self._log = Path(self._folder.name) / "log.txt"
        (theirs_in, self._out), (self._in, theirs_out) = os.pipe(), os.pipe()
        moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (theirs_in, theirs_out)]  # clear of 3 and 4
        command = [self._binary, *FLAGS, f"--user-data-dir={self._folder.name}/profile", "about:blank"]
        try:
            self._child = os.posix_spawn(
                self._binary,
                command,
                {**os.environ, "HOME": self._folder.name},
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 1, str(self._log), os.O_WRONLY | os.O_CREAT, 0o600),
                    (os.POSIX_SPAWN_DUP2, 1, 2),
                    (os.POSIX_SPAWN_DUP2, moved[0], 3),
                    (os.POSIX_SPAWN_DUP2, moved[1], 4),
                ],
                setpgroup=0,
            )
        finally:
            for end in (theirs_in, theirs_out, *moved):
                os.close(end)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrowserError, OSError):
            self.call("Browser.close")
        deadline = time.monotonic() + 5
        while not (gone := os.waitpid(self._child, os.WNOHANG)[0]) and time.monotonic() < deadline:
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child, signal.SIGKILL)  # helpers that outlived it, or all of it
        if not gone:
            os.waitpid(self._child, 0)
        os.close(self._in)
        os.close(self._out)
        self._folder.cleanup()

    @contextlib.contextmanager
    def open(self, path: Path, *, dark: bool = False, media: str = "", width: int = 1280) -> Iterator[Page]:
        """A loaded page; ``path`` is a file, ``width`` is in pixels.

        Events are recorded from before the navigation, so no request or message is missed.
        """
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        try:
            for domain in ("Page", "Network", "Runtime", "Log"):
                page.call(f"{domain}.enable")
            page.call("Page.setLifecycleEventsEnabled", enabled=True)
            page.resize(width)
            page.emulate(dark=dark, media=media)
            page.navigate(path.resolve().as_uri())
            yield page
        finally:
            self.call("Target.closeTarget", targetId=target)

    def call(self, method: str, session: str = "", **parameters: object) -> dict[str, Any]:
        """Send a command and return its result; events that come before it are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        data = json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0"
        try:
            while data:
                data = data[os.write(self._out, data) :]
        except BrokenPipeError as error:
            raise BrowserError(f"Chromium ended before {method}; {self._told()}") from error
        deadline = time.monotonic() + PATIENCE
        while (answer := self._receive(deadline, method)).get("id") != self._number:
            self.events[answer.get("sessionId", "")].append(answer)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    def wait(self, what: str, found: Callable[[], T | None]) -> T:
        """Take events in until ``found`` gives something."""
        deadline = time.monotonic() + PATIENCE
        while (value := found()) is None:
            event = self._receive(deadline, what)
            self.events[event.get("sessionId", "")].append(event)
        return value

    def _receive(self, deadline: float, what: str) -> dict[str, Any]:
        ready = select.poll()
        ready.register(self._in, select.POLLIN)
        while b"\0" not in self._buffer:
            if not ready.poll(max(0, 1000 * (deadline - time.monotonic()))):
                raise BrowserError(f"no answer to {what} in {PATIENCE:.0f} s; {self._told()}")
            if not (piece := os.read(self._in, 1 << 20)):
                raise BrowserError(f"Chromium ended before it answered {what}; {self._told()}")
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def _told(self) -> str:
        return f"it said: {self._log.read_text(errors='replace')[-2000:] or 'nothing'}"


class Page:
    """A page in a browser."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self._frame = self._loader = ""

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """Send a command of the protocol to this page."""
        return self._browser.call(method, self._session, **parameters)

    def navigate(self, url: str) -> None:
        """Load, and wait until the page's load event and until it was painted."""
        told = self.call("Page.navigate", url=url)
        if problem := told.get("errorText"):
            raise BrowserError(f"{url}: {problem}")
        self._frame, self._loader = told["frameId"], told["loaderId"]
        self._browser.wait("load", lambda: self.moment("load"))
        self.frames()

    def resize(self, width: int, height: int = HEIGHT) -> None:
        """Set the size of what is seen, in pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def emulate(self, *, dark: bool = False, media: str = "") -> None:
        """Set what the reader prefers, and ``media`` such as print."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[feature])

    def frames(self) -> None:
        """Wait until what was changed is on the screen."""
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def settle(self) -> None:
        """Wait until the page has asked for nothing for half a second."""
        self._browser.wait("networkIdle", lambda: self.moment("networkIdle"))
        self.frames()

    def evaluate(self, script: str) -> Any:
        """The value of an expression, as JSON has it; promises are awaited."""
        told = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if problem := told.get("exceptionDetails"):
            raise BrowserError(f"{script}: {problem.get('exception', {}).get('description', problem['text'])}")
        return told["result"].get("value")

    def named(self, method: str) -> list[Event]:
        """Parameters of all events of a kind so far."""
        found = self._browser.events[self._session]
        return [event["params"] for event in found if event["method"] == method]

    @property
    def requests(self) -> list[str]:
        """Addresses that were asked for, the page's own first; those inside the page (``data:``) do not count."""
        found = [event["request"]["url"] for event in self.named("Network.requestWillBeSent")]
        return [url for url in found if not url.startswith("data:")]

    @property
    def console(self) -> list[str]:
        """Everything the console got: messages, exceptions nobody caught, what was blocked."""
        said = [
            " ".join(str(part.get("value", part.get("description", ""))) for part in event["args"])
            for event in self.named("Runtime.consoleAPICalled")
        ]
        thrown = [event["exceptionDetails"] for event in self.named("Runtime.exceptionThrown")]
        said += [details.get("exception", {}).get("description") or details["text"] for details in thrown]
        return said + [event["entry"]["text"] for event in self.named("Log.entryAdded")]

    def moment(self, name: str) -> float | None:
        """When a step of this page's life was reached, such as ``init`` or ``load``, in seconds of some clock."""
        for event in self.named("Page.lifecycleEvent"):
            if (event["frameId"], event["loaderId"], event["name"]) == (self._frame, self._loader, name):
                return float(event["timestamp"])
        return None

    @property
    def first_paint(self) -> float:
        """Seconds from the start of the navigation to the first text or picture on the screen."""
        return float(self.evaluate(PAINTED)) / 1000

    def screenshot(self) -> bytes:
        """What is seen, as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"])

    def point(self, selector: str) -> tuple[float, float]:
        """The middle of the first element of a selector, after scrolling there."""
        found = self.evaluate(
            f"""(() => {{ const element = document.querySelector({json.dumps(selector)});
            if (!element) return null;
            element.scrollIntoView({{block: "center", behavior: "instant"}});
            const box = element.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2] }})()"""
        )
        if found is None:
            raise BrowserError(f"nothing is called {selector}")
        return found[0], found[1]

    def hover(self, selector: str) -> None:
        """Move the mouse onto an element."""
        x, y = self.point(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.frames()

    def click(self, selector: str) -> None:
        """Click the middle of an element, whatever lies on top there."""
        x, y = self.point(selector)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)
        self.frames()

    def type(self, text: str) -> None:
        """Put text where the cursor is."""
        self.call("Input.insertText", text=text)
        self.frames()

    def press(self, key: str) -> None:
        """Press a key of ``KEYS``."""
        code, text = KEYS[key]
        what = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", **what, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **what)
        self.frames()


def sheets(pdf: bytes) -> int:
    """Pages of a PDF that Chromium wrote."""
    return len(re.findall(rb"/Type\s*/Page\b(?!s)", pdf))
