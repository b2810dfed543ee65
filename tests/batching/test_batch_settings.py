"""Settings that cannot make a batch are refused by name, with what would do."""

import pytest
from batching_cases import column_ids, make_builder, many_cells

from bmfm_pipeline.batching import BatchBuilder, BatchingConfig, FieldSpec, ZeroExposure
from bmfm_pipeline.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"max_length": 500, "pad_to_multiple_of": 16},
            "500 is not a multiple of pad_to_multiple_of 16; use max_length 496 or 512",
        ),
        ({"max_length": 10, "pad_to_multiple_of": 16}, "use max_length 16"),
        ({"max_length": 2, "pad_to_multiple_of": None}, "no room"),
        ({"max_mfi_data_len": 0}, "max_mfi_data_len"),
        ({"padding": "longst"}, "padding must be one of max_length, longest"),
        (
            {"sequence_order": "by_name"},
            "sequence_order must be one of None, random, sorted, chromosomal; found 'by_name'",
        ),
        ({"collation_strategy": "labeling"}, "collation_strategy"),
        ({"sequence_order": "chromosomal"}, "needs gene_positions"),
        ({"sequence_dropout_factor": 1.0}, "share below 1, or a whole number"),
        ({"sequence_dropout_factor": -1}, "sequence_dropout_factor"),
        ({"selective_dropout": 1.2}, "selective_dropout must lie in 0..1"),
        ({"zeros": ZeroExposure()}, "set dataset_kwargs.expose_zeros=all"),
        ({"zeros": ZeroExposure("batchwise"), "expose_zeros": True}, "must be one of batch_wise, random"),
        (
            {"zeros": ZeroExposure(interleave_zero_ratio=2), "expose_zeros": True},
            "interleave_zero_ratio must lie in 0..1",
        ),
        ({"zeros": ZeroExposure(granularity=0), "expose_zeros": True}, "granularity must be at least 1"),
        ({"rda_transform": "equal"}, r"\[S\] and \[T\]"),
        ({"rda_transform": "down", "depth_ids": (0, 0)}, "must be one of downsample, poisson_downsample, equal"),
        ({"rda_transform": 0, "depth_ids": (0, 0)}, "number of reads"),
        ({"rda_transform": 500, "depth_ids": (0, 0), "log_normalize_transform": True}, "normalises by itself"),
        ({"rda_transform": 500, "depth_ids": (0, 0), "mask_ratio": 0.5, "switch_ratio": 0.5}, "set switch_ratio=0"),
        ({"rda_transform": 500, "depth_ids": (0, 0), "max_mfi_data_len": 2}, "max_mfi_data_len must be at least 3"),
        ({"rda_transform": 500, "depth_ids": (0, 0), "max_length": 4, "pad_to_multiple_of": None}, "no room"),
        ({"wced_targets": ("every",)}, "must be one of input, non_input, all"),
        ({"limit_genes": "L1000"}, "limit_genes"),
        ({"change_ratio": 1.5}, "change_ratio must lie in 0..1"),
        ({"mask_ratio": 0.9, "switch_ratio": 0.2}, "must not exceed 1"),
        ({"mask_ratio": 0.5, "switch_ratio": 0.5, "comask_across_fields": True}, "comask_across_fields"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ConfigError, match=message.replace("..", r"\.\.")):
        make_builder(many_cells(2), **settings)


def test_length_need_not_be_a_multiple_without_truncation_or_padding():
    assert (
        make_builder(many_cells(2), max_length=500, pad_to_multiple_of=16, truncation=False)
        .build([0])["input_ids"]
        .shape[2]
        == 512
    )
    assert (
        make_builder(many_cells(2), max_length=500, pad_to_multiple_of=16, padding=False)
        .build([0])["input_ids"]
        .shape[2]
        == 22
    )


def test_hidden_attention_needs_masks_shared_by_fields():
    with pytest.raises(ConfigError, match="needs comask_across_fields=true"):
        make_builder(many_cells(2), masked=("genes", "expressions"), prevent_attention_to_masked=True)
    make_builder(
        many_cells(2), masked=("genes", "expressions"), prevent_attention_to_masked=True, comask_across_fields=True
    )
    make_builder(many_cells(2), masked=("genes", "expressions"), prevent_attention_to_masked=True, mlm=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([FieldSpec("expressions", "values", tokenized=False)], "an input field of genes"),
        ([FieldSpec("genes", "genes", column_ids=None)], "an input field of genes"),
        (
            [FieldSpec("genes", "genes", column_ids=column_ids()), FieldSpec("expressions", "values")],
            "expressions: tokenised values need value_ids",
        ),
        (
            [FieldSpec("genes", "genes", column_ids=column_ids()), FieldSpec("x", "value")],
            "x: role must be one of genes, values",
        ),
        (
            [FieldSpec("genes", "genes", is_masked=True, column_ids=column_ids())],
            "genes: switch_ratio > 0 needs a vocabulary",
        ),
    ],
)
def test_fields_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        BatchBuilder(many_cells(2), fields, BatchingConfig(mask_ratio=0.5, switch_ratio=0.5))
