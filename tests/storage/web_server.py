"""A web server on this machine that behaves, or misbehaves, as it is told."""

import contextlib
import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Served:
    """One path: its content and how it is served."""

    content: bytes = b""
    ranges: bool = True
    validator: dict[str, str] = field(default_factory=lambda: {"ETag": '"1"'})
    length: bool = True
    statuses: list[int] = field(default_factory=list)  # answered first, one a request
    cuts: list[int] = field(default_factory=list)  # the connection is cut after so many bytes, one a request
    redirect: str | None = None
    retry_after: str | None = None
    before: object = None  # called with each request's headers


class Site:
    """`site.pages[path] = Served(...)`; `site.asked` lists (path, Range header) of every request."""

    def __init__(self) -> None:
        self.pages: dict[str, Served] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.address = ""

    def put(self, path: str, content: bytes = b"", **how) -> str:
        self.pages[path] = Served(content, **how)
        return f"{self.address}{path}"


class _Handler(http.server.BaseHTTPRequestHandler):
    site: Site

    def log_message(self, *words) -> None:
        pass

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.site.asked.append((self.path, asked))
        page = self.site.pages.get(self.path)
        if page is None:
            return self._empty(404)
        if page.before:
            page.before(self.headers)
        if page.redirect:
            return self._empty(302, Location=page.redirect)
        if page.statuses:
            return self._empty(page.statuses.pop(0), **({"Retry-After": page.retry_after} if page.retry_after else {}))
        self._send(page, asked)

    def _empty(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, page: Served, asked: str | None) -> None:
        start, status = 0, 200
        same = self.headers.get("If-Range") in (None, *page.validator.values())
        if asked and page.ranges and same:
            start, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
        if start >= len(page.content) > 0:
            return self._empty(416, **{"Content-Range": f"bytes */{len(page.content)}"})
        body = page.content[start:]
        self.send_response(status)
        for name, value in page.validator.items():
            self.send_header(name, value)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(page.content) - 1}/{len(page.content)}")
        if page.length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: page.cuts.pop(0)] if page.cuts else body)
        self.wfile.flush()
        self.close_connection = True


@contextlib.contextmanager
def serving() -> Iterator[Site]:
    site = Site()
    handler = type("Handler", (_Handler,), {"site": site})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    site.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
