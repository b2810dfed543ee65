"""Where artefacts, runs and state lie: one workspace, local or on s3."""

import os
import tempfile
from pathlib import Path

from bmfm_pipeline.errors import StorageError
from bmfm_pipeline.storage.hashing import ContentMemo
from bmfm_pipeline.storage.remote import check_writable
from bmfm_pipeline.storage.roots import check_allowed
from bmfm_pipeline.storage.uris import is_remote, join_uri, local_path

DEFAULT_WORKSPACE = "workspace"


class Workspace:
    """A place with `artefacts/<stage>/<key>/` (published, immutable) and `runs/<key>/` (work in progress, local scratch).

    `uri` is a local folder or an s3:// prefix; None means $BMFM_WORKSPACE, else ./workspace. State that is not an artefact
    (MLflow store, content hashes, Prefect's database) lies under $BMFM_STATE, by default `<workspace>.state` beside a local one.
    """

    def __init__(self, uri: str | os.PathLike | None = None):
        chosen = str(uri or os.environ.get("BMFM_WORKSPACE") or DEFAULT_WORKSPACE)
        self.remote = is_remote(chosen)
        self.uri = chosen.rstrip("/") if self.remote else str(local_path(chosen))
        check_allowed(self.uri, "the workspace")

    def __repr__(self) -> str:
        return f"Workspace({self.uri!r})"

    @property
    def state_dir(self) -> Path:
        if chosen := os.environ.get("BMFM_STATE"):
            return local_path(chosen)
        if self.remote:
            return Path.home() / ".local" / "state" / "bmfm"
        return Path(self.uri + ".state")

    @property
    def memo(self) -> ContentMemo:
        return ContentMemo(self.state_dir / "content-hashes.sqlite")

    def artefact_uri(self, stage: str, key: str) -> str:
        return join_uri(self.uri, "artefacts", stage, key)

    def run_dir(self, key: str) -> Path:
        """Local scratch of one run; beside the artefacts when the workspace is local, so that publishing is a rename."""
        base = self.state_dir if self.remote else Path(self.uri)
        return base / "runs" / key

    def shared_run_uri(self, key: str) -> str | None:
        """Where a remote workspace keeps a copy of that scratch, for other machines; None for a local one, which is seen as it is."""
        return join_uri(self.uri, "runs", key) if self.remote else None

    def check_writable(self) -> None:
        """Fail before work starts, not after hours of it."""
        if self.remote:
            check_writable(self.uri)
        folders = [self.state_dir] if self.remote else [Path(self.uri), self.state_dir]
        for folder in folders:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass
            except OSError as error:
                raise StorageError(
                    f"workspace {folder}: not writable ({error.strerror}); choose another place with --workspace or BMFM_WORKSPACE"
                ) from error
