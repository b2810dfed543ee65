"""Losses of a batch: masks, positions, precision, pooling over batches and processes, and refused configurations."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from bmfm_pipeline.config.losses import LOSSES
from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.models import build_model
from bmfm_pipeline.objectives import build_objectives
from bmfm_pipeline.objectives.losses import FUNCTIONS

GENES = {
    "field_name": "genes",
    "vocab_size": 30,
    "num_special_tokens": 5,
    "is_masked": True,
    "decode_modes": {"token_scores": {}},
}
EXPRESSIONS = {
    "field_name": "expressions",
    "vocab_size": 15,
    "num_special_tokens": 5,
    "is_masked": True,
    "decode_modes": {"token_scores": {}, "regression": {}, "is_zero": {}},
}
CONTINUOUS = EXPRESSIONS | {
    "tokenization_strategy": "continuous_value_encoder",
    "decode_modes": {"regression": {}, "is_zero": {}},
}
CELLTYPE = {"label_column_name": "celltype", "n_unique_values": 4}
VALUES = np.array([np.nan] * 5 + list(range(10)))

EVERYTHING = [
    {"field_name": "genes", "name": "cross_entropy"},
    {"field_name": "expressions", "name": "token_value", "weight": 0.5},
    {"field_name": "expressions", "name": "mse", "ignore_zero": True},
    {"field_name": "expressions", "name": "is_zero_bce"},
    {"label_column_name": "celltype", "name": "focal", "weight": 2.0},
]


def scores(rows=3, length=8, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "genes_token_scores": draw(rows, length, 30),
        "expressions_token_scores": draw(rows, length, 15),
        "expressions_regression": draw(rows, length, 1),
        "expressions_is_zero": draw(rows, length, 1),
        "celltype": draw(rows, 4),
    }


def targets(rows=3, length=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = {
        "genes": torch.randint(5, 30, (rows, length), generator=generator),
        "expressions": torch.randint(5, 8, (rows, length), generator=generator),
    }
    for name in ids:
        ids[name][torch.rand(rows, length, generator=generator) < 0.6] = -100
    return ids | {"celltype": torch.randint(0, 4, (rows,), generator=generator)}


def objectives(losses=None, fields=None, **kwargs):
    return build_objectives(
        losses or EVERYTHING, fields or [GENES, EXPRESSIONS], [CELLTYPE], {"expressions": VALUES}, **kwargs
    )


def test_every_loss_of_the_table_has_a_function():
    assert set(FUNCTIONS) == set(LOSSES)


def test_model_at_positions_gives_the_loss_and_gradients_of_the_full_pass():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = build_model(sizes, [GENES, EXPRESSIONS], [CELLTYPE]).eval()
    labels = targets()
    ids = torch.stack([labels["genes"].clamp(min=5), labels["expressions"].clamp(min=5)], dim=1)
    task = objectives()
    results, gradients = [], []
    for positions in (None, task.positions(labels)):
        model.zero_grad()
        result = task.compute(model(ids, positions=positions).logits, labels, positions)
        result.total.backward()
        results.append(
            {name: float(value) for name, value in result.parts.items()} | {"total": float(result.total.detach())}
        )
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert len(results[0]) == 6
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        assert torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6), name


def test_numeric_losses_on_tokens_compare_values_not_ids():
    losses = [{"field_name": "expressions", "name": "mse"}, {"field_name": "expressions", "name": "is_zero_bce"}]
    logits = {
        "expressions_regression": torch.tensor([[[0.0], [3.0], [7.0]]]),
        "expressions_is_zero": torch.tensor([[[9.0], [-9.0], [-9.0]]]),
    }
    labels = {"expressions": torch.tensor([[5, 8, 4]])}  # values 0 and 3, and a special token, which has none
    result = objectives(losses).compute(logits, labels)
    assert result.counts["expressions_mse_loss"] == 2
    assert float(result.values["expressions_mse_loss"]) == pytest.approx(0.0, abs=1e-6)
    assert float(result.values["expressions_is_zero_bce_loss"]) < 1e-3


def test_parity_rule_for_losses_without_targets():
    losses = [
        {"field_name": "expressions", "name": "mse", "weight": 2.0},
        {"label_column_name": "celltype", "name": "cross_entropy"},
    ]
    labels = targets() | {"expressions": torch.full((3, 8), -100)}
    kept, dropped = (
        objectives(losses).compute(scores(), labels),
        objectives(losses, empty_loss_counts=False).compute(scores(), labels),
    )
    assert list(kept.parts) == ["expressions_mse_loss", "celltype_cross_entropy_loss"]
    assert list(dropped.parts) == ["celltype_cross_entropy_loss"]
    assert float(kept.total) == pytest.approx(float(dropped.total) / 3, rel=1e-6)


@pytest.mark.parametrize("positions", [True, False])
def test_a_batch_without_any_target_has_a_graph_and_zero_gradients(positions):
    labels = {name: torch.full_like(value, -100) for name, value in targets().items()}
    logits = {name: value.requires_grad_() for name, value in scores().items()}
    task = objectives()
    where = task.positions(labels) if positions else None
    given = {k: v.flatten(0, 1)[where[k.split("_")[0]]] if where and v.dim() == 3 else v for k, v in logits.items()}
    result = task.compute(given, labels, where)
    assert float(result.total.detach()) == 0
    result.total.backward()
    for name, value in logits.items():
        assert value.grad is not None and value.grad.abs().sum() == 0, name


def test_a_score_that_is_not_a_number_is_not_hidden():
    logits = scores()
    logits["genes_token_scores"][0] = float("nan")
    assert torch.isnan(objectives().compute(logits, targets()).total)


def test_missing_regression_label_is_ignored_like_minus_100():
    columns = [{"label_column_name": "age", "is_regression_label": True}]
    task = build_objectives([{"label_column_name": "age"}], [], columns)
    logits = {"age": torch.tensor([[1.0], [50.0], [3.0]])}
    result = task.compute(logits, {"age": torch.tensor([2.0, float("nan"), -100.0])})
    assert result.parts == pytest.approx({"age_mse_loss": 1.0}, rel=1e-5)


def test_overflow_at_ignored_positions_leaves_no_trace():
    losses = [{"field_name": "expressions", "name": "mse", "link_function": "exp"}]
    logits = torch.tensor([[[200.0], [0.5]]], requires_grad=True)
    result = objectives(losses, [GENES, CONTINUOUS]).compute(
        {"expressions_regression": logits}, {"expressions": torch.tensor([[-100.0, 2.0]])}
    )
    result.total.backward()
    assert torch.isfinite(logits.grad).all() and logits.grad[0, 0] == 0 and logits.grad[0, 1] != 0


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_scores_are_evaluated_in_float32(half):
    logits = {name: value.to(half) for name, value in scores(rows=64, length=64).items()}
    labels = targets(rows=64, length=64)
    exact = objectives().compute({name: value.float() for name, value in logits.items()}, labels)
    with torch.autocast("cpu", dtype=half):
        mixed = objectives().compute(logits, labels)
    assert mixed.total.dtype == torch.float32
    assert float(mixed.total) == pytest.approx(float(exact.total), rel=1e-6)


def test_sums_and_counts_pool_batches_exactly():
    task = objectives()
    halves = [
        task.compute({k: v[rows] for k, v in scores(rows=6).items()}, {k: v[rows] for k, v in targets(rows=6).items()})
        for rows in (slice(0, 1), slice(1, 6))
    ]
    sums = {key: sum(float(half.sums[key]) for half in halves) for key in halves[0].sums}
    counts = {key: sum(float(half.counts[key]) for half in halves) for key in halves[0].counts}
    whole = task.compute(scores(rows=6), targets(rows=6))
    pooled = task.pool(sums, counts)
    assert pooled == pytest.approx(
        {name: float(v) for name, v in whole.parts.items()} | {"loss": float(whole.total)}, rel=1e-5
    )


DDP = """
import os, sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from bmfm_pipeline.models import build_model
from bmfm_pipeline.objectives import build_objectives
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(0)
genes = {"field_name": "genes", "vocab_size": 20, "num_special_tokens": 5, "decode_modes": {"token_scores": {}}}
column = {"label_column_name": "celltype", "n_unique_values": 3}
model = build_model({"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}, [genes], [column])
# Gradients that no loss produces would make the processes wait for each other; this is what a plain DDP does without a search.
model = DistributedDataParallel(model)
task = build_objectives([{"field_name": "genes"}, {"label_column_name": "celltype"}], [genes], [column])
for step in range(3):
    ids = torch.randint(5, 20, (2, 1, 6))
    labels = {"genes": torch.full((2, 6), -100), "celltype": torch.full((2,), -100)}
    if rank == 0 or step == 2:  # the other process has nothing to predict in the first steps
        labels["genes"][:, 2] = ids[:, 0, 2]
        labels["celltype"][0] = 1
    where = task.positions(labels)
    result = task.compute(model(ids, positions=where).logits, labels, where)
    result.total.backward()
total = sum(p.grad.abs().sum() for p in model.parameters() if p.grad is not None)
same = total.clone(); dist.all_reduce(same)
assert abs(float(same) / 2 - float(total)) < 1e-4 * float(total), (float(same), float(total))
counts = torch.stack([result.counts[task.loss_key] for task in task.tasks]); dist.all_reduce(counts)
print("counts", counts.tolist())
# A process that leaves while the other still holds its connection makes gloo abort at exit.
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_stay_in_step_when_one_has_nothing_to_predict(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DDP]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        for process in running:
            out, _ = process.communicate(timeout=180)
            assert process.returncode == 0, out
            assert "counts [4.0, 2.0]" in out
    finally:
        for process in running:
            process.kill()


def test_zero_where_the_model_says_zero():
    losses = [
        {"field_name": "expressions", "name": "mse", "link_function": "exp"},
        {"field_name": "expressions", "name": "is_zero_bce"},
    ]
    logits = {
        "expressions_regression": torch.tensor([[[0.0], [1.0]]]),
        "expressions_is_zero": torch.tensor([[[2.0], [-2.0]]]),
    }
    predicted = objectives(losses, [GENES, CONTINUOUS]).predictions(logits)
    assert predicted["expressions"].squeeze().tolist() == pytest.approx([0.0, math.e])


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ([], "name at least one loss"),
        ([{"name": "mse"}], "either field_name or label_column_name"),
        ([{"field_name": "proteins"}], "no field 'proteins'; there are expressions, genes"),
        ([{"label_column_name": "tissue"}], "no label column 'tissue'"),
        ([{"field_name": "genes", "name": "crossentropy"}], "unknown loss 'crossentropy'"),
        (
            [{"field_name": "genes", "name": "cross_entropy", "gamma": 2}],
            "no argument 'gamma'; its arguments are label_smoothing",
        ),
        ([{"field_name": "genes", "name": "mse"}], "needs the head 'regression' of field genes"),
        (
            [{"field_name": "genes"}, {"field_name": "genes", "name": "cross_entropy"}],
            "genes_cross_entropy listed more than once",
        ),
        ([{"field_name": "genes", "weight": -1}], "weight must be a number that is not negative"),
        ([{"field_name": "genes", "name": "token_value"}], "needs the values of the tokens of genes"),
        ([{"field_name": "expressions", "name": "mse", "link_function": "log"}], "null or exp"),
        ([{"field_name": "expressions", "name": "mse", "wced_target": "some_genes"}], "wced_target 'some_genes'"),
    ],
)
def test_impossible_losses_are_refused(losses, words):
    with pytest.raises(ConfigError, match=words):
        build_objectives(losses, [GENES, EXPRESSIONS], [CELLTYPE])


def test_one_output_cannot_serve_two_whole_cell_losses():
    field = EXPRESSIONS | {"decode_modes": {"wced": {"vocab_field": "genes"}}}
    losses = [
        {"field_name": "expressions", "name": name, "wced_target": "all_genes"} for name in ("mse", "is_zero_bce")
    ]
    with pytest.raises(ConfigError, match="logit_outputs"):
        build_objectives(losses, [GENES, field])


def test_absent_labels_and_outputs_are_named():
    with pytest.raises(ConfigError, match="labels for genes"):
        objectives().compute(scores(), {"genes": targets()["genes"]})
    with pytest.raises(ConfigError, match="no output 'genes_token_scores'"):
        objectives().compute({"celltype": torch.zeros(3, 4)}, targets())


def test_training_learns_a_marker_gene():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = build_model(sizes, [GENES], [CELLTYPE])
    task = build_objectives(
        [{"label_column_name": "celltype"}, {"field_name": "genes", "weight": 0.1}], [GENES], [CELLTYPE]
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def cells(count):
        ids, classes = torch.randint(10, 30, (count, 1, 12)), torch.randint(0, 4, (count,))
        ids[torch.arange(count), 0, torch.randint(1, 12, (count,))] = 5 + classes  # a marker somewhere in the sequence
        ids[:, :, 0] = 3
        return ids, {"celltype": classes, "genes": torch.where(torch.rand(count, 12) < 0.2, ids[:, 0], -100)}

    for _ in range(120):
        ids, labels = cells(64)
        where = task.positions(labels)
        optimizer.zero_grad()
        task.compute(model(ids, positions=where).logits, labels, where).total.backward()
        optimizer.step()
    ids, labels = cells(200)
    predicted = task.predict("celltype", model.eval()(ids, positions={}).logits)
    assert (predicted == labels["celltype"]).float().mean() > 0.9
