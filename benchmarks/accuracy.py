"""The packaged default on a labelled h5ad: the model's scores beside its controls, with intervals, and the time. One JSON line.

python benchmarks/accuracy.py cells.h5ad --label celltype [key=value ...]
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from measuring import bmfm, hardware, measured


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", nargs="?")
    parser.add_argument("--label", default="celltype")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    if arguments.file is None:
        print(json.dumps({"benchmark": "accuracy", "skipped": "name an h5ad file"}))
        return
    with tempfile.TemporaryDirectory() as folder:
        words = ["run", arguments.file, f"label={arguments.label}", *arguments.overrides]
        spent = measured(bmfm(*words, "--json", "--workspace", f"{folder}/workspace"))
        rows = json.loads(spent["output"].splitlines()[-1])["metrics"]
    scores = {
        f"{row['model']} {row['metric']}": [round(row[name], 4) for name in ("value", "ci_low", "ci_high")]
        for row in rows
        if row["metric"] in ("accuracy", "f1")
    }
    print(
        json.dumps(
            {
                "benchmark": "accuracy",
                "file": Path(arguments.file).name,
                "settings": arguments.overrides,
                "test_cells": rows[0]["n"],
                "scores": scores,
                **{name: spent[name] for name in ("wall_s", "cpu_s", "peak_rss_mb")},
                "hardware": hardware(),
            }
        )
    )


if __name__ == "__main__":
    main()
