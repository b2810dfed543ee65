"""`bmfm data inspect FILE`: one screen on a file of cells, local or on s3, on a folder of them, or on a processed artefact."""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bmfm_pipeline.errors import DataError
from bmfm_pipeline.storage import is_remote, join_uri, load_artefact, localise, strip_userinfo

MOST_LINES = 12  # obs columns that are shown
MOST_LABELS = 5  # of them, before groups and splits
WIDTH = 110
SIGNATURES = (
    (b"\x1f\x8b", "is gzipped: unpack it first, `gunzip {path}`"),
    (b"PK\x03\x04", "is a zip archive: unpack it first, `unzip {path}`"),
    (b"BZh", "is compressed by bzip2: unpack it first, `bunzip2 {path}`"),
    (b"%%MatrixMarket", "is a Matrix Market file: read its folder with scanpy.read_10x_mtx and write an h5ad"),
    (b"<", "is a page of a website: the download brought a login or an error page instead of the file"),
    (b"version https://git-lfs", "is a pointer of Git LFS, not the data: run `git lfs pull`"),
)


def data(arguments: argparse.Namespace) -> dict[str, Any]:
    """Matrices, values, gene names and obs columns of an h5ad, what is wrong, what preprocessing would keep, and what to run."""
    from bmfm_pipeline.data.sources import open_source
    from bmfm_pipeline.data.sources.description import describe_file

    if _is_several(arguments.file):
        from bmfm_pipeline.commands.inspecting_folders import lines_of_folder, look_at_folder

        found = look_at_folder(arguments.file)
        if not arguments.json:
            print("\n".join(lines_of_folder(found)))
        return found
    path, about = _locate(arguments.file)
    uri = strip_userinfo(arguments.file) if is_remote(arguments.file) else str(path)
    with _as_h5ad(path) as (local, made):
        found = describe_file(open_source(local, arguments.layer), quick=arguments.quick, uri=uri)
    size = sum(part.stat().st_size for part in path.rglob("*")) if path.is_dir() else path.stat().st_size
    found |= {"bytes": size, **made, **about}
    if not arguments.json:
        print("\n".join(lines_of(found)))
    return found


def _is_several(uri: str) -> bool:
    from bmfm_pipeline.stages.source_files import holds_cells, stands_for_several

    if is_remote(uri) or (Path(uri).expanduser() / "artefact.json").exists():
        return False
    return stands_for_several(uri) and (not Path(uri).expanduser().is_dir() or holds_cells(Path(uri).expanduser()))


@contextlib.contextmanager
def _as_h5ad(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(the h5ad to look at, how it was read): the file itself, or what a file of another kind becomes, in a temporary folder."""
    from bmfm_pipeline.stages.conversion import needs_conversion

    if not path.exists() or not needs_conversion(path):
        if problem := what_else(path):
            raise DataError(problem)
        yield path, {}
        return
    from bmfm_pipeline.data.sources.converting import convert

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "cells.h5ad"
        about = convert(path, target)
        yield target, {"read_as": about["format"], "notes": about["notes"]}


def _locate(uri: str) -> tuple[Path, dict[str, Any]]:
    """(local h5ad, what is known of the artefact it is of)."""
    from bmfm_pipeline.data.sources.formats import ending_of, folder_format

    if not is_remote(uri):
        path = Path(uri).expanduser()
        if not path.is_dir() or folder_format(path) is not None:
            return path, {}
    if not (is_remote(uri) and ending_of(uri)):
        where = uri.rstrip("/")
        if not is_remote(uri) and not (Path(where).expanduser() / "artefact.json").exists():
            files = sorted(Path(where).expanduser().rglob("*.h5ad"))
            if files:
                raise DataError(
                    f"{where}: its folders hold {len(files)} h5ad files; inspect one of them, such as {files[0]}, or all: '{where}/**/*.h5ad'"
                )
            raise DataError(
                f"{where}: is a folder and no artefact; name a file of cells, or the folder of a preprocess artefact"
            )
        artefact = load_artefact(where)
        if artefact.stage != "preprocess":
            raise DataError(
                f"{where}: is a {artefact.stage} artefact; a preprocess artefact, or an h5ad file, holds cells"
            )
        return Path(artefact.local()) / "processed.h5ad", {
            "artefact": join_uri(where),
            "artefact_summary": artefact.summary,
        }
    return Path(localise(uri)), {}


def what_else(path: Path) -> str | None:
    """A sentence on a file that is no HDF5 but something known, or is cut short; None otherwise."""
    if not path.is_file():
        return None
    size = path.stat().st_size
    if size == 0:
        return f"{path}: is empty (0 bytes); fetch it or write it again"
    with open(path, "rb") as stream:
        head = stream.read(64)
    for signature, words in SIGNATURES:
        if head.lstrip()[: len(signature)] == signature:
            return f"{path}: {words.format(path=path)}"
    if not head.startswith(b"\x89HDF\r\n\x1a\n"):
        return None
    expected = _promised_size(head)
    if expected is not None and expected > size:
        return f"{path}: is cut short: {size:,} of {expected:,} bytes are there; fetch it again"
    return _other_hdf5(path)


def _promised_size(head: bytes) -> int | None:
    """The end of file that an HDF5 superblock names (versions 0 to 3)."""
    version = head[8]
    if version in (0, 1) and head[13] == 8:
        begin = 24 + (4 if version == 1 else 0) + 16
    elif version in (2, 3) and head[9] == 8:
        begin = 12 + 16
    else:
        return None
    return int.from_bytes(head[begin : begin + 8], "little")


def _other_hdf5(path: Path) -> str | None:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            names = set(file)
            inside = set(file["matrix"]) if isinstance(file.get("matrix"), h5py.Group) else set()
    except OSError:
        return None
    known = {"loom": {"matrix", "row_attrs", "col_attrs"} <= names, "h5mu": "mod" in names and "X" not in names}
    known["h5"] = {"barcodes", "data"} <= inside
    if found := next((ending for ending, there in known.items() if there), None):
        return f"{path}: is a .{found} file by what it holds, and an h5ad by its name; rename it to end in .{found}"
    return None


def lines_of(found: dict[str, Any]) -> list[str]:
    """The screen, the next command last."""
    size = f"{found['bytes'] / 1e6:,.1f} MB"
    lines = [
        f"{found['file']}: {found['cells']:,} cells x {found['genes']:,} genes, {found['matrix']} ({found['stored']}), {size}"
    ]
    if "read_as" in found:
        lines.append("; ".join([f"{'read as':<10} {found['read_as']}", *found["notes"]]))
    if "artefact" in found:
        lines.append(f"preprocess artefact {found['artefact']}")
    for matrix in found["matrices"]:
        lines += _matrix_lines(matrix)
    lines += _gene_lines(found["gene_names"])
    lines += _column_lines(found)
    lines += _survey_lines(found)
    if found["problems"]:
        lines.append("to mend or to know")
        lines += [f"  - {text}" for text in found["problems"]]
    lines.append(f"next: {found['next']}" if found["next"].startswith("mend") else f"run it: {found['next']}")
    return lines


def _matrix_lines(matrix: dict[str, Any]) -> list[str]:
    from bmfm_pipeline.data.sources.description import values_in_words

    stored = [matrix["storage"], matrix["dtype"]]
    if "index_dtype" in matrix:
        stored.append(f"{matrix['index_dtype']} indices")
    stored.append("not compressed" if matrix["compression"] == "none" else matrix["compression"])
    more = [f"{matrix['filled']:.1%} filled"]
    if matrix["zeros_stored"]:
        part = "" if matrix["share_seen"] == 1 else f" in the {matrix['share_seen']:.0%} looked at"
        more.append(f"{matrix['zeros_stored']:,} stored zeros{part}")
    if matrix["storage"] == "csc":
        more.append("stored by gene: turned into rows once, on disk, when it is read")
    return [f"{matrix['name']:<10} {values_in_words(matrix)}; {', '.join(more)}", f"{'':<10} {', '.join(stored)}"]


def _gene_lines(names: dict[str, Any]) -> list[str]:
    species = f"{names['species']} " if names["species"] else ""
    also = []
    if names["with_version"]:
        also.append(f"{names['with_version']:,} with a version")
    if names["repeated_once_cut"] > 0:
        also.append(f"{names['repeated_once_cut']:,} repeat once cut at _ENSG")
    also += [f"var['{entry['name']}'] holds {entry['kind']}" for entry in names["columns"]]
    text = f"{'genes':<10} {species}{names['kind']} ({names['share']:.0%}): {', '.join(names['examples'])}, ..."
    return [text, *([f"{'':<10} {'; '.join(also)}"] if also else [])]


def _column_lines(found: dict[str, Any]) -> list[str]:
    columns = found["obs"]
    if not columns:
        return [f"{'obs':<10} has no columns, so there is no label"]
    order = {"group": 1, "split": 2, "label": 3, "number": 4, "id": 5, "constant": 6, "empty": 7}
    likely = found["labels"][:MOST_LABELS]
    ranked = sorted(columns, key=lambda entry: (entry["name"] not in likely and order[entry["role"]], -entry["score"]))
    lines = ["obs columns, likely labels first"]
    for entry in ranked[:MOST_LINES]:
        role = "label" if entry["name"] in found["labels"] else "label?" if entry["role"] == "label" else entry["role"]
        text = f"  {role:<8} {entry['name']:<24} {entry['what']}"
        lines.append(text if len(text) <= WIDTH + 30 else text[: WIDTH + 26] + " ...")
    if len(ranked) > MOST_LINES:
        lines.append(
            f"  and {len(ranked) - MOST_LINES} more: {', '.join(entry['name'] for entry in ranked[MOST_LINES:])[:WIDTH]}"
        )
    people = [entry for entry in columns if entry["role"] == "group"]
    people.sort(key=lambda entry: not entry["person"])
    if people and not found["processed"] and found["labels"]:
        name = people[0]["name"]
        lines.append(
            f"  cells of one {name} in training and test flatter a model: data_module.transform_kwargs.split.group={name} keeps them apart"
        )
    splits = [entry["name"] for entry in columns if entry["role"] == "split"]
    if splits and not found["processed"]:
        lines.append(f"  to use the split that is there: data_module.transform_kwargs.split_column_name={splits[0]}")
    return lines


def _survey_lines(found: dict[str, Any]) -> list[str]:
    survey = found["survey"]
    if survey is None:
        return []
    lines = []
    if "counts_per_cell" in survey:
        low, middle, high = survey["counts_per_cell"]
        genes = survey["genes_per_cell"]
        kinds = {matrix["name"]: matrix["kind"] for matrix in found["matrices"]}
        what = "counts" if kinds[survey["matrix"]] == "counts" else "in all"
        lines.append(
            f"{'a cell':<10} {middle:,.0f} {what} (median; {low:,.0f} to {high:,.0f}), {genes[1]:,} genes ({genes[0]:,} to {genes[2]:,})"
        )
    if "kept" in survey:
        kept = survey["kept"]
        lines.append(
            f"{'would keep':<10} {kept['cells']:,} of {found['cells']:,} cells, {kept['genes']:,} of {found['genes']:,} genes and "
            f"{kept['share_of_counts']:.1%} of counts, by the default transforms"
        )
        before = kept["steps"][0]
        for step in kept["steps"][1:]:
            if (step["cells"], step["genes"]) != (before["cells"], before["genes"]):
                lost = [
                    f"{before[what] - step[what]:,} {what}" for what in ("cells", "genes") if before[what] != step[what]
                ]
                lines.append(f"{'':<10} {step['step']} drops {' and '.join(lost)}")
            before = step
    return lines
