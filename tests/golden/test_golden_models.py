"""Forward passes of every golden network, discovered from the folders."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bmfm_pipeline.models import BACKBONES, build_model, load_weights, pool

ATOL, RTOL = 2e-5, 1e-4
POOLING_NAMES = ("first_token", "mean_pooling", "pooling_layer")
# What the README of the golden networks lists as peculiar to them is computed on request only.
AS_PUBLISHED = {name: {"legacy_attention": True} for name in ("scperformer", "scnystromformer", "scmodernbert")}


@pytest.fixture(scope="module")
def cases(golden_dir):
    """(name, configuration, folder) of every case."""
    paths = sorted((golden_dir / "models").glob("*/config.json"))
    assert paths
    return [(path.parent.name, json.loads(path.read_text()), path.parent) for path in paths]


def test_every_backbone_has_cases(cases):
    assert {config["peer_model_type"] for _, config, _ in cases} == set(BACKBONES)


def golden_model(config, folder, **changes):
    options = {key: value for key, value in config["model"].items() if key != "pad_token_id"}
    model = build_model(
        {"model_type": config["peer_model_type"], **options, **changes},
        config["fields"],
        config["label_columns"],
        pad_token_id=config["model"]["pad_token_id"],
    ).eval()
    report = load_weights(model, load_file(folder / "weights.safetensors"), "strict")
    assert report.clean and set(report.loaded) == set(config["state_dict"])
    # Random features are stored beside the weights that do not hold them.
    if (folder / "projections.safetensors").exists():
        assert len(report.notes) == 1
        weights = load_file(folder / "weights.safetensors") | load_file(folder / "projections.safetensors")
        report = load_weights(model, weights, "strict")
    assert report.notes == []
    return model


def pooling_method(name: str):
    """`first_token_mean_pooling_1` -> ["first_token", "mean_pooling", 1]"""
    parts, rest = [], name
    while rest:
        known = next((x for x in POOLING_NAMES if rest == x or rest.startswith(x + "_")), None)
        piece = known or rest.split("_")[0]
        parts.append(piece if known else int(piece))
        rest = rest[len(piece) :].removeprefix("_")
    return parts[0] if len(parts) == 1 else parts


def close(got, expected, what):
    got = got.numpy()
    assert got.shape == expected.shape, what
    assert np.allclose(got, expected, atol=ATOL, rtol=RTOL), f"{what}: differs by {np.abs(got - expected).max():.2e}"


def test_every_case(cases, say):
    for name, config, folder in cases:
        model = golden_model(config, folder, **AS_PUBLISHED.get(config["peer_model_type"], {}))
        shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
        features = {key: shape for key, shape in shapes.items() if key.endswith("projection_matrix")}
        assert shapes == config["state_dict"] | features, name
        inputs, expected = np.load(folder / "inputs.npz"), np.load(folder / "expected.npz")
        ids, mask = torch.from_numpy(inputs["input_ids"]), torch.from_numpy(inputs["attention_mask"])
        with torch.no_grad():
            output = model(ids, mask, output_hidden_states=True)
        assert list(output.logits) == config["output_key_order"], name
        assert len(output.hidden_states) == config["n_hidden_states"], name
        for key in expected.files:
            kind, _, rest = key.replace("__", " ", 1).partition(" ")
            if kind == "logits":
                # Only position 0 of a whole-cell head means anything, and only that is computed here.
                wanted = expected[key][:, :1] if rest.endswith("_wced") else expected[key]
                close(output.logits[rest], wanted, f"{name} {key}")
            elif kind == "pooling":
                close(pool(output, mask, pooling_method(rest)), expected[key], f"{name} {key}")
            elif key == "embeddings":
                close(output.embeddings, expected[key], f"{name} {key}")
            else:
                which = {"hidden_first": 0, "hidden_last": -1}.get(key)
                which = int(key.removeprefix("hidden_")) if which is None else which
                close(output.hidden_states[which], expected[key], f"{name} {key}")
    say(f"golden models: {len(cases)} cases reproduced")


def test_padding_cut_off_changes_nothing(cases):
    for name, config, folder in cases:
        model = golden_model(config, folder)
        inputs = np.load(folder / "inputs.npz")
        ids, mask = torch.from_numpy(inputs["input_ids"]), torch.from_numpy(inputs["attention_mask"])
        with torch.no_grad():
            together = model(ids, mask)
            for row in range(len(ids)):
                length = int(mask[row].sum())
                alone = model(ids[row : row + 1, :, :length], mask[row : row + 1, :length])
                for key, value in alone.logits.items():
                    batch_value = together.logits[key][row : row + 1]
                    if value.dim() == 3 and not key.endswith("_wced"):
                        batch_value = batch_value[:, :length]
                    assert torch.allclose(value, batch_value, atol=1e-5), (name, row, key)
