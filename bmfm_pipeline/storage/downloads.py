"""One file from the web, whole and verified: resumed after a cut, tried again, checked by sha256, renamed into place."""

import base64
import contextlib
import http.client
import json
import logging
import os
import random
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from bmfm_pipeline.errors import StorageError
from bmfm_pipeline.storage.files import disk_errors, write_json_atomic
from bmfm_pipeline.storage.hashing import hash_file
from bmfm_pipeline.storage.locks import exclusive_file
from bmfm_pipeline.storage.uris import strip_userinfo

logger = logging.getLogger(__name__)

SCHEMES = ("http", "https", "file")
BLOCK = 1 << 20
TIMEOUT = 60.0  # seconds without a byte
TRIES = 5  # in a row without a new byte
BACKOFF = 1.0  # seconds before the second try; doubled after each, at most MOST_WAIT
MOST_WAIT = 60.0
MOST_REDIRECTS = 5
ROOM_LEFT = 64 << 20  # bytes that stay free on the disk
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}

Progress = Callable[[int, int | None], None]


class _Transient(Exception):
    """A failure that another try may not meet; `wait` is what the server asked for, in seconds."""

    def __init__(self, message: str, wait: float = 0.0):
        super().__init__(message)
        self.wait = wait


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Few, to http or https only, and never from https to plain http."""

    max_redirections = MOST_REDIRECTS

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if urlsplit(req.full_url).scheme == "https" and urlsplit(newurl).scheme == "http":
            raise _not_followed(req.full_url, newurl, "plain http after https")
        if urlsplit(newurl).scheme not in ("http", "https"):
            raise _not_followed(req.full_url, newurl, "only http and https are")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _not_followed(before: str, after: str, why: str) -> StorageError:
    return StorageError(
        f"{strip_userinfo(before)}: redirects to {strip_userinfo(after)}, which is not followed ({why}); give the final address"
    )


def fetch(url: str, target: Path, *, sha256: str | None = None, on_progress: Progress | None = None) -> Path:
    """Download `url` (http, https or file) to `target` and return it; a verified `target` that is there already is kept.

    What arrives lies in `<target>.part` until it is whole: a cut connection, or a later call, goes on from there where the server
    offers ranges of the same version (ETag or Last-Modified), and starts again where it does not. Errors that may pass are
    tried again with growing pauses. Two processes that want one target download it once. Proxies of the environment are used.
    `on_progress(done, total)` is called with bytes; `total` is None while the server does not say it.

    Raises StorageError for an address that does not answer or does not exist, a full disk, or content whose sha256 is not
    `sha256`: that content is kept as `<target>.refused`.
    """
    target = Path(target)
    scheme = urlsplit(url).scheme.lower()
    if scheme not in SCHEMES:
        raise StorageError(
            f"{strip_userinfo(url)}: cannot be downloaded; use an address that begins with {', '.join(SCHEMES)}"
        )
    wanted = sha256.lower() if sha256 else None
    with exclusive_file(target, on_wait=logger.info):
        if target.exists():
            return _there_already(target, wanted, url)
        download = _Download(url, target, wanted, on_progress or (lambda done, total: None))
        with disk_errors(target):
            download.copy_local() if scheme == "file" else download.run()
            _verified(download, wanted)
            with open(download.part, "rb") as stream:
                os.fsync(stream.fileno())
            os.replace(download.part, target)
            download.note.unlink(missing_ok=True)
    return target


def _there_already(target: Path, wanted: str | None, url: str) -> Path:
    if wanted and (found := hash_file(target)) != wanted:
        raise StorageError(
            f"{target}: is there already with other content (sha256 {found}, expected {wanted}) and is not overwritten; "
            f"move it away and run again to fetch {strip_userinfo(url)}"
        )
    return target


def _verified(download: "_Download", wanted: str | None) -> None:
    if not wanted:
        return
    found = hash_file(download.part)
    if found != wanted and download.resumed:
        # The pieces may be of different versions: a server that cannot tell is given one chance to send all of it.
        logger.warning("%s: the pieces do not add up to the expected content; fetching it whole", download.name)
        download.discard()
        download.run()
        found = hash_file(download.part)
    if found == wanted:
        return
    refused = download.target.with_name(download.target.name + ".refused")
    size = download.part.stat().st_size
    os.replace(download.part, refused)
    download.note.unlink(missing_ok=True)
    raise StorageError(
        f"{download.name}: the content is not the expected one and was refused: sha256 {found}, expected {wanted} ({size:,} bytes, "
        f"kept as {refused}). A page of a proxy or a login may have come instead, or the file was changed at its source: look at it, "
        "then run again, name another mirror, or correct the checksum if you trust the new content"
    )


class _Download:
    def __init__(self, url: str, target: Path, wanted: str | None, on_progress: Progress):
        self.url, self.target, self.wanted, self.on_progress = url, target, wanted, on_progress
        self.name = strip_userinfo(url)
        self.part = target.with_name(target.name + ".part")
        self.note = target.with_name(target.name + ".part.json")  # which version the part is of
        self.resumed = False
        self._opener = urllib.request.build_opener(_Redirects)

    def discard(self) -> None:
        self.part.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)
        self.resumed = False

    def copy_local(self) -> None:
        source = Path(unquote(urlsplit(self.url).path))
        self.discard()
        if not source.is_file() or not os.access(source, os.R_OK):
            raise StorageError(f"{source}: no such file, or not readable; check the address {self.name}")
        self._check_room(source.stat().st_size)
        with open(source, "rb") as stream:
            self._append(stream, 0, source.stat().st_size)

    def run(self) -> None:
        """Fill the part file, however many tries it takes as long as bytes arrive."""
        failures = 0
        while True:
            before = self._have()
            try:
                return self._once()
            except _Transient as error:
                failures = 1 if self.resumed and self._have() > before else failures + 1
                if failures >= TRIES:
                    raise StorageError(
                        f"{self.name}: could not be downloaded after {TRIES} tries ({error}); check the network"
                        f"{_proxy_words()}, and run again: {self._have():,} bytes are kept and will not be fetched twice"
                    ) from None
                wait = max(min(error.wait, MOST_WAIT), min(BACKOFF * 2 ** (failures - 1), MOST_WAIT))
                logger.info("%s: %s; trying again in %.0f s", self.name, error, wait)
                time.sleep(wait * (1 + random.random() / 10))

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _validator(self) -> str | None:
        """ETag or date of the version that the part is of; None when it is of another address, or nothing is known."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            note = json.loads(self.note.read_text())
            if note.get("url") == self.name:
                return note.get("validator")
        return None

    def _once(self) -> None:
        have, validator = self._have(), self._validator()
        if have and not validator and not (self.wanted and self.note.exists()):
            self.discard()  # nothing would tell whether the rest is of the same version
            have = 0
        request = _request(self.url)
        if have:
            request.add_header("Range", f"bytes={have}-")
            if validator:
                request.add_header("If-Range", validator)
        try:
            with self._opener.open(request, timeout=TIMEOUT) as response:
                self._take(response, have)
        except urllib.error.HTTPError as error:
            with error:
                self._http_error(error, have)
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise StorageError(
                    f"{self.name}: its certificate cannot be verified ({error.reason.verify_message}); behind an inspecting proxy set "
                    "SSL_CERT_FILE to that proxy's certificates"
                ) from None
            raise _Transient(str(error.reason)) from None
        except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            raise _Transient(str(error) or type(error).__name__) from None

    def _http_error(self, error: urllib.error.HTTPError, have: int) -> None:
        if error.code == 416 and have:
            total = (error.headers.get("Content-Range") or "").rpartition("/")[2]
            if total == str(have):
                self.on_progress(have, have)
                return  # the part was whole already
            self.discard()
            raise _Transient("the file at its source is now shorter than what was fetched")
        if error.code in TRANSIENT:
            after = error.headers.get("Retry-After") or ""
            raise _Transient(f"HTTP {error.code} {error.reason}", float(after) if after.isdigit() else 0.0)
        if error.code in (301, 302, 303, 307, 308):
            leads_to = error.headers.get("Location") or ""
            if urlsplit(leads_to).scheme not in ("", "http", "https"):
                raise _not_followed(self.url, leads_to, "only http and https are")
            raise StorageError(
                f"{self.name}: more than {MOST_REDIRECTS} redirects, or one that leads back; give the final address"
            )
        cure = {
            401: "it needs a login: fetch it by hand",
            403: "access is refused: fetch it by hand, or name another mirror",
            404: "there is no such file: check the address, or name another mirror",
            407: f"the proxy wants a login{_proxy_words()}",
            410: "the file was removed: name another mirror",
        }.get(error.code, "name another mirror, or fetch it by hand")
        raise StorageError(f"{self.name}: HTTP {error.code} {error.reason}; {cure}")

    def _take(self, response, have: int) -> None:
        headers = response.headers
        length = headers.get("Content-Length")
        length = int(length) if length and length.isdigit() else None
        start = 0
        if response.status == 206:
            begins, _, total = (headers.get("Content-Range") or "").removeprefix("bytes ").partition("/")
            if begins.partition("-")[0].strip() != str(have):
                self.discard()
                raise _Transient(f"the server sent another range than bytes {have} and on")
            start = have
            length = int(total) - have if total.isdigit() else length
        if start:
            self.resumed = True
        else:
            self.discard()
            write_json_atomic(self.note, {"url": self.name, "validator": _version_of(headers)})
        total = None if length is None else start + length
        if total is not None:
            self._check_room(total - start)
        self._append(response, start, total)
        if total is not None and self._have() != total:
            raise _Transient(f"the connection was cut after {self._have():,} of {total:,} bytes")

    def _check_room(self, size: int) -> None:
        free = shutil.disk_usage(self.target.parent).free
        if size + ROOM_LEFT > free:
            raise StorageError(
                f"{self.target.parent}: {self.name} needs {_megabytes(size)} more, and only {_megabytes(free)} are free; free space, or "
                "choose another folder"
            )

    def _append(self, stream, start: int, total: int | None) -> None:
        done = start
        self.on_progress(done, total)
        with open(self.part, "ab" if start else "wb") as out:
            # read1 hands over what has come, so that nothing of a cut connection is lost.
            read = getattr(stream, "read1", stream.read)
            while True:
                try:
                    block = read(BLOCK)
                except OSError as error:  # of the network; those of the disk are another matter
                    raise _Transient(str(error) or type(error).__name__) from None
                if not block:
                    break
                out.write(block)
                done += len(block)
                self.on_progress(done, total)


def _version_of(headers) -> str | None:
    """What names this version of the file in If-Range; a weak ETag does not, for it stands for similar content."""
    tag = headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")


def _request(url: str) -> urllib.request.Request:
    parts = urlsplit(url)
    request = urllib.request.Request(
        urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, parts.query, "")),
        headers={"User-Agent": "bmfm-pipeline", "Accept-Encoding": "identity"},
    )
    if parts.username:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        # Not sent on to where a redirect leads.
        request.add_unredirected_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
    return request


def _proxy_words() -> str:
    proxies = {strip_userinfo(address) for name, address in urllib.request.getproxies().items() if name != "no"}
    return f" and the proxy {', '.join(sorted(proxies))}" if proxies else ""


def _megabytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
