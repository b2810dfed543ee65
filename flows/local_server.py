"""The Prefect server of one run on one machine: it keeps to itself when Ctrl-C is pressed, and ends with whoever started it.

Prefect's own temporary server belongs to the terminal's foreground processes. Ctrl-C ends it together with the run, which then waits in
vain to say how it ended; and nothing ends it when the run is killed. Imports Prefect in the server's process only.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

from bmfm_pipeline.errors import PipelineError
from bmfm_pipeline.storage import exclusive

HOST = "127.0.0.1"
START_SECONDS = 120.0
# Runs use no blocks, and registering them takes seconds; the server of the pages does, for it finds no note that this one has.
WITHOUT_BLOCKS = {"PREFECT_API_BLOCKS_REGISTER_ON_START": "false", "PREFECT_MEMOIZE_BLOCK_AUTO_REGISTRATION": "false"}


class LocalServer:
    """A server over the database in `home`. It starts at once; `wait` until it answers."""

    def __init__(self, home: Path):
        self._starting = contextlib.ExitStack()  # two that start together would both make the database
        self._starting.enter_context(exclusive(home))
        self.log = home / "server.log"
        self.log.write_bytes(b"")
        self.address = f"http://{HOST}:{_free_port()}"
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "flows.local_server", self.address.rsplit(":", 1)[1]],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | WITHOUT_BLOCKS,
            )

    def wait(self) -> None:
        """Return once the server answers; PipelineError with its last lines when it does not."""
        with self._starting:
            self._wait()

    def _wait(self) -> None:
        opener = build_opener(ProxyHandler({}))  # a proxy has no way to this machine's loopback
        until = time.monotonic() + START_SECONDS
        while self._process.poll() is None and time.monotonic() < until:
            try:
                opener.open(f"{self.address}/api/health", timeout=10).close()
                return
            except OSError:  # URLError and HTTPError too
                time.sleep(0.1)
        self.stop()
        lines = "\n".join(self.log.read_text(errors="replace").splitlines()[-10:])
        raise PipelineError(
            f"Prefect's server did not start within {START_SECONDS:.0f} s or ended by itself; its last lines "
            f"(all in {self.log}):\n{lines}"
        )

    def stop(self) -> None:
        self._starting.close()
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main(port: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import uvicorn
    from prefect.server.api.server import create_app

    application = create_app(ephemeral=True, final=True)
    uvicorn.run(application, host=HOST, port=port, log_level="error", lifespan="on")


if __name__ == "__main__":
    main(int(sys.argv[1]))
