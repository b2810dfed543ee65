"""Workspace and state: whether they can be written, locked and read back, how much room they have, and whether their clock agrees."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bmfm_pipeline.commands.checkup.findings import FAIL, OK, WARN, Finding
from bmfm_pipeline.errors import StorageError
from bmfm_pipeline.storage import Workspace, check_round_trip, strip_userinfo

GIB = 2**30
LITTLE_ROOM, TOO_LITTLE_ROOM = 20 * GIB, 2 * GIB
FEW_INODES = 100_000
# Ages decide what may be deleted and which lease has run out.
SKEW, TOO_MUCH_SKEW = 5.0, 120.0
# Where a lock of one machine may not hold on another, or a SQLite file be damaged.
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "lustre", "gpfs", "beegfs", "ceph", "glusterfs")
ELSEWHERE = "choose another place with --workspace or BMFM_WORKSPACE"


def check(workspace: Workspace) -> Iterator[Finding]:
    shown = strip_userinfo(workspace.uri)
    if workspace.remote:
        yield _remote(workspace, shown)
    else:
        yield _writable("workspace", Path(workspace.uri), shown)
        yield from _room("disk of the workspace", Path(workspace.uri))
    state = workspace.state_dir
    yield _writable("state", state, str(state))
    if workspace.remote or _device(state) != _device(Path(workspace.uri)):
        yield from _room("disk of the state", state)
    yield from _locks(state if workspace.remote else Path(workspace.uri))


def _remote(workspace: Workspace, shown: str) -> Finding:
    """An object is written, read back and deleted: an account that may not do one of these fails hours later otherwise."""
    began = time.monotonic()
    try:
        skew = check_round_trip(workspace.uri)
    except StorageError as error:
        return Finding(
            "workspace", FAIL, str(error), "see docs/s3.md: keys, endpoint, bucket and rights of the account"
        )
    if abs(skew) > SKEW:
        return skewed("workspace", f"the clock of {shown}", skew)
    took = time.monotonic() - began
    return Finding("workspace", OK, f"{shown}: an object was written, read back and deleted in {took:.1f} s")


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest one above that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _device(folder: Path) -> int:
    return _nearest(folder).stat().st_dev


def _writable(name: str, folder: Path, shown: str) -> Finding:
    """A file is written where the folder is or would be, and its time compared with this machine's."""
    near = _nearest(folder)
    if not near.is_dir():
        return Finding(name, FAIL, f"{shown}: {near} is a file", ELSEWHERE)
    try:
        with tempfile.NamedTemporaryFile(dir=near, prefix=".bmfm-check-") as probe:
            probe.write(b"x")
            probe.flush()
            os.fsync(probe.fileno())
            skew = os.fstat(probe.fileno()).st_mtime - time.time()
    except OSError as error:
        mend = f"`chown -R $USER {near}`, or {ELSEWHERE}" if isinstance(error, PermissionError) else ELSEWHERE
        return Finding(name, FAIL, f"{shown}: not writable ({error.strerror})", mend)
    if abs(skew) > SKEW:
        return skewed(name, f"the clock of the disk below {near}", skew)
    return Finding(name, OK, f"{shown}: writable" + ("" if folder.exists() else ", made by the first run"))


def skewed(name: str, whose: str, skew: float) -> Finding:
    status = FAIL if abs(skew) > TOO_MUCH_SKEW else WARN
    said = f"{whose} is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this machine's"
    return Finding(name, status, said, "set both by NTP: `timedatectl set-ntp true`")


def _room(name: str, folder: Path) -> Iterator[Finding]:
    near = _nearest(folder)
    free = shutil.disk_usage(near).free
    found = f"{free / GIB:,.1f} GiB free at {near}"
    mend = "`bmfm workspace gc --dry-run` shows what may go; or choose another place with --workspace"
    status = FAIL if free < TOO_LITTLE_ROOM else WARN if free < LITTLE_ROOM else OK
    yield Finding(name, status, found, "" if status == OK else mend)
    counted = os.statvfs(near)
    if counted.f_files and counted.f_favail < FEW_INODES:
        yield Finding(name, WARN, f"only {counted.f_favail:,} more files can be made at {near}", mend)


def _locks(folder: Path) -> Iterator[Finding]:
    """Two openings of one file: the second must not get the lock of the first."""
    near = _nearest(folder)
    kind = filesystem_of(near)
    mend = "keep workspace and state on a file system with locks (a local disk, or NFS 4), or the workspace on s3://"
    try:
        with tempfile.NamedTemporaryFile(dir=near, prefix=".bmfm-check-") as first, open(first.name) as second:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held = True
            else:
                held = False
    except OSError as error:
        # Where nothing can be written that is said already.
        if not isinstance(error, PermissionError | NotADirectoryError):
            yield Finding("locks", FAIL, f"{near} ({kind}): {error.strerror}", mend)
        return
    if not held:
        yield Finding("locks", FAIL, f"{near} ({kind}): a lock keeps nobody out", mend)
    elif kind in NETWORK:
        yield Finding(
            "locks", WARN, f"{near} is on {kind}: locks hold here; between machines they may not, and SQLite files do not bear it",
            "set BMFM_STATE to a folder of a local disk, and use a Prefect and an MLflow server for several machines",
        )  # fmt: skip
    else:
        yield Finding("locks", OK, f"hold at {near} ({kind})")


def filesystem_of(folder: Path) -> str:
    """The type of file system that `folder` lies on, as the kernel names it; 'unknown' where it does not say."""
    best, found = "", "unknown"
    try:
        mounts = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return found
    place = f"{folder.resolve()}/"
    for line in mounts:
        _, point, kind, *_ = line.split(" ")
        point = point.replace("\\040", " ").rstrip("/") + "/"
        if place.startswith(point) and len(point) >= len(best):
            best, found = point, kind
    return found
