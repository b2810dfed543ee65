"""`bmfm export`: a published model as a folder to share."""

import argparse
import sys
from typing import Any


def export(arguments: argparse.Namespace) -> dict[str, Any]:
    from bmfm_pipeline.stages.exporting import export_folder

    found = export_folder(
        arguments.model,
        arguments.output,
        evaluation=arguments.evaluation,
        license=arguments.license,
        name=arguments.name,
        workspace=arguments.workspace,
    )
    tested = (
        f"test numbers of {found['evaluation']}"
        if found["evaluation"]
        else "no test numbers: no evaluation of it was found"
    )
    print(
        f"{found['output']}: {len(found['files'])} files, {found['bytes'] / 1e6:.1f} MB; {tested}\n"
        f"share it: hf upload ORGANISATION/NAME {found['output']}",
        file=sys.stderr if arguments.json else sys.stdout,
    )
    return found
