"""Every golden loss value, gradient checksum, total and prediction checksum, discovered from the json files of the folder."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bmfm_pipeline.objectives import build_objectives
from bmfm_pipeline.objectives.losses import FUNCTIONS

REL, ABS = 1e-5, 1e-6
WCED_FIELD = {
    "field_name": "expressions",
    "decode_modes": {"wced": {"vocab_field": "genes", "logit_outputs": ["mse", "is_zero_bce"]}},
}


@pytest.fixture(scope="module")
def suites(golden_dir) -> list[tuple[dict, dict, dict]]:
    """(expected, logits, labels) of every pair of expected*.json and inputs*.npz."""
    found = []
    for path in sorted((golden_dir / "losses").glob("expected*.json")):
        with np.load(path.with_name(path.name.replace("expected", "inputs")).with_suffix(".npz")) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        split = {
            kind: {k.removeprefix(kind): v for k, v in tensors.items() if k.startswith(kind)}
            for kind in ("logits__", "labels__")
        }
        found.append((json.loads(path.read_text()), split["logits__"], split["labels__"]))
    assert found
    return found


def special_case(entry: dict, logits: dict, labels: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of the entries whose labels are derived from others, as the entry's own words say."""
    kind, _, source = entry["labels"].partition(" ")
    if kind == "ALL_IGNORED_LIKE":
        return logits[entry["logits"]], torch.full_like(labels[source], -100)
    if kind == "ALL_ZERO_FLAG_LIKE":
        target = labels[source].clone()
        target[:, -1] = 0
        return logits[entry["logits"]], target
    if kind == "FIRST_ROW_-100":
        target = labels[source].clone()
        target[0] = -100
        return logits[entry["logits"]], target
    if kind.startswith("ROW0_ALLOWED"):
        scores, target = logits["onto"].clone(), labels["onto"].clone()
        scores[0] = -1000.0
        scores[0, :2] = 1000.0
        target[0] = 0
        target[0, [0, 1, -1]] = 1
        return scores, target
    return logits[entry["logits"]], labels[entry["labels"]]


def evaluate(entry: dict, scores: torch.Tensor, target: torch.Tensor, token_values) -> tuple[float, torch.Tensor]:
    """Value and gradient by the library, through one task whose total is that loss."""
    is_label = entry["logits"] in ("celltype", "score", "multi", "onto", "ROW0_LOGITS_[1000,1000,-1000...]")
    scores = scores.clone().requires_grad_(True)
    if entry["wced_output_index"] is not None:
        outputs = ["mse", "is_zero_bce"]
        outputs[entry["wced_output_index"]] = entry["loss"]
        field = {"field_name": "x", "decode_modes": {"wced": {"vocab_field": "genes", "logit_outputs": outputs}}}
        loss = {"field_name": "x", "name": entry["loss"], "wced_target": "all_genes", **entry["kwargs"]}
        objectives = build_objectives([loss], [field])
        result = objectives.compute({"x_wced": scores}, {"x": {"all": target}})
    elif is_label:
        loss = {"label_column_name": "x", "name": entry["loss"], **entry["kwargs"]}
        objectives = build_objectives(
            [loss], [], [{"label_column_name": "x", "is_regression_label": entry["output_size"] == 1}]
        )
        result = objectives.compute({"x": scores}, {"x": target})
    else:
        strategy = "continuous_value_encoder" if target.is_floating_point() else "tokenize"
        loss = {"field_name": "x", "name": entry["loss"], **entry["kwargs"]}
        objectives = build_objectives(
            [loss], [{"field_name": "x", "tokenization_strategy": strategy}], token_values={"x": token_values}
        )
        suffix = objectives.tasks[0].logits_key
        result = objectives.compute({suffix: scores}, {"x": target})
    result.total.backward()
    key = objectives.tasks[0].loss_key
    value = float(result.parts[key]) if key in result.parts else math.nan
    if not math.isnan(value):
        assert float(result.total.detach()) == pytest.approx(value, rel=1e-6, abs=1e-7)
    return value, scores.grad


def test_every_single_loss(suites, say):
    checked = faults = 0
    for expected, logits, labels in suites:
        token_values = [np.nan if value is None else value for value in expected["token_values"]]
        for entry in expected["single"]:
            assert entry["loss"] in FUNCTIONS, entry["loss"]
            scores, target = special_case(entry, logits, labels)
            value, gradient = evaluate(entry, scores, target, token_values)
            if "DO NOT REPRODUCE" in entry["note"]:
                faults += 1
                valid = (target != -100).all(dim=-1)
                rest = (
                    torch.nn.functional.binary_cross_entropy_with_logits(scores[valid], target[valid])
                    if valid.any()
                    else math.nan
                )
                assert value == pytest.approx(float(rest), rel=REL, abs=ABS, nan_ok=True)
                assert gradient[~valid].abs().sum() == 0
                continue
            what = f"{entry['loss']} {entry['kwargs']} on {entry['labels']}"
            assert value == pytest.approx(float(entry["value"]), rel=REL, abs=ABS, nan_ok=True), what
            if entry["grad_abs_sum"] is not None:
                assert float(gradient.double().abs().sum()) == pytest.approx(entry["grad_abs_sum"], rel=REL, abs=ABS), (
                    what
                )
                assert float((gradient.double() ** 2).sum()) == pytest.approx(entry["grad_sq_sum"], rel=REL, abs=ABS), (
                    what
                )
            else:
                assert torch.isfinite(gradient).all(), what
            checked += 1
    say(f"golden losses: {checked} values with gradients checked, {faults} marked faults answered correctly instead")
    assert checked > 100


def total_labels(case: dict, labels: dict) -> dict:
    chosen = dict(labels)
    words = case["labels"]
    if words == "continuous":
        chosen["expressions"] = labels["expressions_continuous"]
    elif words == "wced":
        chosen["expressions"] = {
            name.removeprefix("wced_"): value for name, value in labels.items() if name.startswith("wced_")
        }
    elif words == "all -100":
        chosen = {name: torch.full_like(value, -100) for name, value in labels.items()}
    elif words == "only celltype valid":
        chosen = {name: value if name == "celltype" else torch.full_like(value, -100) for name, value in labels.items()}
    elif words.startswith("score all -100"):
        chosen["score"] = torch.full_like(labels["score"], -100)
    else:
        assert words == "tokenized", f"unknown label set {words!r}"
    return chosen


def test_every_total(suites, say):
    checked = 0
    for expected, logits, labels in suites:
        token_values = [np.nan if value is None else value for value in expected["token_values"]]
        columns = [
            {"label_column_name": name, "is_regression_label": name == "score"}
            for name in ("celltype", "score", "multi", "onto")
        ]
        for case in expected["totals"]:
            fields = [
                {"field_name": "genes"},
                WCED_FIELD if case["labels"] == "wced" else {"field_name": "expressions"},
            ]
            if case["labels"] == "continuous":
                fields[1] = {"field_name": "expressions", "tokenization_strategy": "continuous_value_encoder"}
            objectives = build_objectives(case["loss_config"], fields, columns, {"expressions": token_values})
            assert objectives.names == case["names"], case["case"]
            assert objectives.metric_keys == case["metric_keys"], case["case"]
            chosen = total_labels(case, labels)
            result = objectives.compute(logits, chosen)
            got = {name: float(value) for name, value in result.parts.items()} | {"loss": float(result.total)}
            assert got == pytest.approx(case["losses"], rel=REL, abs=ABS), case["case"]
            for key, prediction in objectives.predictions(logits).items():
                sums = case["prediction_checksums"][key]
                assert list(prediction.shape) == sums["shape"], (case["case"], key)
                assert float(prediction.double().sum()) == pytest.approx(sums["sum"], rel=1e-5, abs=1e-5), (
                    case["case"],
                    key,
                )
                assert float((prediction.double() ** 2).sum()) == pytest.approx(sums["sq"], rel=1e-5, abs=1e-5), (
                    case["case"],
                    key,
                )
            assert set(objectives.predictions(logits)) == set(case["prediction_checksums"])
            pooled = objectives.pool(result.sums, result.counts)
            assert pooled == pytest.approx(got, rel=REL, abs=ABS)
            checked += 1
    say(f"golden losses: {checked} weighted totals checked")


def test_folder_is_covered(golden_dir):
    files = {path.name for path in Path(golden_dir / "losses").iterdir()}
    assert {name for name in files if name.endswith(".json")} == {name for name in files if name.startswith("expected")}
