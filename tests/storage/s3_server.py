"""A real S3 server on loopback, and a TCP proxy before it that counts, slows and cuts what passes."""

import contextlib
import logging
import socket
import threading
import time
import urllib.request
import uuid


class S3Server:
    """moto's server in a thread of this process."""

    def __init__(self):
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        self.host, self.port = self._server.get_host_and_port()
        self.endpoint = f"http://{self.host}:{self.port}"

    def stop(self) -> None:
        self._server.stop()

    @contextlib.contextmanager
    def checking_credentials(self):
        """Unknown keys are refused meanwhile; by default any key is accepted."""
        self._allow_without(0)
        try:
            yield
        finally:
            self._allow_without(float("inf"))

    def _allow_without(self, requests: float) -> None:
        address = f"{self.endpoint}/moto-api/reset-auth"
        headers = {"Content-Type": "application/octet-stream"}
        urllib.request.urlopen(urllib.request.Request(address, str(requests).encode(), headers)).read()


class Bucket:
    """A bucket of its own on the server, and the environment that leads there."""

    def __init__(self, server: S3Server, monkeypatch):
        import boto3

        self.server, self.name = server, f"cells-{uuid.uuid4().hex[:12]}"
        self.uri, self._patch = f"s3://{self.name}", monkeypatch
        for variable in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
            monkeypatch.delenv(variable, raising=False)
        self.environment = {
            "AWS_ENDPOINT_URL_S3": server.endpoint,
            "AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST",
            "AWS_SECRET_ACCESS_KEY": "very-secret-very-secret-very-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        for variable, value in self.environment.items():
            monkeypatch.setenv(variable, value)
        self.client = boto3.client("s3", endpoint_url=server.endpoint)
        self.client.create_bucket(Bucket=self.name)

    def put(self, key: str, body: bytes) -> str:
        self.client.put_object(Bucket=self.name, Key=key, Body=body)
        return f"{self.uri}/{key}"

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket=self.name, Key=key)["Body"].read()

    def keys(self) -> list[str]:
        found = self.client.list_objects_v2(Bucket=self.name)
        return [entry["Key"] for entry in found.get("Contents", [])]

    def through(self, proxy: "Proxy") -> None:
        """Send every request of this process, and of processes it starts, through the proxy."""
        self._patch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)

    def directly(self) -> None:
        self._patch.setenv("AWS_ENDPOINT_URL_S3", self.server.endpoint)


class Proxy:
    """Passes TCP streams on to the server.

    cut_after: bytes of answers after which a connection is closed; cuts: for how many connections. limit: bytes of answers in all
    after which nothing passes any more. pause: seconds to wait before every 64 kB of answers. `passed` counts bytes of answers.
    """

    def __init__(self, server: S3Server, cut_after=None, cuts: int = 0, limit=float("inf"), pause: float = 0.0):
        self.cut_after, self.cuts, self.limit, self.pause = cut_after, cuts, limit, pause
        self.passed = self.cut = 0
        self._target, self._open = (server.host, server.port), True
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *error) -> None:
        self._open = False
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while self._open:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                threading.Thread(target=self._pass, args=(client, server, False), daemon=True).start()
                threading.Thread(target=self._pass, args=(server, client, True), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        sent = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if answers:
                    if self.cut_after is not None and sent + len(data) > self.cut_after and self._may_cut():
                        target.sendall(data[: self.cut_after - sent])
                        break
                    time.sleep(self.pause)
                    with self._lock:
                        self.passed += len(data)
                    if self.passed > self.limit:
                        break
                target.sendall(data)
                sent += len(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _may_cut(self) -> bool:
        with self._lock:
            if self.cut >= self.cuts:
                return False
            self.cut += 1
            return True
