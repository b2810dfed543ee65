"""Repositories of the Hugging Face hub by name: `org/name`, `org/name@revision`, `hf://org/name@revision`.

HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN mean what they mean to huggingface_hub; a token never enters a message.
"""

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bmfm_pipeline.errors import CheckpointError, StorageError
from bmfm_pipeline.storage.uris import strip_userinfo

log = logging.getLogger(__name__)
_SCHEME = "hf://"
_NAME = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w][\w./-]*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# What a model folder is made of; other files of a repository are not fetched.
SETTINGS = ("*.json", "README.md")
TOKENIZERS = "tokenizers*/**"
FOLDER_FILES = (*SETTINGS, "model*.safetensors", TOKENIZERS, "gene_tables/**")


@dataclass(frozen=True)
class HubName:
    """A repository, and a branch, tag or commit of it."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{_SCHEME}{self.repository}" + (f"@{self.revision}" if self.revision else "")


def read_hub_name(text: str) -> HubName | None:
    """`text` as the name of a repository; None where it is a path: it says so, ends in .ckpt, or something lies there.

    A local folder of the same name wins, and that is said. Raises CheckpointError for an hf:// address that is no name.
    """
    bare = text.removeprefix(_SCHEME)
    found = _NAME.fullmatch(bare)
    if text.startswith(_SCHEME):
        if found is None:
            raise CheckpointError(f"{text}: is no repository; write hf://org/name or hf://org/name@revision")
    elif found is None or text.endswith((".ckpt", ".safetensors")):
        return None
    elif Path(text).exists():
        log.warning(
            "%s: is taken for the folder of that name here; for the repository of the hub write hf://%s", text, text
        )
        return None
    return HubName(found["repository"], found["revision"])


def resolve_commit(name: HubName) -> HubName:
    """The same repository at a commit. Without a connection it is the one fetched last, and that is said.

    Raises CheckpointError when there is no such repository, StorageError when the hub cannot be reached.
    """
    if name.revision and _COMMIT.fullmatch(name.revision):
        return name
    from huggingface_hub import HfApi

    try:
        with _readable(name):
            HfApi(endpoint=_endpoint()).model_info(name.repository, revision=name.revision, timeout=30)
    except StorageError as error:
        with contextlib.suppress(StorageError):
            folder = _download(name, SETTINGS, local_files_only=True)
            log.warning("%s; its commit %s is used, which was fetched before", error, folder.name[:12])
            return HubName(name.repository, folder.name)
        raise
    return HubName(name.repository, _download(name, SETTINGS).name)


def fetch_repository(name: HubName) -> Path:
    """The files of a model in a repository, in the cache of huggingface_hub: safetensors with their settings, else the first .ckpt by
    name with its tokenizers.

    Raises CheckpointError or StorageError.
    """
    exact = resolve_commit(name)
    folder = _download(exact, FOLDER_FILES)
    if (folder / "config.json").exists() and any(folder.glob("model*.safetensors")):
        return folder
    files = sorted(folder.glob("*.ckpt"))
    if not files:
        from huggingface_hub import HfApi

        with _readable(name):
            names = HfApi(endpoint=_endpoint()).list_repo_files(exact.repository, revision=exact.revision)
        found = sorted(file for file in names if file.endswith(".ckpt") and "/" not in file)
        if not found:
            raise CheckpointError(
                f"{name}: holds neither config.json with model.safetensors nor a .ckpt file, so it is no model of this family"
            )
        if len(found) > 1:
            log.warning("%s: holds %d checkpoints; %s is used, the first by name", name, len(found), found[0])
        _download(exact, (found[0],))
    return folder


def fetch_tokenizers(name: HubName) -> Path | None:
    """The folder of vocabularies in a repository, without its weights; None where it has none."""
    folder = _download(resolve_commit(name), (*SETTINGS, TOKENIZERS))
    return min((entry for entry in folder.glob("tokenizers*") if entry.is_dir()), default=None)


def _download(name: HubName, patterns: tuple[str, ...], local_files_only: bool = False) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    with _readable(name):
        disable_progress_bars()
        try:
            found = snapshot_download(
                name.repository, revision=name.revision, allow_patterns=list(patterns), endpoint=_endpoint(),
                local_files_only=local_files_only,
            )  # fmt: skip
        finally:
            if shown:
                enable_progress_bars()
    return Path(found)


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


@contextlib.contextmanager
def _readable(name: HubName) -> Iterator[None]:
    """Errors of the hub in words; what its client says may hold addresses with secrets, so it is not repeated."""
    from huggingface_hub import errors

    place = strip_userinfo(_endpoint() or "huggingface.co")
    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{name}: its owners ask everyone to accept their terms first; do so on its page, and set HF_TOKEN to a token of that account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name.repository}: there is no such folder here and no such repository at {place}, or it is private and HF_TOKEN is not a "
            "token that may read it"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{name}: the repository has no branch, tag or commit {name.revision}") from error
    except errors.OfflineModeIsEnabled as error:
        raise StorageError(
            f"{name}: is no folder here and not in the cache of this machine, and HF_HUB_OFFLINE forbids to fetch it"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise StorageError(
            f"{name}: is no folder here and not in the cache of this machine, and {place} cannot be reached (or HF_HUB_OFFLINE is set); "
            "fetch it once where there is a connection"
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        raise StorageError(f"{name}: {place} answered with status {status}; try again later") from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{name}: is no name of a repository") from error
    except (OSError, *_transport_errors()) as error:
        raise StorageError(
            f"{name}: is no folder here, and {place} cannot be reached ({type(error).__name__}); check the name and the connection"
        ) from error


def _transport_errors() -> tuple[type[Exception], ...]:
    """What the HTTP client of huggingface_hub raises where there is no connection."""
    from huggingface_hub import errors

    return (errors.HTTPError,) if isinstance(getattr(errors, "HTTPError", None), type) else ()
