"""Fine-tuning against logistic regression over several splits, with and without pretraining. One JSON line; docs/accuracy.md explains it.

python benchmarks/accuracy_study.py cells.h5ad --label celltype --folder study [--seeds 0,1,2,3,4] [key=value ...]

Every seed draws a split of its own. Each result is kept in a JSON file in the folder, and what is there is not computed again. The line
has the scores of every seed, and differences of paired predictions pooled over the seeds, with intervals that resample whole cells.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from measuring import bmfm, hardware, measured

ARMS = {
    "pretrained": "fine-tuned from a model pretrained on the training cells",
    "scratch": "fine-tuned from random weights",
}
# What of a result is compared with what. A name before the dot is an arm; controls are the same in all arms.
COMPARED = (
    ("pretrained.whole", "logistic_l2"),
    ("scratch.whole", "logistic_l2"),
    ("pretrained.whole", "scratch.whole"),
    ("pretrained.encoder", "scratch.encoder"),
    ("pretrained.encoder", "logistic_l2"),
    ("pretrained.linear", "logistic_l2"),
    ("pretrained.whole", "pretrained.linear"),
    ("pretrained.whole", "logistic_sqrt"),
    ("logistic_sqrt", "logistic_l2"),
)


def trained(file: str, label: str, arm: str, seed: int, folder: Path, overrides: list[str]) -> dict:
    """Train, evaluate and read the test predictions of one arm on one split."""
    place = ["--workspace", str(folder / "workspace"), "--json"]
    common = [file, f"label={label}", f"seed.seed_value={seed}"]
    of_evaluation = [word for word in overrides if word.startswith("evaluation.")]
    cpu: dict[str, float] = {}
    wall: dict[str, float] = {}

    def stage(name: str, *words: str) -> str:
        settings = of_evaluation if name == "evaluate" else overrides
        spent = measured(bmfm(name, *common, *settings, *words, *place))
        cpu[name], wall[name] = spent["cpu_s"], spent["wall_s"]
        return json.loads(spent["output"].splitlines()[-1])["artefacts"][name]

    data = stage("preprocess")
    start = stage("pretrain") if arm == "pretrained" else "null"
    model = stage("finetune", f"model.checkpoint={start}")
    evaluation = stage("evaluate", f"task.checkpoint={model}")
    return {
        "arm": arm, "seed": seed, "settings": overrides, "model": model, "cpu_s": cpu, "wall_s": wall,
        **predictions_of(Path(model), Path(data), Path(evaluation), label),
    }  # fmt: skip


def predictions_of(model: Path, data: Path, evaluation: Path, label: str) -> dict:
    """Test cells, their classes, and what the model, each of its paths and every control say of them."""
    import torch

    from bmfm_pipeline.config import RunConfig
    from bmfm_pipeline.evaluation.predictions import read_control_predictions, read_predictions
    from bmfm_pipeline.models import load_model
    from bmfm_pipeline.training import build_data_module

    stored = read_predictions(evaluation / "predictions.parquet")
    found = {"whole": stored.labels[label].predicted}
    controls = read_control_predictions(evaluation / "controls.json", stored)
    run = RunConfig.model_validate(json.loads((model / "run_config.json").read_text()))
    module = build_data_module(run, data)
    module.setup("test")
    network = load_model(model)
    heads = network.cls.label_predictions.predictions
    heads.keep_paths = True
    scores = []
    with torch.inference_mode():
        for batch in module.test_dataloader():
            logits = network(batch["input_ids"], batch["attention_mask"], positions={}).logits
            if heads.paths_key(label) not in logits:
                break
            scores.append(logits[heads.paths_key(label)])
    if scores:
        encoder, linear = torch.cat(scores, dim=1)
        found |= {"encoder": encoder.argmax(1).numpy(), "linear": linear.argmax(1).numpy()}
        assert np.array_equal(((encoder + linear) / 2).argmax(1).numpy(), found["whole"]), "not what evaluation stored"
    prepared = module.prepared
    known = prepared.store.labels(label, prepared.label_dict[label], None)
    train, test = prepared.rows("train"), module.rows["test"]
    others = {name: entry[label].predicted for name, entry in controls.items()}
    others["logistic_sqrt"] = square_root_control(prepared.store.counts, train, test, known)
    return {
        "cells": list(stored.cells),
        "truth": stored.labels[label].truth.tolist(),
        "predicted": {name: np.asarray(values).tolist() for name, values in found.items()},
        "controls": {name: np.asarray(values).tolist() for name, values in others.items()},
    }


def square_root_control(counts, train: np.ndarray, test: np.ndarray, known: np.ndarray) -> np.ndarray:
    """L2 logistic regression (C 300) on square roots of the shares of a cell's reads: the linear part of the model, without the model."""
    from sklearn.linear_model import LogisticRegression

    from bmfm_pipeline.training.gene_vectors import square_root_shares

    fitted = LogisticRegression(C=300, max_iter=300).fit(square_root_shares(counts.rows(train)), known[train])
    return fitted.predict(square_root_shares(counts.rows(test)))


def pooled(results: list[dict], name: str) -> np.ndarray:
    """Predictions under a name of COMPARED, of all seeds one after another."""
    arm, _, part = name.rpartition(".")
    rows = [result for result in results if result["arm"] == (arm or "pretrained")]
    return np.concatenate([np.array(row["predicted" if arm else "controls"][part]) for row in rows])


def summarised(results: list[dict], resamples: int = 10_000) -> dict:
    """Scores by seed and paired differences from the results of all arms, which have the same seeds in the same order."""
    from bmfm_pipeline.evaluation.metrics import Metric
    from bmfm_pipeline.evaluation.verdicts import mcnemar, paired_difference

    by_arm = {arm: [row for row in results if row["arm"] == arm] for arm in ARMS}
    rows = by_arm["pretrained"]
    for other in by_arm["scratch"]:
        same = next(row for row in rows if row["seed"] == other["seed"])
        if same["cells"] != other["cells"]:
            raise SystemExit(
                f"seed {other['seed']}: the arms were tested on different cells; remove the folder and start again"
            )
    truth = np.concatenate([np.array(row["truth"]) for row in rows])
    cells = np.concatenate([np.array(row["cells"]) for row in rows])
    names = [f"{arm}.{part}" for arm in ARMS for part in by_arm[arm][0]["predicted"]] + list(rows[0]["controls"])
    starts = np.cumsum([0, *(len(row["cells"]) for row in rows)])
    scores, differences = {}, {}
    for name in names:
        guess = pooled(results, name)
        parts = [slice(start, end) for start, end in itertools.pairwise(starts)]
        scores[name] = {
            metric: [round(Metric(metric, truth[part], guess[part]).value(), 4) for part in parts]
            for metric in ("accuracy", "f1")
        }
    for ours, theirs in COMPARED:
        if ours not in names or theirs not in names:
            continue
        guess, other = pooled(results, ours), pooled(results, theirs)
        entry = {}
        for metric in ("accuracy", "f1"):
            found = paired_difference(metric, truth, guess, other, resamples=resamples, groups=cells)
            entry[metric] = [round(100 * value, 2) for value in (found.value, found.low, found.high)]
        entry["mcnemar_p_by_seed"] = [
            float(f"{mcnemar(truth[a:b], guess[a:b], other[a:b]):.2g}") for a, b in itertools.pairwise(starts)
        ]
        differences[f"{ours} - {theirs}"] = entry
    return {
        "seeds": [row["seed"] for row in rows],
        "test_predictions": len(truth),
        "different_cells": len(np.unique(cells)),
        "mean": {name: {metric: round(float(np.mean(v)), 4) for metric, v in found.items()} for name, found in scores.items()},
        "by_seed": scores,
        "points_and_95_percent_intervals": differences,
        "cpu_s_a_seed": {
            arm: round(float(np.mean([sum(row["cpu_s"][name] for name in row["cpu_s"] if name in ("pretrain", "finetune")) for row in found])), 1)
            for arm, found in by_arm.items()
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?")
    parser.add_argument("--label", default="celltype")
    parser.add_argument("--folder", default="accuracy_study")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    if arguments.file is None:
        print(json.dumps({"benchmark": "accuracy_study", "skipped": "name an h5ad file"}))
        return
    folder = Path(arguments.folder)
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in map(int, arguments.seeds.split(",")):
        for arm in ARMS:
            kept = folder / f"{arm}_{seed}.json"
            if not kept.exists():
                print(f"seed {seed}, {arm}: {ARMS[arm]}", file=sys.stderr, flush=True)
                found = trained(
                    str(Path(arguments.file).resolve()), arguments.label, arm, seed, folder, arguments.overrides
                )
                kept.with_suffix(".part").write_text(json.dumps(found))
                kept.with_suffix(".part").replace(kept)
            result = json.loads(kept.read_text())
            if result["settings"] != arguments.overrides:
                raise SystemExit(
                    f"{kept}: was computed with {result['settings']}; use another --folder for other settings"
                )
            results.append(result)
    line = {"benchmark": "accuracy_study", "file": Path(arguments.file).name, "settings": arguments.overrides}
    print(json.dumps(line | summarised(results) | {"hardware": hardware()}))


if __name__ == "__main__":
    main()
