"""One remote object into a local file, in ranged parts: a transfer that was killed goes on where it stopped."""

import hashlib
import json
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bmfm_pipeline.errors import StorageError
from bmfm_pipeline.storage.files import disk_errors, write_json_atomic
from bmfm_pipeline.storage.hashing import hash_file
from bmfm_pipeline.storage.remote import RemoteObject, attempt, describe, filesystem
from bmfm_pipeline.storage.uris import strip_userinfo

logger = logging.getLogger(__name__)
PART_SIZE = 16 << 20
_AT_ONCE = 4
_MIB = 1 << 20
PARTS = ".parts.json"


class ObjectChanged(Exception):
    """The object is no longer the one whose transfer began."""


def is_whole(target: Path) -> bool:
    """Whether `fetch_object` finished with `target`."""
    return target.exists() and not target.with_name(target.name + PARTS).exists()


def fetch_object(item: RemoteObject, target: Path, sha256: str | None = None) -> None:
    """Fetch `item` to `target`, checked by size and by sha256 or ETag where those tell.

    Parts that an earlier attempt fetched are kept in `target` and listed in `target`.parts.json, whose removal is the last step.
    Raises ObjectChanged when another version lies there now, RemoteError when the store cannot be reached, StorageError when the
    bytes are not those that were announced, twice.
    """
    state = target.with_name(target.name + PARTS)
    for again in (False, True):
        _fetch_parts(item, target, state)
        if _is_right(item, target, sha256):
            state.unlink()
            return
        state.write_text("{}")
        target.unlink()
        now = describe(item.uri)
        if now is None or (now.size, now.etag) != (item.size, item.etag):
            raise ObjectChanged(item.uri)
        if not again:
            logger.warning("%s: the bytes that came are not those announced; fetched anew", strip_userinfo(item.uri))
    raise StorageError(
        f"{strip_userinfo(item.uri)}: the bytes do not match their {'sha256' if sha256 else 'ETag'}, twice; the object is damaged. "
        "Delete it and make or upload it again"
    )


def _parts_done(item: RemoteObject, target: Path, state: Path) -> set[int]:
    """Numbers of the parts that are in `target` already."""
    try:
        stored = json.loads(state.read_text())
        same = (stored["etag"], stored["size"], stored["part_size"]) == (item.etag, item.size, PART_SIZE)
        return set(stored["done"]) if same and target.stat().st_size == item.size else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _fetch_parts(item: RemoteObject, target: Path, state: Path) -> None:
    fs, path = filesystem(item.uri)
    with disk_errors(target, "BMFM_CACHE_DIR"):
        target.parent.mkdir(parents=True, exist_ok=True)
        done = _parts_done(item, target, state)
        parts = [number for number in range(-(-item.size // PART_SIZE)) if number not in done]
        if done:
            logger.info(
                "%s: goes on, %d of %d parts are here", strip_userinfo(item.uri), len(done), len(done) + len(parts)
            )

        def note() -> None:
            noted = {"etag": item.etag, "size": item.size, "part_size": PART_SIZE, "done": sorted(done)}
            write_json_atomic(state, noted)

        note()  # before the file itself: a file without a list of parts is complete
        handle = os.open(target, os.O_RDWR | os.O_CREAT, 0o666)
        lock, stop = threading.Lock(), threading.Event()

        def fetch(number: int) -> None:
            if stop.is_set():
                return
            start = number * PART_SIZE
            end = min(item.size, start + PART_SIZE)
            try:
                _write_at(handle, attempt(item.uri, lambda: _read_range(fs, path, start, end)), start)
                os.fdatasync(handle)
                with lock:
                    done.add(number)
                    note()
            except BaseException:
                stop.set()
                raise

        try:
            os.ftruncate(handle, item.size)
            with ThreadPoolExecutor(min(_AT_ONCE, max(1, len(parts)))) as pool:
                for result in [pool.submit(fetch, number) for number in parts]:
                    result.result()
        except FileNotFoundError:
            raise ObjectChanged(item.uri) from None
        finally:
            os.close(handle)


def _read_range(fs, path: str, start: int, end: int) -> bytes:
    try:
        data = fs.cat_file(path, start=start, end=end)
    except OSError as error:
        if "InvalidRange" in str(error) or "not satisfiable" in str(error):  # it became shorter
            raise FileNotFoundError(path) from error
        raise
    if len(data) != end - start:
        raise ConnectionError(f"{len(data)} of {end - start} bytes came")
    return data


def _write_at(handle: int, data: bytes, start: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(handle, view, start)
        view, start = view[written:], start + written


def _is_right(item: RemoteObject, path: Path, sha256: str | None) -> bool:
    if path.stat().st_size != item.size:
        return False
    if sha256 is not None:
        return hash_file(path) == sha256
    if etag_fits(path, item.etag) is not False or _etag_is_no_hash(item.uri):
        now = describe(item.uri)  # an object that changed half-way has parts of two versions
        return now is not None and (now.size, now.etag) == (item.size, item.etag)
    return False


def etag_fits(path: Path, etag: str) -> bool | None:
    """Whether a local file has this ETag; None when the ETag does not tell (encrypted, or parts of unknown size)."""
    base, _, count = etag.partition("-")
    if len(base) != 32 or not set(base) <= set("0123456789abcdef"):
        return None
    if not count:
        return _md5(path) == base
    size = path.stat().st_size
    for part in (mib * _MIB for mib in (5, 8, 10, 15, 16, 25, 32, 50, 64, 100, 128, 256, 512)):
        if str(-(-size // part)) == count and f"{_md5_of_parts(path, part)}-{count}" == etag:
            return True
    return None


def _md5(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _md5_of_parts(path: Path, part: int) -> str:
    """The MD5 of the MD5s of the parts, as S3 makes ETags of large objects."""
    whole = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as stream:
        while True:
            digest, left = hashlib.md5(usedforsecurity=False), part
            while left and (block := stream.read(min(_MIB, left))):
                digest.update(block)
                left -= len(block)
            if left == part:
                return whole.hexdigest()
            whole.update(digest.digest())


def _etag_is_no_hash(uri: str) -> bool:
    """Objects encrypted with a customer's or a KMS key have ETags that are no MD5."""
    if not uri.startswith("s3://"):
        return True
    fs, path = filesystem(uri)
    bucket, key, _ = fs.split_path(path)
    head = attempt(uri, lambda: fs.call_s3("head_object", Bucket=bucket, Key=key))
    return head.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in head
