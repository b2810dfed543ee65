"""Keys that say how a cell becomes a sequence: what is accepted, what is refused with which words, what enters a key."""

import pytest

from bmfm_pipeline.config import compose
from bmfm_pipeline.errors import ConfigError

LABELS = "{field_name: label_expressions, is_input: false, tokenization_strategy: continuous_value_encoder}"
EXPOSED = "data_module.dataset_kwargs.expose_zeros=all"
WCED = "data_module.masking_strategy={kind: wced, label_sets: [all]}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data_module.rda_transform=down"], r"rda_transform: .*'equal' or 'auto_align'"),
        (["data_module.rda_transform=0"], r"rda_transform: .*greater than or equal to 1"),
        (["data_module.rda_transform=downsample"], r"downsample hides reads .*label_expressions"),
        (["data_module.rda_transform=equal", "data_module.switch_ratio=0.1", "data_module.mask_ratio=0.9"], "set switch_ratio=0"),
        (["data_module.rda_transform=equal", "data_module.max_mfi_data_len=2"], "takes 2 places"),
        (["data_module.sequence_dropout_factor=1.0"], "share below 1 or a whole number of genes"),
        (["data_module.sequence_dropout_factor=-2"], "sequence_dropout_factor"),
        (["data_module.selective_dropout={fraction: 1.5}"], r"selective_dropout\.fraction"),
        (["data_module.selective_dropout={fraction: 0.1, weigths: /w.csv}"], "did you mean 'weights'"),
        (["data_module.sequence_order=chromosomal"], "needs gene_positions"),
        (["data_module.gene_positions=/p.csv"], "sequence_order=chromosomal only"),
        (["data_module.pad_zero_expression_strategy=random"], "expose_zeros=all too"),
        ([EXPOSED, "data_module.pad_zero_expression_strategy={strategy: random, interleave_zero_ratio: 0.5}"], "belongs to strategy"),
        ([EXPOSED, "data_module.pad_zero_expression_strategy={interleave_ratio: 0.5}"], "did you mean 'interleave_zero_ratio'"),
        (["data_module.median_normalization=true"], "name a csv or tsv file with the columns gene and median"),
        (["data_module.masking_strategy={kind: pattern}"], "needs pattern_weights"),
        (["data_module.masking_strategy={kind: adaptive}", "data_module.mlm=false"], "which genes are masked, but none are"),
        (["data_module.masking_strategy={kind: pattern, pattern_weights: [['(', 1]]}"], "is no regular expression"),
        (["data_module.masking_strategy={kind: pattern, pattern_weights: [[RP, -1]]}"], "must not be negative"),
        (["data_module.masking_strategy={kind: wced, temperature: 2}"], "a wced strategy has no temperature"),
        ([WCED, "trainer.losses=[{field_name: expressions, name: mse}]"], "masking_strategy wced masks none"),
        ([WCED, "trainer.losses=[{field_name: expressions, name: mse, wced_target: input_genes}]"], r"among the targets .*\(all_genes\)"),
        ([WCED, "trainer.losses=[{field_name: genes, name: mse, wced_target: all_genes}]"], "values of the field 'expressions'"),
        ([WCED, "trainer.losses=[{field_name: expressions, name: focal, wced_target: all_genes}]"], "cannot predict whole cells"),
    ],
)  # fmt: skip
def test_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose("pre_train_config", overrides)


def test_read_depth_turns_the_other_normalisation_off_and_says_so_once():
    run = compose("pre_train_config", ["data_module.rda_transform=2000", "data_module.log_normalize_transform=true"])
    assert run.data_module.rda_transform == 2000
    assert not run.data_module.log_normalize_transform
    assert sum("log_normalize_transform is off" in note for note in run.notes) == 1


def test_older_spellings():
    run = compose(
        "pre_train_config",
        [
            "data_module.sequence_order=chromosomal_uce",
            "data_module.gene_positions=/p.csv",
            "data_module.pad_zero_expression_strategy=batch_wise",
            EXPOSED,
            "data_module.median_normalization=false",
            "data_module.sequence_dropout_factor=20",
        ],
    )
    module = run.data_module
    assert module.sequence_order == "chromosomal"
    assert module.pad_zero_expression_strategy.strategy == "batch_wise"
    assert module.median_normalization is None
    assert (module.sequence_dropout_factor, type(module.sequence_dropout_factor)) == (20, int)


def test_whole_cells_take_the_place_of_masking():
    run = compose("pre_train_config", [WCED])
    assert not run.data_module.masks
    assert run.predicts_fields and run.training_stage == "pretrain"
    assert {"field_name": "expressions", "name": "mse", "wced_target": "all_genes"} in run.trainer.losses
    assert run.fields[1].decode_modes == {"wced": {"vocab_field": "genes", "logit_outputs": ["mse"]}}


def test_tables_enter_a_key_by_content_and_zeros_by_name():
    def view(*overrides):
        run = compose("pre_train_config", ["data_module.sequence_order=chromosomal", *overrides])
        return run.key_view("pretrain")["data_module"]

    first, other = view("data_module.gene_positions=/a.csv"), view("data_module.gene_positions=/b.csv")
    assert first == other
    assert view("data_module.gene_positions=/a.csv", EXPOSED) != first
