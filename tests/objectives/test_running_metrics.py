"""Running metrics against scikit-learn on the same predictions, and the constant guess beside them."""

import numpy as np
import pytest
import torch
from sklearn import metrics as reference

from bmfm_pipeline.objectives import ClassTables, Constant, RunningMetrics, build_objectives, fit_constants

TOKENS = {"field_name": "expressions", "vocab_size": 12, "decode_modes": {"token_scores": {}}}
NUMBERS = {
    "field_name": "expressions",
    "tokenization_strategy": "continuous_value_encoder",
    "decode_modes": {"regression": {}, "is_zero": {}},
}
ALL_CLASS_METRICS = [
    {"name": name} for name in ("accuracy", "f1", "precision", "recall", "mcc", "perplexity", "confusion_matrix")
]


def batches(count, make):
    generator = torch.Generator().manual_seed(0)
    return [make(generator) for _ in range(count)]


def token_batch(generator):
    labels = torch.randint(5, 12, (4, 20), generator=generator)
    labels[torch.rand(4, 20, generator=generator) < 0.5] = 6  # one common bin
    logits = torch.randn(4, 20, 12, generator=generator)
    logits.scatter_add_(-1, labels.unsqueeze(-1), torch.full((4, 20, 1), 1.5))
    labels[torch.rand(4, 20, generator=generator) < 0.3] = -100
    return {"expressions_token_scores": logits}, {"expressions": labels}


def test_class_metrics_equal_scikit_learn_over_all_batches():
    task = build_objectives(
        [{"field_name": "expressions", "name": "cross_entropy", "metrics": ALL_CLASS_METRICS}], [TOKENS]
    )
    # Fitted to other cells than those that are scored, in which another token may be the commonest.
    training = torch.tensor([[7, 7, 7, 6, -100]])
    running = RunningMetrics(task, fit_constants(task, [{"expressions": training}]))
    seen = batches(5, token_batch)
    for logits, labels in seen:
        running.update(logits, labels)
    logits = torch.cat([x["expressions_token_scores"].flatten(0, 1) for x, _ in seen])
    truth = torch.cat([y["expressions"].flatten() for _, y in seen])
    logits, truth = logits[truth != -100], truth[truth != -100].numpy()
    guess = logits.argmax(-1).numpy()
    got = running.compute()
    expected = {
        "accuracy": reference.accuracy_score(truth, guess),
        "f1": reference.f1_score(truth, guess, average="macro", zero_division=0),
        "precision": reference.precision_score(truth, guess, average="macro", zero_division=0),
        "recall": reference.recall_score(truth, guess, average="macro", zero_division=0),
        "mcc": reference.matthews_corrcoef(truth, guess),
        "perplexity": np.exp(reference.log_loss(truth, torch.softmax(logits.double(), -1).numpy(), labels=range(12))),
    }
    for name, value in expected.items():
        assert got[f"expressions_{name}"] == pytest.approx(value, rel=1e-5), name
    always = np.full_like(truth, 7)
    for name, score in (
        ("f1", reference.f1_score),
        ("precision", reference.precision_score),
        ("recall", reference.recall_score),
    ):
        expected = score(truth, always, average="macro", zero_division=0)
        assert got[f"expressions_constant_{name}"] == pytest.approx(expected), name
    assert got["expressions_constant_accuracy"] == pytest.approx(reference.accuracy_score(truth, always))
    assert got["expressions_constant_mcc"] == reference.matthews_corrcoef(truth, always) == 0
    shares = np.array([1.0] * 6 + [2, 4] + [1] * 4) / 16  # one of each token added to the four seen
    assert got["expressions_constant_perplexity"] == pytest.approx(
        np.exp(reference.log_loss(truth, np.tile(shares, (len(truth), 1)), labels=range(12))), rel=1e-6
    )
    assert running.matrices()["expressions"].sum() == len(truth)


def number_batch(generator):
    labels = torch.rand(4, 20, generator=generator) * 5
    labels[torch.rand(4, 20, generator=generator) < 0.4] = 0.0
    logits = {
        "expressions_regression": (labels + torch.randn(4, 20, generator=generator)).unsqueeze(-1),
        "expressions_is_zero": (2.0 * (labels == 0) - 1 + torch.randn(4, 20, generator=generator)).unsqueeze(-1),
    }
    labels[torch.rand(4, 20, generator=generator) < 0.3] = -100
    return logits, {"expressions": labels}


def test_number_metrics_use_the_combined_prediction():
    metrics = [{"name": name} for name in ("mse", "mae", "pcc", "nonzero_confusion_matrix")]
    losses = [
        {"field_name": "expressions", "name": "mse", "ignore_zero": True, "metrics": metrics},
        {"field_name": "expressions", "name": "is_zero_bce"},
    ]
    task = build_objectives(losses, [NUMBERS])
    training = np.array([0.0, 0.0, 0.0, 1.0, 5.0], dtype=np.float32)
    constants = fit_constants(task, [{"expressions": torch.from_numpy(training)[None]}])
    assert constants == {"expressions": Constant(mean=1.2, median=0.0, zero=True)}
    running = RunningMetrics(task, lambda: constants)
    seen = batches(5, number_batch)
    for logits, labels in seen:
        running.update(logits, labels)
    truth = torch.cat([y["expressions"].flatten() for _, y in seen])
    guess = torch.cat([task.predictions(x)["expressions"].flatten() for x, _ in seen])
    guess, truth = guess[truth != -100].double().numpy(), truth[truth != -100].double().numpy()
    got = running.compute()
    assert got["expressions_mse"] == pytest.approx(reference.mean_squared_error(truth, guess), rel=1e-6)
    assert got["expressions_mae"] == pytest.approx(reference.mean_absolute_error(truth, guess), rel=1e-6)
    assert got["expressions_pcc"] == pytest.approx(np.corrcoef(truth, guess)[0, 1], rel=1e-6)
    assert got["expressions_constant_mse"] == pytest.approx(((truth - 1.2) ** 2).mean(), rel=1e-6)
    assert got["expressions_constant_mae"] == pytest.approx(truth.mean(), rel=1e-6)
    assert got["expressions_constant_pcc"] == 0
    assert got["expressions_zero_accuracy"] == pytest.approx(((truth == 0) == (guess == 0)).mean())
    assert got["expressions_constant_zero_accuracy"] == pytest.approx((truth == 0).mean())


def test_the_constant_of_nonzero_values_is_fitted_to_nonzero_values():
    losses = [{"field_name": "expressions", "name": "mae", "ignore_zero": True, "metrics": [{"name": "mae"}]}]
    task = build_objectives(losses, [NUMBERS])
    constants = fit_constants(task, [{"expressions": torch.tensor([[0.0, 0.0, 2.0, 3.0, 10.0, -100.0]])}])
    assert constants["expressions"].median == 3.0 and constants["expressions"].zero is False
    running = RunningMetrics(task, constants)
    running.update({"expressions_regression": torch.zeros(1, 3, 1)}, {"expressions": torch.tensor([[0.0, 2.0, 4.0]])})
    got = running.compute()
    assert (got["expressions_mae"], got["expressions_constant_mae"]) == (3.0, 1.0)


def test_classes_and_numbers_of_one_field_are_both_scored():
    field = TOKENS | {"decode_modes": {"token_scores": {}, "regression": {}}}
    losses = [
        {"field_name": "expressions", "name": "cross_entropy"},
        {"field_name": "expressions", "name": "mse", "metrics": ["mse"]},
    ]
    values = [np.nan] * 5 + list(range(7))
    task = build_objectives(losses, [field], token_values={"expressions": values})
    running = RunningMetrics(task)
    scores = torch.nn.functional.one_hot(torch.tensor([[5, 6, 8]]), 12).float()
    logits = {"expressions_token_scores": scores, "expressions_regression": torch.tensor([[[0.0], [1.0], [5.0]]])}
    running.update(logits, {"expressions": torch.tensor([[5, 6, 8]])})
    got = running.compute()
    assert got["expressions_accuracy"] == 1.0 and got["expressions_mse"] == pytest.approx(4 / 3)


def test_a_confident_constant_of_a_large_vocabulary_is_scored_where_no_target_has_its_token():
    task = build_objectives([{"field_name": "expressions", "name": "cross_entropy"}], [TOKENS])
    running = RunningMetrics(task, fit_constants(task, [{"expressions": torch.tensor([[11, 11]])}]))
    running.update({"expressions_token_scores": torch.zeros(1, 2, 12)}, {"expressions": torch.tensor([[5, 6]])})
    got = running.compute()
    assert got["expressions_constant_accuracy"] == 0 and got["expressions_constant_f1"] == 0


def test_a_lone_is_zero_loss_is_not_inverted():
    task = build_objectives([{"field_name": "expressions", "name": "is_zero_bce"}], [NUMBERS])
    running = RunningMetrics(task)
    running.update(
        {"expressions_is_zero": torch.tensor([[[5.0], [5.0], [-5.0]]])},
        {"expressions": torch.tensor([[0.0, 0.0, 3.0]])},
    )
    assert running.compute()["expressions_zero_accuracy"] == 1.0
    assert running.matrices()["expressions_zero"].tolist() == [[1, 0], [0, 2]]


def test_states_of_two_processes_add_up():
    task = build_objectives(
        [{"field_name": "expressions", "name": "cross_entropy", "metrics": ALL_CLASS_METRICS}], [TOKENS]
    )
    one, two, whole = RunningMetrics(task), RunningMetrics(task), RunningMetrics(task)
    for index, (logits, labels) in enumerate(batches(4, token_batch)):
        (one if index < 2 else two).update(logits, labels)
        whole.update(logits, labels)
    one.states = {name: value + two.states[name] for name, value in one.states.items()}
    assert one.compute() == pytest.approx(whole.compute())
    whole.reset()
    assert whole.compute() == {}


def test_positions_give_the_same_metrics():
    task = build_objectives([{"field_name": "expressions", "name": "cross_entropy"}], [TOKENS])
    full, some = RunningMetrics(task), RunningMetrics(task)
    for logits, labels in batches(2, token_batch):
        full.update(logits, labels)
        where = task.positions(labels)
        some.update({k: v.flatten(0, 1)[where["expressions"]] for k, v in logits.items()}, labels, where)
    assert full.compute() == some.compute()


def test_multilabel_and_ontology_accuracy_skip_what_is_unknown():
    task = build_objectives(
        [{"label_column_name": "tags", "name": "bce_with_logits"}],
        [],
        [{"label_column_name": "tags", "n_unique_values": 2}],
    )
    running = RunningMetrics(task)
    running.update(
        {"tags": torch.tensor([[1.0, -1.0], [1.0, 1.0]])}, {"tags": torch.tensor([[1.0, 1.0], [-100.0, -100.0]])}
    )
    assert running.compute() == {"tags_accuracy": 0.5}
    task = build_objectives(
        [{"label_column_name": "cell", "name": "hce"}], [], [{"label_column_name": "cell", "n_unique_values": 3}]
    )
    running = RunningMetrics(task)
    allowed = torch.tensor([[1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [-100.0] * 4])
    running.update({"cell": torch.tensor([[0.0, 2.0, 1.0]] * 4)}, {"cell": allowed})
    assert running.compute() == {"cell_hierarchical_accuracy": 0.5}


def test_a_class_within_the_label_counts_in_the_hierarchical_accuracy_only():
    columns = [{"label_column_name": "cell", "n_unique_values": 3, "label_ontology": "cl.obo"}]
    allowed = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1]], dtype=bool)  # class 0 stands for class 1 too
    task = build_objectives(
        [{"label_column_name": "cell"}], [], columns, class_tables={"cell": ClassTables(allowed=allowed)}
    )
    running = RunningMetrics(task)
    # Said class 1 of a cell of class 0, class 0 of a cell of class 1, class 2 of its own, and of an unlabelled one.
    scores = torch.eye(3)[[1, 0, 2, 2]]
    running.update({"cell": scores}, {"cell": torch.tensor([0, 1, 2, -100])})
    got = running.compute()
    assert got["cell_accuracy"] == pytest.approx(1 / 3) and got["cell_hierarchical_accuracy"] == pytest.approx(2 / 3)


def test_metrics_that_need_every_score_are_named():
    losses = [
        {"label_column_name": "celltype", "name": "cross_entropy", "metrics": [{"name": "auc"}, {"name": "accuracy"}]}
    ]
    running = RunningMetrics(build_objectives(losses, [], [{"label_column_name": "celltype", "n_unique_values": 3}]))
    assert running.left_out == ["celltype_auc"]


def test_large_vocabularies_keep_counts_only():
    genes = {"field_name": "genes", "vocab_size": 5000}
    task = build_objectives([{"field_name": "genes", "name": "cross_entropy"}], [genes])
    running = RunningMetrics(task, fit_constants(task, [{"genes": torch.tensor([[4999, 4999, 5]])}]))
    running.update({"genes_token_scores": torch.randn(2, 3, 5000)}, {"genes": torch.randint(5, 5000, (2, 3))})
    assert set(running.compute()) == {"genes_accuracy", "genes_constant_accuracy"}
    assert max(value.numel() for value in running.states.values()) == 5000
