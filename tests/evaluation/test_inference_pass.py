"""One pass of a model over cells: order, truth by row, unlabelled data, regression, embeddings, nan."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bmfm_pipeline.errors import ConfigError, ResourceError
from bmfm_pipeline.evaluation import predict_loader

NAMES = ["B", "NK", "T"]


class FirstTokens(torch.nn.Module):
    """Scores the class that the first token names, and the value that the second holds."""

    def __init__(self, broken_token=None):
        super().__init__()
        self.broken_token = broken_token

    def forward(self, input_ids, attention_mask, positions):
        first = input_ids[:, 0, 0]
        logits = torch.nn.functional.one_hot(first, 3).float() * 4
        if self.broken_token is not None:
            logits[first == self.broken_token] = torch.nan
        values = input_ids[:, 0, 1:2].float()
        hidden = input_ids[:, 0, :, None].float()
        return SimpleNamespace(logits={"celltype": logits, "age": values}, last_hidden_state=hidden)


def batches(first, rows, size=4):
    ids = torch.tensor(np.stack([first, np.array(first) * 10], axis=1))[:, None, :]
    for start in range(0, len(first), size):
        part = slice(start, start + size)
        yield {
            "input_ids": ids[part],
            "attention_mask": torch.ones_like(ids[part, 0]),
            "cell_name": [f"cell {row}" for row in rows[part]],
            "cell_index": torch.tensor(rows[part]),
        }


def test_predictions_keep_the_order_of_the_loader_and_look_the_truth_up_by_row():
    rows = [7, 3, 9, 0, 5, 2]
    truth = np.arange(10) % 3
    truth[5] = -100
    seen = []
    found = predict_loader(
        FirstTokens(),
        batches([0, 2, 1, 1, 0, 2], rows),
        {"celltype": NAMES},
        truth={"celltype": truth},
        on_batch=seen.append,
    )
    label = found.labels["celltype"]
    assert found.cells == [f"cell {row}" for row in rows]
    assert label.predicted.tolist() == [0, 2, 1, 1, 0, 2]
    assert label.truth.tolist() == truth[rows].tolist()
    assert label.probabilities.sum(axis=1) == pytest.approx(1)
    assert label.probabilities.max(axis=1) == pytest.approx(np.exp(4) / (np.exp(4) + 2))
    assert seen == [4, 6]


class FewAtOnce(FirstTokens):
    """Has room for so many cells."""

    def __init__(self, room: int):
        super().__init__()
        self.room, self.sizes = room, []

    def forward(self, input_ids, attention_mask, positions):
        self.sizes.append(len(input_ids))
        if len(input_ids) > self.room:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(input_ids, attention_mask, positions)


def test_batches_that_do_not_fit_are_halved_and_each_size_fails_once():
    first, rows = [0, 2, 1, 1, 0, 2, 1, 0, 2, 1, 2], list(range(11))
    model = FewAtOnce(2)
    found = predict_loader(model, batches(first, rows, 7), {"celltype": NAMES}, pooling="first_token")
    assert model.sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    assert found.cells == [f"cell {row}" for row in rows]
    assert found.labels["celltype"].predicted.tolist() == first
    assert len(found.embeddings) == 11
    with pytest.raises(ResourceError, match=r"a single cell \(cell 0, 2 tokens\)"):
        predict_loader(FewAtOnce(0), batches(first, rows), {"celltype": NAMES})
    broken = FewAtOnce(2)
    broken.forward = None  # whatever else goes wrong is not tried again
    with pytest.raises(TypeError):
        predict_loader(broken, batches(first, rows), {"celltype": NAMES})


def test_regression_and_embeddings_come_from_the_same_pass():
    found = predict_loader(
        FirstTokens(), batches([1, 2, 0], [0, 1, 2]), {"celltype": NAMES, "age": []}, pooling="first_token"
    )
    assert found.labels["age"].predicted.tolist() == [10.0, 20.0, 0.0]
    assert np.isnan(found.labels["age"].truth).all()
    assert found.labels["celltype"].truth.tolist() == [-100] * 3
    assert found.embeddings.tolist() == [[1.0], [2.0], [0.0]]


def test_no_cells_give_empty_predictions():
    found = predict_loader(FirstTokens(), [], {"celltype": NAMES, "age": []})
    assert found.cells == []
    assert found.labels["celltype"].probabilities.shape == (0, 3)
    assert found.labels["age"].predicted.shape == (0,)


def test_a_model_that_returns_nan_is_refused_instead_of_predicting_the_first_class():
    with pytest.raises(ConfigError, match=r"celltype: the model returns nan for 2 of 5 cells, the first being cell 11"):
        predict_loader(FirstTokens(broken_token=2), batches([0, 2, 1, 2, 0], [10, 11, 12, 13, 14]), {"celltype": NAMES})


@pytest.mark.parametrize(
    "head, message",
    [
        (
            {"name": "celltype", "output_size": 3, "class_names": ("B", "T", "NK")},
            r"celltype: the model was trained with 3 outputs \(B, T, NK\), the data have 3 outputs \(B, NK, T\)",
        ),
        (
            {"name": "celltype", "output_size": 4, "class_names": None},
            "trained with 4 outputs, the data have 3 outputs",
        ),
        ({"name": "state", "output_size": 3, "class_names": tuple(NAMES)}, "no head for 'celltype'; it has state"),
    ],
)
def test_a_head_with_other_classes_than_the_data_is_refused(head, message):
    model = FirstTokens()
    model.config = SimpleNamespace(model_labels=[SimpleNamespace(**head)])
    with pytest.raises(ConfigError, match=message):
        predict_loader(model, batches([0], [0]), {"celltype": NAMES})


def test_a_real_model_with_the_classes_of_the_data_is_accepted():
    from bmfm_pipeline.models import build_model

    model = build_model(
        {
            "model_type": "scbert",
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 8,
        },
        [{"field_name": "genes", "vocab_size": 30}, {"field_name": "expressions", "vocab_size": 30}],
        [{"label_column_name": "celltype"}, {"label_column_name": "age", "is_regression_label": True}],
        label_dict={"celltype": {name: index for index, name in enumerate(NAMES)}},
    )
    batch = {
        "input_ids": torch.randint(5, 30, (2, 2, 6)),
        "attention_mask": torch.ones(2, 6, dtype=torch.long),
        "cell_name": ["x", "y"],
        "cell_index": torch.tensor([1, 0]),
    }
    found = predict_loader(
        model,
        [batch],
        {"celltype": NAMES, "age": []},
        truth={"celltype": np.array([2, 0]), "age": np.array([1.5, 2.5])},
        pooling="mean_pooling",
    )
    assert found.labels["celltype"].truth.tolist() == [0, 2]
    assert found.labels["age"].truth.tolist() == [2.5, 1.5]
    assert found.labels["age"].predicted.shape == (2,)
    assert found.embeddings.shape == (2, 8)
    with pytest.raises(ConfigError, match="the model was trained with 3 outputs"):
        predict_loader(model, [batch], {"celltype": ["T", "NK", "B"]})
