"""`make demo` after installation: wall time, again with nothing changed, and time and peak memory of each stage alone.

python benchmarks/demo.py      # prints one JSON line; a fresh workspace in a temporary folder
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from measuring import bmfm, hardware, measured


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole = ["run", "zheng68k-mini", "--json", "--workspace", f"{folder}/whole"]
        first = measured(bmfm(*whole))
        again = measured(bmfm(*whole))
        place = ["zheng68k-mini", "--json", "--workspace", f"{folder}/stages"]
        stages = {}
        for stage, words in (
            ("preprocess", []),
            ("pretrain", []),
            ("finetune", ["model.checkpoint=latest"]),
            ("evaluate", ["task.checkpoint=latest"]),
        ):
            spent = measured(bmfm(stage, *place, *words))
            stages[stage] = {name: spent[name] for name in ("wall_s", "cpu_s", "peak_rss_mb")}
    found = json.loads(first["output"].splitlines()[-1])
    scores = {
        f"{row['model']} {row['metric']}": [round(row[name], 4) for name in ("value", "ci_low", "ci_high")]
        for row in found["metrics"]
        if row["metric"] in ("accuracy", "f1") and row["model"] in ("model", "logistic_l2")
    }
    print(
        json.dumps(
            {
                "benchmark": "demo",
                "wall_s": first["wall_s"],
                "cpu_s": first["cpu_s"],
                "peak_rss_mb": first["peak_rss_mb"],
                "again_wall_s": again["wall_s"],
                "stages": stages,
                "scores": scores,
                "hardware": hardware(),
            }
        )
    )


if __name__ == "__main__":
    main()
