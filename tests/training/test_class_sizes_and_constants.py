"""What losses and metrics learn of the training cells before training: class sizes, and the constant guess at masked values."""

import numpy as np
import torch
from training_cases import run_config

from bmfm_pipeline.training import build_data_module, build_module


def both(prepared, stage: str, **changes):
    run = run_config(stage, **changes)
    data = build_data_module(run, prepared)
    data.setup("fit")
    return data, build_module(run, data)


def test_the_constant_guess_is_that_of_training_cells(prepared):
    data, module = both(prepared, "pretrain")
    labels = torch.cat([batch["expressions"].reshape(-1) for batch in data.training_labels()])
    tokens = labels[labels != -100].numpy()
    constant = module.metrics.constants["expressions"]
    assert len(tokens) > 400 and constant.token == np.bincount(tokens).argmax()
    again = torch.cat([batch["expressions"].reshape(-1) for batch in data.training_labels()])
    assert torch.equal(labels, again)
    assert data.builder.report.cells_built == 0  # reading them for this is no use of the cells

    with torch.inference_mode():
        for batch in data.val_dataloader():
            module.validation_step(module.on_before_batch_transfer(batch, 0), 0)
    truth = torch.cat([batch["labels"]["expressions"].reshape(-1) for batch in data.val_dataloader()])
    share = float((truth[truth != -100] == constant.token).double().mean())
    found = module.metrics.compute()
    assert found["expressions_constant_accuracy"] == share
    assert {"expressions_constant_f1", "expressions_accuracy", "expressions_f1"} <= set(found)


def test_whole_cells_are_compared_with_the_mean(prepared):
    changes = {
        "data_module__masking_strategy": {"kind": "wced", "label_sets": ["non_input"]},
        "trainer__losses": None,
        "fields": None,
        "data_module__limit_dataset_samples": {"train": 40, "dev": 20, "test": 20},
    }
    data, module = both(prepared, "pretrain", **changes)
    constant = module.metrics.constants["expressions_non_input_genes"]
    values = np.concatenate([batch["expressions"]["non_input"].numpy().ravel() for batch in data.training_labels()])
    assert constant.mean == np.float64(values[values != -100].astype(np.float64).mean())


def test_sizes_are_those_of_the_cells_that_are_trained_on(prepared):
    losses = [{"label_column_name": "celltype", "name": "cross_entropy", "class_weights": "balanced"}]
    data, module = both(prepared, "finetune", trainer__losses=losses)
    ids = data.prepared.labels(data.run)["celltype"][data.rows["train"]]
    tables = data.prepared.class_tables(data.run)
    assert tables["celltype"].counts.tolist() == np.bincount(ids, minlength=10).tolist() and len(ids) == 100
    (task,) = module.objectives.tasks
    weights = module.objectives.options(task, torch.device("cpu"))["weights"]
    absent = tables["celltype"].counts == 0
    assert (weights.numpy()[absent] == 0).all() and weights[~absent].mean() == 1
    batch = next(iter(data.train_dataloader()))
    result = module.objectives.compute(module.outputs(batch)[0], batch["labels"])
    counted = weights[batch["labels"]["celltype"]].sum()
    assert torch.isclose(result.counts["celltype_cross_entropy_loss"], counted)
