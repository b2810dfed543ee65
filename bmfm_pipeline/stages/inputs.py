"""Which files a run reads: found, named by content, and refused with a sentence when they are not there."""

import glob
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bmfm_pipeline.config import load_entry, require_path
from bmfm_pipeline.config.catalogue import downloads_folder
from bmfm_pipeline.config.reshaping import table_paths
from bmfm_pipeline.data.sources.formats import folder_format, format_of
from bmfm_pipeline.errors import ConfigError, DataError, StorageError
from bmfm_pipeline.stages.file_table import choose_files
from bmfm_pipeline.stages.gene_tables import gene_inputs
from bmfm_pipeline.stages.labels import label_input, ontology_inputs
from bmfm_pipeline.stages.sequences.inputs import sequence_input
from bmfm_pipeline.stages.source_files import common_folder, expand_address, named_files, stands_for_several
from bmfm_pipeline.stages.splits import split_input
from bmfm_pipeline.storage import (
    Workspace,
    check_allowed,
    content_hash,
    exists,
    find_artefact,
    hash_bytes,
    hash_json,
    is_remote,
    join_uri,
    load_artefact,
    localise,
    strip_userinfo,
)

# Arguments of transforms that may name a file or a folder.
STEP_FILES = {
    "explanatory_gene_set",
    "gene_map",
    "genes_to_keep",
    "gtf_file",
    "path_to_median_data",
    "vocab_identifier",
}


@dataclass(frozen=True)
class Source:
    """Where the cells of a run come from: a file (local or remote), or a builder that makes it from installed packages.

    Several files as one dataset are `files`, {name: address}; `uri` is then the folder that they share. `about` is what a table says of
    each, {name: {column: value}}, and `selection` what was counted when it chose them.
    """

    uri: str
    builder: str | None = None
    processed: bool = False
    files: dict[str, str] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    selection: dict[str, Any] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """What several files are called in messages."""
        return f"{strip_userinfo(self.uri)} ({len(self.files)} {'file' if len(self.files) == 1 else 'files'})"

    def open_path(self, folder: Path) -> Path:
        """A local file: built under `folder`, or a copy in the cache, when it is not one already."""
        if self.builder == "zheng68k_mini":
            from bmfm_pipeline.data.sources import zheng68k_mini

            path = folder / "zheng68k-mini.h5ad"
            if not path.exists():
                folder.mkdir(parents=True, exist_ok=True)
                zheng68k_mini.build(path)
            return path
        return localise(self.uri)


def find_source(run) -> Source:
    """The source of a run: explicit paths first, then the catalogue's.

    Raises ConfigError when nothing names a file, DataError when the named file is not there.
    """
    settings = run.data_module
    if not settings.transform_datasets:
        path = settings.dataset_kwargs.processed_data_source or settings.transform_kwargs.processed_data_source
        if not path:
            raise ConfigError(
                "data_module.transform_datasets is false, so data_module.dataset_kwargs.processed_data_source must name the "
                "processed h5ad to use; or set data_module.transform_datasets=true to make it"
            )
        return _existing(require_path(path, "data_module.dataset_kwargs.processed_data_source"), processed=True)
    named = settings.transform_kwargs.source_h5ad_file_name
    entry = load_entry(run.dataset) if run.dataset else None
    if named:
        offered = entry is not None and entry.source.download and entry.source.file == named
        hint = f"`bmfm datasets download {run.dataset}` fetches it from the web" if offered else ""
        places = [_place(name, settings) for name in ([named] if isinstance(named, str) else named)]
        return _raw_source(places, isinstance(named, list), settings, hint)
    if entry is not None and entry.source.builder and not settings.data_dir:
        if settings.transform_kwargs.cell_names == "prefix":
            raise ConfigError(
                f"data_module.transform_kwargs.cell_names: prefix puts names of files before those of cells, and {run.dataset} is made "
                "from no file of yours; leave it out"
            )
        return Source(uri=f"builder:{entry.source.builder}", builder=entry.source.builder)
    if settings.data_dir:
        if entry is None:
            raise ConfigError(
                "data_module.data_dir is set but no file is named; set data_module.transform_kwargs.source_h5ad_file_name to the h5ad file"
            )
        folder = require_path(settings.data_dir, "data_module.data_dir")
        hint = f"{run.dataset} expects {entry.source.file} in that folder"
        if entry.source.download and not is_remote(folder):
            hint += f": `bmfm datasets download {run.dataset} --to {folder}` fetches it from the web"
        place = join_uri(folder, entry.source.file)
        if entry.source.converted and not is_remote(folder) and not any(glob.iglob(place, recursive=True)):
            other = join_uri(folder, entry.source.converted)
            place = other if any(glob.iglob(other, recursive=True)) else place
        return _raw_source([place], False, settings, hint)
    raise ConfigError(
        "no data is named; set data_module.transform_kwargs.source_h5ad_file_name to an h5ad file, or choose a dataset of "
        "`bmfm datasets` with dataset=NAME"
    )


def _place(named: str, settings) -> str:
    """A name of the config as an address; below data_dir where it lies nowhere else."""
    named = require_path(named, "data_module.transform_kwargs.source_h5ad_file_name")
    if settings.data_dir and not is_remote(named) and not Path(named).is_absolute() and not Path(named).exists():
        return join_uri(require_path(settings.data_dir, "data_module.data_dir"), "h5ad", named)
    return named


def _raw_source(places: list[str], is_list: bool, settings, hint: str) -> Source:
    """The raw data at `places`: one file as it is; a list, a folder and a pattern, or cells that get a prefix, are files by name."""
    prefixed, table = settings.transform_kwargs.cell_names == "prefix", settings.transform_kwargs.files
    if not is_list and not prefixed and table is None and not stands_for_several(places[0]):
        return _existing(places[0], hint=hint)
    found = [_existing(uri, hint=hint).uri for place in places for uri in expand_address(place, hint)]
    source = Source(uri=common_folder(found), files=named_files(found))
    if table is None:
        return source
    files, about, counts = choose_files(source.files, table, source.place)
    return Source(source.uri, files=files, about=about, selection=counts)


def _existing(uri: str, processed: bool = False, hint: str = "") -> Source:
    if not is_remote(uri):
        path = Path(uri).expanduser().absolute()
        if not path.exists():
            beside = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
            near = [entry.name for entry in beside if format_of(entry) is not None][:5]
            there = (
                f"; that folder has {', '.join(near)}"
                if near
                else ""
                if path.parent.is_dir()
                else f"; {path.parent} does not exist either"
            )
            raise DataError(f"{path}: no such file{there}{'; ' + hint if hint else ''}")
        if path.is_dir() and folder_format(path) is None:
            raise DataError(f"{path}: is a folder, an h5ad file is needed")
        uri = str(path)
    check_allowed(uri, "the cells", also=(downloads_folder(),))
    return Source(uri=uri, processed=processed)


def source_inputs(run, workspace: Workspace) -> dict[str, dict[str, Any]]:
    """The inputs of preprocessing by role, each with the hash of its content."""
    inputs = {"source": cells_input(run, workspace)}
    if run.data_module.sequences is None:
        inputs |= _table_inputs(run, workspace)
    if folder := _tokenizer_folder(run):
        path = require_path(folder, "tokenizer")
        if not exists(path):
            raise ConfigError(
                f"tokenizer.identifier: {path} does not exist; name a folder that holds tokenizers/<field>/, or 'data'"
            )
        inputs["tokenizer"] = {"id": content_hash(path, workspace.memo), "uri": strip_userinfo(path)}
    inputs |= _step_inputs(run, workspace)
    inputs |= ontology_inputs(run, workspace.memo)
    return {**inputs, **split_input(run, workspace), **label_input(run), **gene_inputs(run, workspace.memo)}


def _table_inputs(run, workspace: Workspace) -> dict[str, dict[str, Any]]:
    """The tables of files and of cells, each with the hash of its content; one that is not there is its reader's to refuse."""
    settings = run.data_module.transform_kwargs
    named = {"cell_table": settings.reading.cell_table, "file_table": settings.files.table if settings.files else None}
    if not run.data_module.transform_datasets:
        return {}
    found = {role: require_path(path, f"data_module.transform_kwargs {role}") for role, path in named.items() if path}
    return {
        role: {"id": content_hash(path, workspace.memo), "uri": strip_userinfo(path)}
        for role, path in found.items()
        if exists(path)
    }


def cells_input(run, workspace: Workspace) -> dict[str, Any]:
    """The file or files that hold the cells, or sequences, of a run, as an input."""
    if run.data_module.sequences is not None:
        return sequence_input(run, workspace)
    source = find_source(run)
    if source.builder:
        return {"id": _builder_hash(source.builder), "uri": source.uri}
    if source.files:
        return _files_input(source, workspace)
    return {"id": content_hash(source.uri, workspace.memo), "uri": strip_userinfo(source.uri)}


def _files_input(source: Source, workspace: Workspace) -> dict[str, Any]:
    """Several files as an input: their names and contents in order, for names become a column of the cells. Folders do not count."""
    with workspace.memo.for_many() as memo:
        files = {
            name: {"id": content_hash(uri, memo), "uri": strip_userinfo(uri)} for name, uri in source.files.items()
        }
    found = hash_json([[name, entry["id"]] for name, entry in files.items()])
    return {"id": found, "uri": strip_userinfo(source.uri), "files": files}


def _step_inputs(run, workspace: Workspace) -> dict[str, dict[str, Any]]:
    """Local files and folders that transforms name in their arguments; one that is not there is the step's to refuse."""
    inputs = {}
    for index, step in enumerate(run.data_module.transform_kwargs.transforms or []):
        for name in STEP_FILES & set(step.transform_args):
            path = step.transform_args[name]
            if isinstance(path, str) and not is_remote(path) and Path(path).exists():
                role = f"transforms.{index}.{name}"
                inputs[role] = {"id": content_hash(path, workspace.memo), "uri": str(Path(path).absolute())}
    return inputs


def embedding_inputs(run, workspace: Workspace) -> dict[str, dict[str, Any]]:
    """Files of pretrained embeddings by role, each with the hash of its content."""
    inputs = {}
    for entry in run.fields:
        if entry.pretrained_embedding is not None:
            key = f"fields.{entry.field_name}.pretrained_embedding.filename"
            path = require_path(entry.pretrained_embedding.filename, key)
            try:
                found = content_hash(path, workspace.memo)
            except StorageError as error:
                raise DataError(f"{key}: {error}") from None
            inputs[f"embedding_{entry.field_name}"] = {"id": found, "uri": strip_userinfo(path)}
    return inputs


def table_inputs(run, workspace: Workspace) -> dict[str, dict[str, Any]]:
    """Tables by gene that the data module names, by role, each with the hash of its content."""
    inputs = {}
    for name, named in table_paths(run.data_module).items():
        path = require_path(named, f"data_module.{name}")
        if not exists(path):
            raise DataError(f"data_module.{name}: {path} does not exist; name a csv or tsv file of genes")
        inputs[f"table_{name}"] = {"id": content_hash(path, workspace.memo), "uri": strip_userinfo(path)}
    return inputs


def _tokenizer_folder(run) -> str | None:
    return run.tokenizer.identifier if run.tokenizer.is_folder else None


def _builder_hash(builder: str) -> str:
    """Hash of what a builder reads, so that planning needs neither to build nor to import the package that ships it."""
    spec = importlib.util.find_spec("scanpy")
    packaged = Path(spec.origin).parent / "datasets" / "10x_pbmc68k_reduced.h5ad" if spec and spec.origin else None
    if packaged is None or not packaged.exists():
        raise DataError(
            "zheng68k-mini is built from cells that ship inside scanpy, which is not installed; run `pip install scanpy`"
        )
    return hash_bytes(f"{builder}:{content_hash(packaged)}".encode())


def input_folder(job, role: str) -> Path:
    """The folder of an input on this machine; an artefact is looked up again, for it may have been deleted meanwhile."""
    entry = job.inputs[role]
    if not entry.get("stage"):
        if role in ("checkpoint", "model"):
            from bmfm_pipeline.models import model_folder

            return model_folder(entry["uri"])
        return localise(entry["uri"])
    artefact = find_artefact(Workspace(job.workspace), entry["stage"], entry["id"])
    if artefact is None:
        try:
            artefact = load_artefact(entry["uri"])  # of another workspace
        except StorageError:
            raise StorageError(
                f"{job.stage}: its input {role} ({entry['stage']} artefact {entry['uri']}) is missing or damaged; "
                f"run `bmfm {entry['stage']}` (or `bmfm run`) again to rebuild it"
            ) from None
    return artefact.local()
