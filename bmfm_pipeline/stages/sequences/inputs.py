"""Where the sequences of a run lie, and what of them enters its key."""

from pathlib import Path
from typing import Any

from bmfm_pipeline.config import RunConfig, load_entry, require_path
from bmfm_pipeline.config.sequences import ENDINGS, FASTA, PLACE
from bmfm_pipeline.errors import ConfigError, DataError
from bmfm_pipeline.storage import (
    Workspace,
    content_hash,
    exists,
    hash_json,
    is_remote,
    join_uri,
    local_path,
    strip_userinfo,
)


def find_sequences(run: RunConfig) -> str:
    """The address of the table or folder; ConfigError when nothing names one, DataError when it is not there."""
    settings = run.data_module
    named = settings.sequences.source
    hint = ""
    if named:
        uri = require_path(named, f"{PLACE}.source")
    elif settings.data_dir and run.dataset:
        entry = load_entry(run.dataset)
        folder = require_path(settings.data_dir, "data_module.data_dir")
        file = (entry.source.file or ".").format(part=settings.sequences.part)
        uri = folder if file == "." else join_uri(folder, file)
        hint = f"; {run.dataset} expects {'its tables' if file == '.' else file} in {folder}"
    else:
        raise ConfigError(
            f"no sequences are named; set {PLACE}.source to a folder with train, dev and test as csv files, or choose a dataset of "
            "`bmfm datasets` with dataset=NAME"
        )
    if not is_remote(uri):
        uri = str(local_path(uri))
    if not exists(uri):
        raise DataError(f"{strip_userinfo(uri)}: no such file or folder{hint}")
    return uri


def sequence_input(run: RunConfig, workspace: Workspace) -> dict[str, Any]:
    """The tables of a run as one input: content and the name of each, other files of the folder do not count."""
    from bmfm_pipeline.data.sequences.files import files_of

    uri = find_sequences(run)
    if beside := files_of_windows(run, uri):
        own = [content_hash(file, workspace.memo) for file in (uri, *beside.values())]
        return {"id": hash_json([list(beside), *own]), "uri": strip_userinfo(uri)}
    if is_remote(uri):
        return {"id": content_hash(uri, workspace.memo), "uri": strip_userinfo(uri)}
    files = files_of(Path(uri))
    ids = {split: content_hash(str(file), workspace.memo) for split, file in files.items()}
    if list(ids) == [""]:
        return {"id": ids[""], "uri": uri}
    found = {split: {"id": ids[split], "uri": str(file)} for split, file in files.items()}
    return {"id": hash_json(sorted(ids.items())), "uri": uri, "files": found}


def files_of_windows(run: RunConfig, uri: str) -> dict[str, str]:
    """{bed, variants: where it lies} of what the config names beside the genome at `uri`. Raises ConfigError where `uri` is none, DataError."""
    found = {}
    for name in ("bed", "variants"):
        if named := getattr(run.data_module.sequences.windows, name):
            key = f"{PLACE}.windows.{name}"
            if not strip_userinfo(uri).lower().endswith(FASTA):
                raise ConfigError(f"{key}: is for windows of a genome, a FASTA file; {strip_userinfo(uri)} is none")
            found[name] = require_path(named, key)
            if not exists(found[name]):
                raise DataError(f"{key}: {strip_userinfo(found[name])}: no such file")
    return found


# First columns by which a table alone is known to hold sequences, and the label that is predicted where none is named.
COLUMNS, LABEL = ("sequence", "sequences", "dna_chunks", "dna_sequence", "seq"), "label"


def looks_like_sequences(target: str) -> bool:
    """Whether a local address is a folder with train, dev or test as tables, or a table whose first column is called sequence."""
    from bmfm_pipeline.data.sequences.files import holds_sequences

    if is_remote(target):
        return False
    path = local_path(target)
    if path.is_dir():
        return holds_sequences(path)
    if path.is_file() and path.name.lower().endswith(FASTA):
        return True
    return path.is_file() and path.name.endswith(ENDINGS) and _columns(path)[0].lower() in COLUMNS


def usual_label(path: str) -> str | None:
    """The label of sequences where nobody names one: a column called label."""
    from bmfm_pipeline.data.sequences.files import files_of

    if Path(path).name.lower().endswith(FASTA):
        return None
    return LABEL if LABEL in _columns(next(iter(files_of(Path(path)).values()))) else None


def name_of_sequences(source: str | None) -> str:
    """What sequences are called by their address."""
    name = Path(source or "sequences").name
    for ending in (*ENDINGS, *FASTA):
        name = name.removesuffix(ending)
    return name or "sequences"


def _columns(path: Path) -> list[str]:
    """Names of the columns of a table, read off its first line."""
    from bmfm_pipeline.data.sequences.files import header

    return header(path)
