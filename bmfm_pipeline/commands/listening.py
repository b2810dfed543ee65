"""Who listens at an address of this machine, and what it answers."""

import contextlib
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, build_opener

HOST = "127.0.0.1"
LOOPBACK = (HOST, "localhost", "::1")
SECONDS = 10.0
_LISTEN = "0A"  # the state in /proc/net/tcp
_MOST_BYTES = 4_000_000


@dataclass(frozen=True)
class Answer:
    """What an address answered: its text, and whether anything of HTTP answered at all; `date` is the clock of its server."""

    text: str = ""
    answered: bool = False
    date: str | None = None

    @property
    def json(self) -> Any:
        """The text as JSON; None where it is none."""
        try:
            return json.loads(self.text)
        except ValueError:
            return None


def ask(url: str, seconds: float = SECONDS) -> Answer:
    """GET `url`; an empty answer where nothing comes. A proxy has no way to this machine's loopback, and is not asked about it."""
    opener = build_opener(ProxyHandler({})) if urlsplit(url).hostname in LOOPBACK else build_opener()
    try:
        with opener.open(url, timeout=seconds) as answer:
            text = answer.read(_MOST_BYTES).decode(errors="replace").strip()
            return Answer(text, True, answer.headers.get("Date"))
    except HTTPError as error:
        error.close()
        return Answer(answered=True, date=error.headers.get("Date"))
    except (OSError, ValueError):  # refused, silent, or not HTTP at all
        return Answer()


def is_taken(port: int) -> bool:
    """Whether somebody listens at `port` of this machine's loopback."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return True
    return False


def listener_of(port: int) -> str:
    """'process 4711 (python -m http.server)' that listens at `port`; '' where the kernel does not tell, as of another user's."""
    with contextlib.suppress(OSError):
        sockets = {
            fields[9]
            for table in ("tcp", "tcp6")
            for fields in map(str.split, Path(f"/proc/net/{table}").read_text().splitlines()[1:])
            if fields[3] == _LISTEN and int(fields[1].rsplit(":", 1)[1], 16) == port
        }
        wanted = {f"socket:[{inode}]" for inode in sockets}
        for process in Path("/proc").iterdir():
            if not process.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                if any(os.readlink(link) in wanted for link in (process / "fd").iterdir()):
                    words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
                    return f"process {process.name} ({' '.join(words).strip()[:120]})"
    return ""
