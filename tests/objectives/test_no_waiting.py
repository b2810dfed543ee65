"""Losses and metrics read no value of a tensor and no place of a mask: on an accelerator nothing waits for it.

Fake tensors have shapes and no values, so whatever needs a value of them raises.
"""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from bmfm_pipeline.objectives import ClassTables, Constant, RunningMetrics, build_objectives

TOKENS = {
    "field_name": "tokens",
    "vocab_size": 12,
    "decode_modes": {"token_scores": {}, "regression": {}, "is_zero": {}},
}
LABELS = [
    {"label_column_name": "kind", "n_unique_values": 3, "label_ontology": "cl.obo"},
    {"label_column_name": "tags", "n_unique_values": 3, "is_multilabel": True},
    {"label_column_name": "age", "is_regression_label": True},
]
LOSSES = [
    {"field_name": "tokens", "name": "cross_entropy", "metrics": ["accuracy", "f1", "perplexity"]},
    {"field_name": "tokens", "name": "focal"},
    {"field_name": "tokens", "name": "token_value"},
    {"field_name": "tokens", "name": "mse", "ignore_zero": True, "link_function": "exp", "shrinkage": 0.1},
    {"field_name": "tokens", "name": "is_zero_bce"},
    {"field_name": "tokens", "name": "is_zero_focal", "weight": 0},
    {"label_column_name": "kind", "name": "cross_entropy", "class_weights": "balanced"},
    {"label_column_name": "kind", "name": "ldam", "drw_epochs": 0},
    {"label_column_name": "kind", "name": "hce"},
    {"label_column_name": "tags", "name": "bce_with_logits", "pos_weight": "balanced"},
    {"label_column_name": "age", "name": "mae"},
]


@pytest.fixture
def task():
    tables = {
        "kind": ClassTables(np.array([5, 3, 0]), np.eye(3, dtype=bool)),
        "tags": ClassTables(np.array([[5, 3, 8], [3, 5, 0]])),
    }
    values = {"tokens": np.array([np.nan] * 5 + list(range(7)))}
    return build_objectives(LOSSES, [TOKENS], LABELS, values, class_tables=tables)


def batch():
    logits = {"tokens_token_scores": (2, 6, 12), "tokens_regression": (2, 6, 1), "tokens_is_zero": (2, 6, 1)}
    logits |= {"kind": (2, 3), "tags": (2, 3), "age": (2, 1)}
    labels = {"tokens": torch.randint(5, 12, (2, 6)), "kind": torch.tensor([0, -100])}
    labels |= {"tags": torch.ones(2, 3), "age": torch.ones(2)}
    return {name: torch.randn(shape, requires_grad=True) for name, shape in logits.items()}, labels


def test_losses_and_metrics(task):
    constants = {"tokens": Constant(token=5, shares=torch.ones(12), mean=1.0, median=1.0, zero=False)}
    running = RunningMetrics(task, constants)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        logits, labels = ({name: mode.from_tensor(value) for name, value in part.items()} for part in batch())
        result = task.compute(logits, labels, epoch=0)
        result.total.backward()
        running.update(logits, labels)
        task.predictions(logits)
        # The watch works: what would wait raises.
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            result.total.item()
        with pytest.raises(DynamicOutputShapeException):
            labels["tokens"][labels["tokens"] > 6]
    assert len(result.sums) == len(LOSSES) and logits["tokens_token_scores"].grad is not None


def test_the_same_with_values(task):
    """What runs above is right too: every loss has a value, and metrics come out for every key."""
    logits, labels = batch()
    result = task.compute(logits, labels, epoch=0)
    assert torch.isfinite(result.total) and len(result.parts) == len(LOSSES)
    running = RunningMetrics(task)
    running.update(logits, labels)
    assert {name.split("_")[0] for name in running.compute()} == {"tokens", "kind", "tags", "age"}
