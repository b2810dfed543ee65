"""Class-balanced, LDAM and positive weights against their formulas and torch's own; classes without training cells."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.objectives import ClassTables, build_objectives
from bmfm_pipeline.objectives.balancing import class_margins, class_weights, positive_weights

COUNTS = np.array([900, 90, 9, 0])  # the last class has no training cell
COLUMN = {"label_column_name": "celltype", "n_unique_values": 4}
TABLES = {"celltype": ClassTables(COUNTS)}


def objectives(*losses, tables=TABLES, column=COLUMN, **options):
    entries = [{"label_column_name": "celltype", **loss} for loss in losses]
    return build_objectives(entries, [], [column], class_tables=tables, **options)


def batch(rows=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, 4, generator=generator)
    labels = torch.multinomial(torch.tensor([0.6, 0.3, 0.1, 0.0]), rows, replacement=True, generator=generator)
    labels[::7] = -100
    return {"celltype": scores}, {"celltype": labels}


def value(task, logits, labels, **options):
    return float(task.compute(logits, labels, **options).total.detach())


class TestWeights:
    def test_balanced_is_one_over_n(self):
        weights = class_weights(COUNTS, "balanced")
        assert weights[0] / weights[2] == pytest.approx(9 / 900) and weights[3] == 0
        assert weights[:3].mean() == pytest.approx(1)

    def test_effective_number_is_the_published_formula(self):
        weights = class_weights(COUNTS, "effective_number", beta=0.99)
        published = np.array([(1 - 0.99) / (1 - 0.99**n) for n in COUNTS[:3]])
        assert weights[:3] == pytest.approx(published / published.mean()) and weights[3] == 0

    def test_beta_goes_from_no_weights_to_balanced_ones(self):
        assert class_weights(COUNTS, "effective_number", beta=0.0)[:3] == pytest.approx([1, 1, 1])
        near_one = class_weights(COUNTS, "effective_number", beta=1 - 1e-12)
        assert near_one == pytest.approx(class_weights(COUNTS, "balanced"), rel=1e-6)

    def test_margins_are_the_fourth_root(self):
        margins = class_margins(COUNTS, 0.5)
        assert margins == pytest.approx([0.5 * (9 / 900) ** 0.25, 0.5 * 0.1**0.25, 0.5, 0.5])

    def test_positives_of_a_class_that_no_cell_or_every_cell_has(self):
        assert positive_weights(np.array([[90, 100, 0], [10, 0, 100]])).tolist() == [9.0, 1.0, 1.0]

    def test_no_labelled_training_cell_at_all(self):
        nobody = np.zeros(3)
        assert class_weights(nobody, "balanced").tolist() == [0, 0, 0]
        assert class_margins(nobody, 0.5).tolist() == [0.5] * 3
        assert positive_weights(np.zeros((2, 3))).tolist() == [1, 1, 1]


class TestLosses:
    @pytest.mark.parametrize("method", ["balanced", "effective_number"])
    def test_cross_entropy_is_torchs_weighted_mean(self, method):
        logits, labels = batch()
        weights = torch.tensor(class_weights(COUNTS, method), dtype=torch.float32)
        expected = F.cross_entropy(logits["celltype"], labels["celltype"], weights, label_smoothing=0.1)
        task = objectives({"name": "cross_entropy", "class_weights": method, "label_smoothing": 0.1})
        assert value(task, logits, labels) == pytest.approx(float(expected), rel=1e-6)

    def test_focal_of_gamma_0_is_the_same(self):
        logits, labels = batch()
        entropy, focal = (
            objectives({"name": name, "class_weights": "balanced", **more})
            for name, more in (("cross_entropy", {}), ("focal", {"focal_gamma": 0.0}))
        )
        assert value(focal, logits, labels) == pytest.approx(value(entropy, logits, labels), rel=1e-5)

    def test_batches_whose_weights_sum_to_less_than_one_are_pooled_exactly(self):
        logits, labels = batch(8)
        task = objectives({"name": "cross_entropy", "class_weights": "balanced"})
        halves = [
            task.compute({k: v[rows] for k, v in logits.items()}, {k: v[rows] for k, v in labels.items()})
            for rows in (slice(0, 2), slice(2, 8))
        ]
        key = "celltype_cross_entropy_loss"
        assert 0 < float(halves[0].counts[key]) < 1
        sums, counts = ({key: sum(float(getattr(x, part)[key]) for x in halves)} for part in ("sums", "counts"))
        assert task.pool(sums, counts)["loss"] == pytest.approx(value(task, logits, labels), rel=1e-6)

    def test_a_class_without_training_cells_does_not_count_and_divides_by_nothing(self):
        logits = {"celltype": torch.randn(3, 4, requires_grad=True)}
        task = objectives({"name": "cross_entropy", "class_weights": "effective_number"})
        result = task.compute(logits, {"celltype": torch.tensor([3, 3, 3])})
        result.total.backward()
        assert float(result.total.detach()) == 0 and not result.parts and logits["celltype"].grad.abs().sum() == 0

    def test_ldam_lowers_the_true_score_by_its_margin(self):
        logits, labels = batch()
        known = labels["celltype"] >= 0
        margins = torch.tensor(class_margins(COUNTS, 0.4), dtype=torch.float32)
        lowered = logits["celltype"] - F.one_hot(labels["celltype"].clamp(min=0), 4) * margins
        expected = F.cross_entropy(5 * lowered[known], labels["celltype"][known])
        task = objectives({"name": "ldam", "max_margin": 0.4, "scale": 5.0})
        assert value(task, logits, labels) == pytest.approx(float(expected), rel=1e-6)

    def test_ldam_is_weighted_from_the_epoch_that_is_asked_for(self):
        logits, labels = batch()
        plain = objectives({"name": "ldam"})
        late = objectives({"name": "ldam", "drw_epochs": 2, "beta": 0.999})
        before, after = (value(late, logits, labels, epoch=epoch) for epoch in (1, 2))
        assert before == value(plain, logits, labels) != after
        assert value(late, logits, labels) == after  # validations are alike in all epochs
        assert late.counts(labels, epoch=1)["celltype_ldam_loss"] == (labels["celltype"] >= 0).sum()

    def test_pos_weight_is_torchs(self):
        column = {"label_column_name": "celltype", "n_unique_values": 3, "is_multilabel": True}
        tables = {"celltype": ClassTables(np.array([[90, 50, 100], [10, 50, 0]]))}
        scores, labels = torch.randn(6, 3), (torch.rand(6, 3) < 0.4).float()
        labels[0] = -100
        for asked, weights in (("balanced", [9.0, 1.0, 1.0]), (2.5, [2.5])):
            expected = F.binary_cross_entropy_with_logits(scores[1:], labels[1:], pos_weight=torch.tensor(weights))
            task = objectives({"name": "bce_with_logits", "pos_weight": asked}, tables=tables, column=column)
            assert value(task, {"celltype": scores}, {"celltype": labels}) == pytest.approx(float(expected), rel=1e-6)

    def test_sizes_that_are_needed_and_not_given_are_named(self):
        for loss in ({"name": "ldam"}, {"name": "focal", "class_weights": "balanced"}):
            with pytest.raises(ConfigError, match="number of training cells of each class of celltype"):
                objectives(loss, tables=None)

    def test_weights_help_a_rare_class(self):
        """A linear model on two overlapping groups, 4 in 100 cells being rare: recall of the rare class rises."""
        generator = torch.Generator().manual_seed(0)
        labels = (torch.rand(2000, generator=generator) < 0.04).long()
        x = torch.randn(2000, 2, generator=generator) + labels[:, None] * 1.2
        tables = {"celltype": ClassTables(np.bincount(labels.numpy()))}
        column = {"label_column_name": "celltype", "n_unique_values": 2}
        recalls = {}
        for name, loss in {
            "plain": {"name": "cross_entropy"},
            "balanced": {"name": "cross_entropy", "class_weights": "balanced"},
            "focal": {"name": "focal", "class_weights": "effective_number"},
            "ldam": {"name": "ldam", "drw_epochs": 0},
        }.items():
            model = torch.nn.Linear(2, 2)
            torch.nn.init.zeros_(model.weight)
            torch.nn.init.zeros_(model.bias)
            optimizer = torch.optim.LBFGS(model.parameters(), max_iter=60)
            task = objectives(loss, tables=tables, column=column)

            def closure(model=model, task=task, optimizer=optimizer):
                optimizer.zero_grad()
                total = task.compute({"celltype": model(x)}, {"celltype": labels}).total
                total.backward()
                return total

            optimizer.step(closure)
            recalls[name] = float((model(x).argmax(-1) == 1)[labels == 1].float().mean())
        assert recalls["plain"] < 0.2
        assert min(recalls["balanced"], recalls["focal"], recalls["ldam"]) > 0.6


class TestWeightZero:
    def test_it_is_logged_and_nothing_is_learned_from_it(self):
        columns = [COLUMN, {"label_column_name": "donor", "n_unique_values": 4}]
        losses = [{"label_column_name": "celltype"}, {"label_column_name": "donor", "weight": 0}]
        logits, labels = batch()
        scores = {"celltype": logits["celltype"].requires_grad_(), "donor": torch.randn(50, 4, requires_grad=True)}
        task = build_objectives(losses, [], columns)
        alone = build_objectives(losses[:1], [], columns)
        result = task.compute(scores, labels | {"donor": labels["celltype"]})
        assert float(result.parts["donor_cross_entropy_loss"]) > 0
        assert float(result.total.detach()) == value(alone, logits, labels)
        result.total.backward()
        assert scores["donor"].grad.abs().sum() == 0 and scores["celltype"].grad.abs().sum() > 0

    def test_nan_in_it_stays_in_it(self):
        losses = [{"name": "cross_entropy"}, {"name": "focal", "weight": 0}]
        logits, labels = batch()
        columns = [COLUMN, {"label_column_name": "donor", "n_unique_values": 4}]
        task = build_objectives(
            [losses[0] | {"label_column_name": "celltype"}, losses[1] | {"label_column_name": "donor"}], [], columns
        )
        scores = torch.full((50, 4), math.nan, requires_grad=True)
        result = task.compute(logits | {"donor": scores}, labels | {"donor": labels["celltype"]})
        result.total.backward()
        assert math.isnan(result.values["donor_focal_loss"]) and math.isfinite(result.total)
        assert scores.grad.abs().sum() == 0
        pooled = task.pool(result.sums, result.counts)
        assert math.isfinite(pooled["loss"])


def test_counts_are_known_before_scores():
    """What a step weighs is found in labels alone, for every loss."""
    losses = [
        {"name": "cross_entropy", "class_weights": "balanced"},
        {"name": "focal", "class_weights": "effective_number", "focal_gamma": 1.0},
        {"name": "ldam", "drw_epochs": 0},
        {"name": "hce"},
    ]
    column = COLUMN | {"label_ontology": "x.obo"}
    task = objectives(*losses, tables={"celltype": ClassTables(COUNTS, np.eye(4, dtype=bool))}, column=column)
    logits, labels = batch()
    assert task.counts(labels, epoch=0) == task.measure(logits, labels, epoch=0)[1]
    field = {
        "field_name": "x",
        "tokenization_strategy": "continuous_value_encoder",
        "decode_modes": {"regression": {}, "is_zero": {}},
    }
    named = [("mse", {"ignore_zero": True}), ("mae", {}), ("is_zero_bce", {}), ("is_zero_focal", {})]
    task = build_objectives([{"field_name": "x", "name": name, **more} for name, more in named], [field])
    labels = {"x": torch.tensor([[0.0, 2.0, -100.0], [0.0, -100.0, float("nan")]])}
    logits = {f"x_{head}": torch.zeros(2, 3, 1) for head in ("regression", "is_zero")}
    found = task.counts(labels)
    assert found == task.measure(logits, labels)[1] and [float(x) for x in found.values()] == [1, 3, 3, 3]


def test_the_part_of_a_step_of_two_batches():
    """With the counts of both, the totals of two batches add up to the loss of the whole, and so do their gradients."""
    logits, labels = batch(20)
    scores = logits["celltype"].requires_grad_()
    task = objectives({"name": "cross_entropy", "class_weights": "balanced"}, {"name": "focal", "weight": 0.3})
    whole = task.compute({"celltype": scores}, labels)
    (expected,) = torch.autograd.grad(whole.total, scores)
    parts = [slice(0, 3), slice(3, 20)]
    measured = [task.measure({"celltype": scores[rows]}, {"celltype": labels["celltype"][rows]}) for rows in parts]
    counts = {key: sum(found[1][key] for found in measured) for key in measured[0][1]}
    total = sum(task.combine(sums, counts).total for sums, _ in measured)
    (gradient,) = torch.autograd.grad(total, scores)
    assert float(total) == pytest.approx(float(whole.total), rel=1e-6)
    assert torch.allclose(gradient, expected, atol=1e-7)
