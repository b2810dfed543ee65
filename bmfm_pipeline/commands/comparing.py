"""`bmfm compare`: two evaluations, paired where their test cells are the same."""

import argparse
import sys
from typing import Any


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    from bmfm_pipeline.evaluation.pages.comparison import comparison_text
    from bmfm_pipeline.stages.comparing import compare_runs

    found = compare_runs(
        arguments.a,
        arguments.b,
        workspace=arguments.workspace,
        level=arguments.level,
        resamples=arguments.resamples,
        seed=arguments.seed,
        output=arguments.output,
    )
    lines = [comparison_text(found)]
    if "files" in found:
        lines.append(f"written     {', '.join(found['files'])}")
    print("\n".join(lines), file=sys.stderr if arguments.json else sys.stdout)
    return found
