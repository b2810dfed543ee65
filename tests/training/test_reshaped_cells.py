"""Keys that reshape cells act on the batches of a training, travel with its model, and hold in prediction."""

import csv
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from training_cases import run_config

from bmfm_pipeline.config.reshaping import table_paths
from bmfm_pipeline.errors import ConfigError, DataError
from bmfm_pipeline.training import CellDataModule
from bmfm_pipeline.training.gene_tables import keep_tables, with_kept_tables
from bmfm_pipeline.training.prepared import PreparedData, batching_config
from bmfm_pipeline.vocabulary import MultiFieldVocabulary, Vocabulary

CONTINUOUS = {"field_name": "expressions", "tokenization_strategy": "continuous_value_encoder"}
LABELS = {"field_name": "label_expressions", "is_input": False, "tokenization_strategy": "continuous_value_encoder"}


@pytest.fixture
def tables(prepared, tmp_path) -> dict[str, str]:
    """Tables of medians and of positions for all genes of the data but the first, and a list of ten genes."""
    names = PreparedData(prepared).store.var_names
    lines = {
        "medians": "gene\tmedian\n" + "".join(f"{name}\t2.0\n" for name in names[1:]),
        "positions": "gene,chromosome,start\n" + "".join(f"{n},chr{i % 3},{i}\n" for i, n in enumerate(names) if i),
        "genes": "\n".join(names[:10]),
    }
    for name, text in lines.items():
        (tmp_path / name).write_text(text)
    return {name: str(tmp_path / name) for name in lines}


def batches_of(prepared, stage: str = "pretrain", **changes):
    module = CellDataModule(run_config(stage, **changes), prepared)
    module.setup("fit")
    return module, next(iter(module.train_dataloader()))


def test_read_depth_aligns_to_the_deepest_training_cell(prepared):
    fields = [{"field_name": "genes"}, {**CONTINUOUS, "is_masked": True}, LABELS]
    module, batch = batches_of(prepared, fields=fields, data_module__rda_transform="auto_align", trainer__losses=None)
    store, rows = module.prepared.store, module.prepared.rows("train")
    totals = np.add.reduceat(np.asarray(store.counts.data, np.float64), store.counts.indptr[:-1])
    assert module.builder.config.rda_transform == round(totals[rows].max())
    np.testing.assert_allclose(batch["input_ids"][:, 1, 2].numpy(), np.log1p(totals[rows].max()), rtol=1e-6)
    own = totals[batch["cell_index"].numpy()]
    np.testing.assert_allclose(batch["input_ids"][:, 1, 1].numpy(), np.log1p(own), rtol=1e-5)
    tokens = module.prepared.vocabularies["genes"].tokens
    assert [tokens[int(number)] for number in batch["input_ids"][0, 0, :3]] == ["[CLS]", "[S]", "[T]"]


def test_read_depth_needs_its_tokens(prepared):
    known = PreparedData(prepared).vocabularies
    genes = Vocabulary([token for token in known["genes"].tokens if token not in ("[S]", "[T]")], 5)
    run = run_config(data_module__rda_transform=1000)
    with pytest.raises(ConfigError, match=r"no \[S\] and \[T\].*set rda_transform=null"):
        batching_config(run, MultiFieldVocabulary({**known, "genes": genes}))


def test_tables_reach_the_batches(prepared, tables):
    fields = [{"field_name": "genes"}, {**CONTINUOUS, "is_masked": True}]
    module, batch = batches_of(
        prepared, fields=fields, data_module__median_normalization=tables["medians"], trainer__losses=None,
        data_module__sequence_order="chromosomal", data_module__gene_positions=tables["positions"], data_module__mlm=True,
    )  # fmt: skip
    report = module.builder.report
    assert (report.genes_without_median, report.genes_without_position) == (1, 0)
    values = batch["labels"]["expressions"]
    assert (values[values != -100] % 0.5 == 0).all()
    module, batch = batches_of(prepared, data_module__limit_genes=tables["genes"])
    names = module.prepared.store.var_names
    assert module.builder.report.genes_not_allowed == len(names) - 10
    allowed = {3, 1, 2, 4, *module.prepared.vocabularies["genes"].ids(names[:10]).tolist()}
    assert set(batch["input_ids"][:, 0].unique().tolist()) <= allowed


def test_masking_weights_of_patterns(prepared):
    strategy = {"kind": "pattern", "pattern_weights": [["^RP", 0.0]]}
    module, _ = batches_of(prepared, data_module__masking_strategy=strategy)
    names = np.array(module.prepared.store.var_names)
    weights = module.builder.mask_weights
    assert set(names[weights == 0]) == {name for name in names if name.startswith("RP")}
    assert not module.builder.config.weigh_evaluation


def test_whole_cell_targets(prepared):
    strategy = {"kind": "wced", "label_sets": ["non_input"]}
    _, batch = batches_of(prepared, data_module__masking_strategy=strategy, trainer__losses=None)
    assert set(batch["labels"]["expressions"]) == {"non_input"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("name,median\nA,1\n", "no column 'gene'"),
        ("gene,mean\nA,1\n", "no column 'median'; its columns are gene, mean"),
        ("gene,median\nA,1\nB,many\n", "line 3: 'many' is no number"),
        ("gene,median\nA,1\nB\n", "line 3: 1 columns"),
        ("gene,median\nNOT_A_GENE,1\n", "none of the 1 genes"),
        (None, "no such file"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(prepared, tmp_path, text, message):
    if text is not None:
        (tmp_path / "table.csv").write_text(text)
    run = run_config(data_module__median_normalization=str(tmp_path / "table.csv"))
    with pytest.raises(DataError, match=message):
        PreparedData(prepared).builder_options(run)


def test_tables_travel_with_the_model(prepared, tables, tmp_path):
    run = run_config(data_module__median_normalization=tables["medians"])
    model = tmp_path / "model"
    model.mkdir()
    keep_tables(run, model)
    plain = run.model_dump(mode="json")["data_module"]
    Path(tables["medians"]).unlink()
    moved = run_config(data_module__median_normalization=with_kept_tables(plain, model)["median_normalization"])
    assert list(table_paths(moved.data_module)) == ["median_normalization"]
    options = PreparedData(prepared).builder_options(moved)
    assert np.nansum(options["tables"].medians == 2.0) == len(PreparedData(prepared).store.var_names) - 1


def test_prediction_reads_cells_as_the_evaluation_does(cases, prepared, mini_h5ad, tables):
    """With read depth, medians, positions and dropout: the same labels for the same cells, from the model folder alone."""
    from bmfm_pipeline.evaluation.inference import predict_loader
    from bmfm_pipeline.models import load_model
    from bmfm_pipeline.stages.predict import predict_file

    changes = {
        "fields": [{"field_name": "genes"}, CONTINUOUS],
        "data_module__rda_transform": "auto_align",
        "data_module__median_normalization": tables["medians"],
        "data_module__sequence_order": "chromosomal",
        "data_module__gene_positions": tables["positions"],
        "data_module__sequence_dropout_factor": 0.2,
        "data_module__limit_dataset_samples": None,
        "task__max_steps": 2,
        "trainer__losses": None,
    }
    spec = cases.spec("reshaped", "finetune", **changes)
    cases.train(spec)
    model = Path(spec.run_dir) / "model"
    module = CellDataModule(run_config("finetune", **changes), prepared)
    module.setup("test")
    names = {"celltype": sorted(module.prepared.label_dict["celltype"], key=module.prepared.label_dict["celltype"].get)}
    expected = predict_loader(load_model(model), module.predict_dataloader(), names, pooling="first_token")
    for name in ("medians", "positions"):
        Path(tables[name]).unlink()
    predict_file(str(model), str(mini_h5ad), cases.folder / "out", workspace=str(cases.folder / "workspace"))
    found = pd.read_csv(cases.folder / "out" / "embeddings.csv", index_col=0, header=None)
    np.testing.assert_allclose(found.loc[expected.cells].to_numpy(), expected.embeddings, rtol=1e-4, atol=1e-5)
    with open(cases.folder / "out" / "predictions.csv") as stream:
        assert len(list(csv.reader(stream))) == 701
