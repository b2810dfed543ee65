"""URIs, content hashes, atomic publishing of artefacts: the ground floor, and the only room that knows s3."""

from bmfm_pipeline.storage.artefact import Artefact, find_artefact, list_artefacts, load_artefact, publish
from bmfm_pipeline.storage.cache import localise, release_copies
from bmfm_pipeline.storage.code import code_version
from bmfm_pipeline.storage.failures import RemoteError
from bmfm_pipeline.storage.files import (
    check_room,
    copy_atomic,
    disk_errors,
    read_json,
    write_json_atomic,
    write_text_atomic,
)
from bmfm_pipeline.storage.hashing import ContentMemo, content_hash, hash_bytes, hash_file, hash_json
from bmfm_pipeline.storage.locks import exclusive, exclusive_file
from bmfm_pipeline.storage.placing import other_content, place_copy, same_content
from bmfm_pipeline.storage.remote import attempt, exists, open_zarr
from bmfm_pipeline.storage.roots import check_allowed, check_values
from bmfm_pipeline.storage.round_trip import check_round_trip
from bmfm_pipeline.storage.shared_run import SharedRun
from bmfm_pipeline.storage.uris import is_pattern, is_remote, join_uri, local_path, strip_userinfo, without_places
from bmfm_pipeline.storage.workspace import Workspace

__all__ = [
    "Artefact",
    "ContentMemo",
    "RemoteError",
    "SharedRun",
    "Workspace",
    "attempt",
    "check_allowed",
    "check_room",
    "check_round_trip",
    "check_values",
    "code_version",
    "content_hash",
    "copy_atomic",
    "disk_errors",
    "exclusive",
    "exclusive_file",
    "exists",
    "find_artefact",
    "hash_bytes",
    "hash_file",
    "hash_json",
    "is_pattern",
    "is_remote",
    "join_uri",
    "list_artefacts",
    "load_artefact",
    "local_path",
    "localise",
    "open_zarr",
    "other_content",
    "place_copy",
    "publish",
    "read_json",
    "release_copies",
    "same_content",
    "strip_userinfo",
    "without_places",
    "write_json_atomic",
    "write_text_atomic",
]
