"""Heads of numbers count in deviations of the training cells; heads with gradient reversal make the encoder forget."""

import torch
from torch import nn

from bmfm_pipeline.models import build_model, load_model
from bmfm_pipeline.models.heads import GradientReversal
from bmfm_pipeline.objectives import build_objectives

GENES = {"field_name": "genes", "vocab_size": 40, "num_special_tokens": 5}
NUMBERS = {"field_name": "expressions", "tokenization_strategy": "continuous_value_encoder", "num_special_tokens": 5}
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
AGE = {"label_column_name": "age", "is_regression_label": True}
UNITS = {"value_mean": 60.0, "value_scale": 15.0}


def model_of(label, **options):
    torch.manual_seed(0)
    return build_model({"model_type": "scbert", **SIZES, **options}, [GENES, NUMBERS], [label]).eval()


def scores_of(model) -> torch.Tensor:
    genes = torch.tensor([[3, 10, 11, 12, 1], [3, 11, 13, 14, 1]])
    values = torch.tensor([[-4.0, 3.0, 1.0, 4.0, -2.0], [-4.0, 7.0, 2.0, 3.0, -2.0]])
    mask = torch.ones(2, 5, dtype=torch.int64)
    return model(torch.stack([genes.float(), values], dim=1), attention_mask=mask).logits["age"]


def test_scores_are_in_the_units_of_the_column(tmp_path):
    for options in ({}, {"linear_path": True}):
        plain, counted = model_of(AGE, **options), model_of(AGE | UNITS, **options)
        expected = scores_of(plain) * (7.5 if options else 15.0) * (2 if options else 1) + 60
        torch.testing.assert_close(scores_of(counted), expected)
    counted.save_pretrained(tmp_path)
    torch.testing.assert_close(scores_of(load_model(tmp_path)), scores_of(counted))


def test_a_loss_on_numbers_is_measured_in_the_same_units():
    task, scores, labels = (
        [{"label_column_name": "age", "name": "mse"}],
        torch.tensor([[75.0], [30.0]]),
        torch.tensor([60.0, 60.0]),
    )
    plain = build_objectives(task, [], [AGE]).compute({"age": scores}, {"age": labels})
    counted = build_objectives(task, [], [AGE | UNITS]).compute({"age": scores}, {"age": labels})
    torch.testing.assert_close(counted.total, plain.total / 15.0**2)
    torch.testing.assert_close(counted.total, torch.tensor((1.0 + 4.0) / 2), rtol=1e-5, atol=0)
    objectives = build_objectives([{**task[0], "name": "mae"}], [], [AGE | UNITS])
    torch.testing.assert_close(
        objectives.compute({"age": scores}, {"age": labels}).total, torch.tensor(1.5), rtol=1e-5, atol=0
    )
    assert objectives.predictions({"age": scores})["age"].tolist() == [75.0, 30.0]


def test_after_gradient_reversal_a_probe_finds_less_of_what_was_to_be_forgotten():
    """An encoder of 24 numbers, of which some tell the class and others, louder, the donor."""
    draw = torch.Generator().manual_seed(0)
    kind, donor = torch.randint(3, (900,), generator=draw), torch.randint(4, (900,), generator=draw)
    cells = torch.randn(900, 24, generator=draw)
    cells[:, :3] += 3 * nn.functional.one_hot(kind, 3)
    cells[:, 3:7] += 4 * nn.functional.one_hot(donor, 4)
    train, test = slice(0, 600), slice(600, 900)

    def fitted(modules, inputs, targets, steps):
        optimiser = torch.optim.Adam([weight for module in modules for weight in module.parameters()], lr=0.01)
        for _ in range(steps):
            loss = sum(nn.functional.cross_entropy(head(inputs()), wanted) for head, wanted in targets)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    def probed(reversal: bool) -> tuple[float, float]:
        torch.manual_seed(1)
        encoder, kinds, donors = nn.Sequential(nn.Linear(24, 16), nn.Tanh()), nn.Linear(16, 3), nn.Linear(16, 4)
        unlearn = nn.Sequential(GradientReversal(2.0), donors)
        targets = [(kinds, kind[train])] + ([(unlearn, donor[train])] if reversal else [])
        fitted([encoder, kinds, donors], lambda: encoder(cells[train]), targets, 300)
        with torch.no_grad():
            found = encoder(cells)
        probe = nn.Linear(16, 4)
        fitted([probe], lambda: found[train], [(probe, donor[train])], 300)
        right = lambda head, wanted: (head(found[test]).argmax(1) == wanted[test]).float().mean().item()  # noqa: E731
        return right(kinds, kind), right(probe, donor)

    kept, forgotten = probed(False), probed(True)
    assert kept[0] > 0.8 and forgotten[0] > 0.8, "both know the class"
    assert kept[1] > 0.55 and forgotten[1] < kept[1] - 0.1, (kept, forgotten)
