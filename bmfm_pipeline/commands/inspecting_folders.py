"""`bmfm data inspect FOLDER`: what a folder, or a pattern, of files of cells holds as one dataset."""

import shlex
import tempfile
from pathlib import Path
from typing import Any

from bmfm_pipeline.errors import DataError
from bmfm_pipeline.stages.conversion import needs_conversion
from bmfm_pipeline.stages.source_files import common_folder, expand_address, named_files

SHOWN = 20
PLACE = "data_module.transform_kwargs"


def look_at_folder(address: str) -> dict[str, Any]:
    """Each file's cells, genes, kind of values and gene names; genes that all share; what cannot be read; the command to run.

    Files that are no h5ad are converted into a temporary folder, one at a time.
    """
    files = named_files(expand_address(address))
    rows, genes, shared, cell_names = [], set(), None, {}
    repeated_cells = 0
    for name, path in files.items():
        try:
            row, names, cells = _look(Path(path))
        except DataError as error:
            rows.append({"file": name, "problem": str(error).removeprefix(path).lstrip(": ")})
            continue
        rows.append({"file": name, **row})
        genes |= names
        shared = names if shared is None else shared & names
        repeated_cells += sum(cell in cell_names for cell in cells)
        cell_names.update(dict.fromkeys(cells))
    readable = [row for row in rows if "problem" not in row]
    problems = [f"{row['file']}: {row['problem']}" for row in rows if "problem" in row]
    if repeated_cells:
        problems.append(f"{repeated_cells:,} cell names are in several files: add {PLACE}.cell_names=prefix")
    kinds = {row["values"] for row in readable}
    if len(kinds) > 1:
        problems.append(f"files hold different kinds of values: {', '.join(sorted(kinds))}")
    words = [f"bmfm run {shlex.quote(address)}"]
    if repeated_cells:
        words.append(f"{PLACE}.cell_names=prefix")
    if kinds - {"counts"}:
        words.append(f"{PLACE}.input_values=any")
    return {
        "folder": common_folder(list(files.values())),
        "files": rows,
        "cells": sum(row["cells"] for row in readable),
        "genes": len(genes),
        "genes_in_all_files": len(shared or ()),
        "problems": problems,
        "next": " ".join(words) if readable else "mend the files",
    }


def _look(path: Path) -> tuple[dict[str, Any], set[str], list[str]]:
    import h5py

    from bmfm_pipeline.data.sources import open_source
    from bmfm_pipeline.data.sources.converting import convert
    from bmfm_pipeline.data.sources.matrix_facts import matrix_facts
    from bmfm_pipeline.vocabulary.harmonising import describe_names

    with tempfile.TemporaryDirectory() as folder:
        about, local = {"format": "h5ad", "notes": []}, path
        if needs_conversion(path):
            local = Path(folder) / "cells.h5ad"
            about = convert(path, local)
        source = open_source(local)
        with h5py.File(local, "r") as file:
            facts = matrix_facts(file, source.where)
        names = list(source.var_names)
        naming = describe_names(names)
        row = {
            "format": about["format"],
            "cells": source.n_cells,
            "genes": source.n_genes,
            "values": facts["kind"],
            "naming": f"{naming.species} {naming.kind}".strip(),
            "notes": about["notes"],
        }
        return row, set(names), list(source.obs_names)


def lines_of_folder(found: dict[str, Any]) -> list[str]:
    """The screen, the next command last."""
    lines = [
        f"{found['folder']}: {len(found['files'])} files, {found['cells']:,} cells, {found['genes']:,} gene names in all, "
        f"{found['genes_in_all_files']:,} in every file"
    ]
    width = max(len(row["file"]) for row in found["files"])
    for row in found["files"][:SHOWN]:
        if "problem" in row:
            lines.append(f"  {row['file']:<{width}}  cannot be read")
        else:
            lines.append(
                f"  {row['file']:<{width}}  {row['format']:<5} {row['cells']:>8,} cells x {row['genes']:>6,} genes, {row['values']}; "
                f"{row['naming']}"
            )
    if len(found["files"]) > SHOWN:
        lines.append(f"  and {len(found['files']) - SHOWN} more")
    if found["problems"]:
        lines += ["to mend or to know", *(f"  - {text}" for text in found["problems"])]
    return [*lines, f"run it: {found['next']}"]
