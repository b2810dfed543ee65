"""An HTTP proxy before an S3 server that answers some requests with an error of its own, or late."""

import http.client
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ERROR = '<?xml version="1.0"?><Error><Code>{code}</Code><Message>We encountered an internal error.</Message></Error>'
CODES = {500: "InternalError", 503: "SlowDown"}


class FaultyS3:
    """`answer` gets the number of a request, from 1, and gives None (pass it on) or a status; `pause` seconds come before every answer."""

    def __init__(self, server, answer: Callable[[int], int | None] = lambda number: None, pause: float = 0.0):
        self.answer, self.pause = answer, pause
        self.requests = self.refused = 0
        self._lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self) -> None:
                body = self._body()
                with outer._lock:
                    outer.requests += 1
                    status = outer.answer(outer.requests)
                    outer.refused += status is not None
                time.sleep(outer.pause)
                if status is not None:
                    self._send(status, [("Content-Type", "application/xml")], ERROR.format(code=CODES[status]).encode())
                    return
                connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
                try:
                    headers = {name: value for name, value in self.headers.items() if name.lower() not in SKIPPED}
                    connection.request(self.command, self.path, body, headers)
                    found = connection.getresponse()
                    length = found.getheader("Content-Length") if self.command == "HEAD" else None
                    kept = [(name, value) for name, value in found.getheaders() if name.lower() not in SKIPPED]
                    self._send(found.status, kept, found.read(), length)
                finally:
                    connection.close()

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_one

            def _body(self) -> bytes:
                if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            def _send(self, status: int, headers: list, body: bytes, length: str | None = None) -> None:
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", length or str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, *words) -> None:
                """Nothing is printed."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> "FaultyS3":
        return self

    def __exit__(self, *error) -> None:
        self._server.shutdown()
        self._server.server_close()


SKIPPED = {"content-length", "transfer-encoding", "connection", "date", "server", "expect"}
