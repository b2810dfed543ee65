"""Headless Chromium over its DevTools protocol: one process for many pages."""

import base64
import itertools
import json
import shutil
import subprocess
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions")  # fmt: skip
WAIT = 30


class Browser:
    """`open` a file, then ask the page with `evaluate`; what it said and asked for is in `said` and `requests`."""

    def __init__(self, folder: Path):
        from websockets.sync.client import connect

        self.process = subprocess.Popen(
            [CHROMIUM, *OPTIONS, "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        address = next(line.split()[-1] for line in self.process.stderr if line.startswith("DevTools listening on"))
        self.socket = connect(address, max_size=None)
        self.numbers, self.tab = itertools.count(1), None
        self.said, self.requests, self.loaded = [], [], False
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.tab = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def close(self) -> None:
        try:
            self.tab = None
            self.ask("Browser.close")
            self.socket.close()
            self.process.wait(WAIT)
        finally:
            self.process.kill()  # whatever went wrong, none stays behind
            self.process.stderr.close()

    def ask(self, method: str, **parameters):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        self.socket.send(json.dumps(message | ({"sessionId": self.tab} if self.tab else {})))
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def _receive(self) -> dict:
        message = json.loads(self.socket.recv(timeout=WAIT))
        method, values = message.get("method"), message.get("params", {})
        if method == "Runtime.consoleAPICalled":
            self.said.append(" ".join(str(part.get("value", "")) for part in values["args"]))
        elif method == "Runtime.exceptionThrown":
            self.said.append(values["exceptionDetails"]["text"])
        elif method == "Log.entryAdded":
            self.said.append(values["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])
        elif method == "Page.loadEventFired":
            self.loaded = True
        return message

    def open(self, file: Path, width: int = 1280, height: int = 900, scheme: str = "light", media: str = "") -> None:
        self.said.clear()
        self.requests.clear()
        self.loaded = False
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 700,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.ask("Emulation.setEmulatedMedia", media=media, features=features)
        self.ask("Page.navigate", url=Path(file).as_uri())
        while not self.loaded:
            self._receive()

    def evaluate(self, expression: str):
        """The value of a JavaScript expression in the page."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self, file: Path, whole: bool = True) -> None:
        picture = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        Path(file).write_bytes(base64.b64decode(picture["data"]))
