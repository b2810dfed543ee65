"""Losses are checked against fields, label columns and masks before any data is read."""

import json

import pytest

from bmfm_pipeline.config import compose
from bmfm_pipeline.config.losses import LOSSES
from bmfm_pipeline.errors import ConfigError

CONTINUOUS = "fields=genes_expressions_cve_masked"
BOTH = "data_module=base_multi_task"


def losses(*entries: dict) -> str:
    """The override that sets trainer.losses."""
    return "trainer.losses=" + json.dumps(list(entries)).replace('"', "")


def on_field(name: str, loss: str, **options) -> dict:
    return {"field_name": name, "name": loss, **options}


def on_label(name: str, loss: str, **options) -> dict:
    return {"label_column_name": name, "name": loss, **options}


class TestDefaults:
    def test_a_masked_field_of_tokens_gets_cross_entropy(self):
        losses = compose("pre_train_config", ["preset=none"]).trainer.losses
        assert losses == [on_field("expressions", "cross_entropy")]

    def test_a_masked_continuous_field_gets_two_losses(self):
        names = [entry["name"] for entry in compose("pre_train_config", [CONTINUOUS]).trainer.losses]
        assert names == ["mse", "is_zero_bce"]

    def test_every_masked_field_gets_one(self):
        entries = compose("pre_train_config", ["fields=genes_masked_expressions_masked"]).trainer.losses
        assert [entry["field_name"] for entry in entries] == ["genes", "expressions"]

    def test_a_label_column_gets_the_loss_of_its_kind(self):
        columns = "[{label_column_name: a}, {label_column_name: b, is_regression_label: true}, {label_column_name: c, is_multilabel: true}]"
        entries = compose("fine_tune_train_config", [f"label_columns={columns}"]).trainer.losses
        assert [entry["name"] for entry in entries] == ["cross_entropy", "mse", "bce_with_logits"]

    def test_both_are_predicted_together(self):
        entries = compose("pre_train_config", [BOTH]).trainer.losses
        assert [sorted(entry)[0] for entry in entries] == ["field_name", "label_column_name"]

    def test_labels_are_not_predicted_when_only_masks_are(self):
        run = compose("pre_train_config")
        assert run.label_columns and not any("label_column_name" in entry for entry in run.trainer.losses)

    def test_fields_are_not_predicted_when_nothing_is_masked(self):
        run = compose("pre_train_config", [BOTH, "data_module.mlm=false"])
        assert run.trainer.losses == [on_label("celltype", "cross_entropy")]

    def test_a_loss_without_a_name_gets_the_usual_one(self):
        assert (
            compose("pre_train_config", [losses({"field_name": "expressions"})]).trainer.losses[0]["name"]
            == "cross_entropy"
        )
        number = "label_columns=[{label_column_name: age, is_regression_label: true}]"
        run = compose("fine_tune_train_config", [number, losses({"label_column_name": "age"})])
        assert run.trainer.losses[0]["name"] == "mse"


class TestRefusals:
    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (
                [losses(on_field("expressions", "cross_entropy"), on_field("genes", "cross_entropy"))],
                r"trainer\.losses\.1: loss cross_entropy on field 'genes' needs that field to be masked, but its is_masked is false; "
                r"set fields\.0\.is_masked=true, or remove this loss",
            ),
            (
                [BOTH, "data_module.mlm=false", losses(on_field("expressions", "mse"))],
                r"trainer\.losses\.0: .*data_module\.mlm is false; set data_module\.mlm=true",
            ),
            (
                ["data_module=base_seq_cls", losses(on_field("expressions", "mse"))],
                r"trainer\.losses\.0: .*data_module\.mlm is false",
            ),
            ([losses(on_field("exprs", "mse"))], r"field 'exprs' is not among fields \(genes, expressions\)"),
            (
                [losses(on_label("celltype", "focal"))],
                r"a loss on label column 'celltype' needs collation_strategy multitask or sequence_classification, found language_modeling",
            ),
            (
                [BOTH, losses(on_label("donor", "focal"))],
                r"label column 'donor' is not among label_columns \(celltype\); add `- label_column_name: donor`",
            ),
            (
                [losses(on_field("expressions", "cross_entrpy"))],
                r"unknown loss 'cross_entrpy'; did you mean 'cross_entropy'\?",
            ),
            ([losses(on_field("expressions", "zzz"))], r"unknown loss 'zzz'; known: cross_entropy, focal"),
            (
                [losses(on_field("expressions", "mse", ignore_zeros=True))],
                r"loss mse has no argument 'ignore_zeros'; did you mean 'ignore_zero'\?",
            ),
            ([losses(on_field("expressions", "token_value", gamma=1))], r"no argument 'gamma'; its arguments are none"),
            ([losses({"name": "mse"})], r"names either field_name or label_column_name, found \['name'\]"),
            (
                [losses({"name": "mse", "field_name": "expressions", "label_column_name": "celltype"})],
                r"names either field_name or label_column_name",
            ),
            (
                [CONTINUOUS, losses(on_field("expressions", "focal"))],
                r"predicts tokens, but field 'expressions' is continuous",
            ),
            (
                ["fields=genes_masked_expressions_masked", losses(on_field("genes", "mse"))],
                r"loss mse predicts numbers, but genes are names; use cross_entropy or focal",
            ),
            (
                [losses(on_field("expressions", "bce_with_logits"))],
                r"loss bce_with_logits is for a label, not for a field",
            ),
            ([BOTH, losses(on_label("celltype", "is_zero_bce"))], r"loss is_zero_bce is for a field, not for a label"),
            (
                [BOTH, losses(on_label("celltype", "mse"))],
                r"loss mse does not fit label column 'celltype', which is one class",
            ),
            (
                [
                    BOTH,
                    "label_columns=[{label_column_name: a, is_regression_label: true}]",
                    losses(on_label("a", "focal")),
                ],
                r"which is a number \(is_regression_label is true\); use mse or mae",
            ),
            (
                [BOTH, "label_columns=[{label_column_name: a, is_multilabel: true}]", losses(on_label("a", "focal"))],
                r"several classes at once .*use bce_with_logits",
            ),
            (
                [BOTH, losses(on_label("celltype", "hce"))],
                r"hce needs to know which classes lie under which; set label_ontology of label column 'celltype'",
            ),
            (
                [losses(on_field("expressions", "mse", weight=-1))],
                r"weight must be a number that is not negative \(found -1\)",
            ),
            (
                [losses(on_field("expressions", "mse", link_function="log"))],
                r"link_function must be null or exp \(found 'log'\)",
            ),
            (
                [losses(on_field("expressions", "mse", wced_target="input_genes"))],
                r"wced_target needs whole-cell targets: set data_module\.masking_strategy={kind: wced}",
            ),
            (
                [losses(on_field("expressions", "mse", decoder_key="expressions_token_scores"))],
                r"cannot read decoder_key 'expressions_token_scores'; use expressions_regression or expressions_mvc_regression",
            ),
            (
                [losses(on_field("expressions", "cross_entropy", class_weights="balanced"))],
                "is for losses on label columns",
            ),
            ([BOTH, losses(on_label("celltype", "focal", class_weights="even"))], "balanced, effective_number or null"),
            (
                [BOTH, losses(on_label("celltype", "focal", beta=0.9))],
                "beta belongs to class_weights: effective_number",
            ),
            ([BOTH, losses(on_label("celltype", "ldam", beta=0.9))], "beta belongs to drw_epochs"),
            ([BOTH, losses(on_label("celltype", "ldam", drw_epochs=1.5))], r"number of epochs or null \(found 1\.5\)"),
            ([BOTH, losses(on_label("celltype", "ldam", max_margins=1))], "did you mean 'max_margin'"),
            ([losses(on_field("expressions", "ldam"))], "loss ldam is for a label, not for a field"),
            ([losses(on_field("expressions", "focal", focal_gamma="2x"))], r"not negative \(found '2x'\)"),
            ([losses(on_field("expressions", "cross_entropy", label_smoothing=1))], "from 0 to below 1"),
            ([losses(on_field("expressions", "mse", ignore_zero="yes"))], r"true or false \(found 'yes'\)"),
            ([losses(on_field("expressions", "mse", ignore_index=0))], "ignore_index must be -100"),
            ([losses(on_field("expressions", "token_mse"))], "a name of older versions; use mse"),
            ([losses(on_field("expressions", "m"))], "unknown loss 'm'"),
            (
                [losses(on_field("expressions", "cross_entropy", smoothing=0.1, label_smoothing=0.2))],
                "another spelling of 'label_smoothing', and both",
            ),
            ([losses(on_field("expressions", "mse", weight=0))], "every loss has weight 0"),
            ([losses(on_field("expressions", "mse", weight=True))], r"not negative \(found True\)"),
            ([losses(on_field("expressions", "mse", metrics=["accuracy"]))], "metric 'accuracy' does not fit loss mse"),
            ([losses(on_field("expressions", "focal", metrics=["acuracy"]))], "did you mean 'accuracy'"),
            ([losses(on_field("expressions", "focal", metrics=["auc"]))], "metric 'auc' does not fit .* on a field"),
            (
                [losses(on_field("expressions", "focal", metrics=[{"name": "f1", "average": "micro"}]))],
                "computed without average='micro'",
            ),
            ([BOTH, losses(on_label("celltype", "focal", decoder_key="x"))], "decoder_key is for losses on fields"),
            ([BOTH, losses(on_label("celltype", "focal", wced_target="x"))], "wced_target is for losses on fields"),
            (
                ["label_columns=[{label_column_name: a, is_multilabel: true, label_ontology: cl.obo}]"],
                "'a' holds several classes a cell; label_ontology is for a column of one class",
            ),
            (
                ["label_columns=[{label_column_name: a, label_ontology: {file: cl.obo, relation: [is_a]}}]"],
                "did you mean 'relations'",
            ),
            (
                [losses(on_field("expressions", "mse"), on_field("expressions", "mse", weight=2))],
                r"trainer\.losses\.1: the same loss as trainer\.losses\.0 \(mse on expressions\)",
            ),
        ],
    )
    def test_a_loss_that_cannot_be_computed_is_refused_with_its_place_and_what_to_change(self, overrides, message):
        with pytest.raises(ConfigError, match=message):
            compose("pre_train_config", overrides)

    def test_doing_what_the_message_says_mends_it(self):
        broken = losses(on_field("expressions", "mse"), on_field("genes", "cross_entropy"))
        with pytest.raises(ConfigError, match=r"fields\.0\.is_masked=true"):
            compose("pre_train_config", [broken])
        assert compose("pre_train_config", [broken, "fields.0.is_masked=true"]).fields[0].is_masked

    def test_language_modelling_needs_a_masked_field(self):
        with pytest.raises(ConfigError, match="language modelling needs a field with is_masked=true, found none"):
            compose("pre_train_config", ["fields=genes_expressions_unmasked"])

    def test_the_same_loss_twice_in_two_groups_is_allowed(self):
        entries = (
            on_field("expressions", "mse"),
            on_field("expressions", "mse", loss_group="mvc", decoder_key="expressions_mvc_regression"),
        )
        run = compose("pre_train_config", [losses(*entries)])
        assert run.fields[1].decode_modes == {"regression": {}, "mvc_regression": {"query_field": "genes"}}

    def test_a_label_with_an_ontology_gets_the_hierarchical_loss(self):
        column = "label_columns=[{label_column_name: a, label_ontology: /data/cl.obo}]"
        run = compose("fine_tune_train_config", [column])
        assert run.trainer.losses == [on_label("a", "hce")]
        assert run.label_columns[0].label_ontology.relations == ["is_a"]
        flat = compose("fine_tune_train_config", [column, losses(on_label("a", "ldam", drw_epochs=3, beta=0.99))])
        assert flat.trainer.losses[0]["drw_epochs"] == 3

    def test_a_loss_without_a_name_follows_its_source(self):
        run = compose("pre_train_config", [CONTINUOUS, losses({"field_name": "expressions"})])
        assert run.trainer.losses[0]["name"] == "mse"
        several = "label_columns=[{label_column_name: a, is_multilabel: true}]"
        run = compose("fine_tune_train_config", [several, losses({"label_column_name": "a", "pos_weight": "balanced"})])
        assert run.trainer.losses[0]["name"] == "bce_with_logits"

    def test_older_spellings_are_written_as_todays(self):
        entry = {"field_name": "expressions", "name": "cross_entropy", "smoothing": 0.1, "ignore_index": -100}
        run = compose("pre_train_config", [losses(entry)])
        assert run.trainer.losses[0]["label_smoothing"] == 0.1 and "smoothing" not in run.trainer.losses[0]

    def test_two_ways_to_balance_one_column_are_noted(self):
        run = compose(
            "fine_tune_train_config",
            [
                losses(on_label("celltype", "focal", class_weights="balanced")),
                "data_module.balancing_label_column=celltype",
            ],
        )
        assert any("come on top of data_module.balancing_label_column" in note for note in run.notes)


class TestNothingToLearn:
    """Composing is also for preprocessing, which needs no labels; training says what it lacks."""

    def test_a_run_without_labels_composes_and_can_be_preprocessed(self):
        run = compose("fine_tune_train_config", ["label_columns=[]"])
        assert run.key_view("preprocess")["labels"] == []

    def test_it_cannot_be_fine_tuned(self):
        with pytest.raises(ConfigError, match=r"label_columns: .*- label_column_name: COLUMN.*or give label=COLUMN"):
            compose("fine_tune_train_config", ["label_columns=[]"]).key_view("finetune")

    def test_neither_masks_nor_labels_is_nothing_to_learn(self):
        run = compose("pre_train_config", [BOTH, "fields=genes_expressions_unmasked", "label_columns=[]"])
        with pytest.raises(ConfigError, match="nothing is predicted"):
            run.key_view("pretrain")


class TestHeads:
    @pytest.mark.parametrize("loss", [name for name, kind in LOSSES.items() if "field" in kind.sources])
    def test_a_field_loss_brings_the_head_that_it_reads(self, loss):
        if loss == "hce":
            pytest.skip("is for labels with an ontology")
        overrides = [losses(on_field("expressions", loss))]
        assert compose("pre_train_config", overrides).fields[1].decode_modes == {LOSSES[loss].decoder: {}}

    def test_two_losses_share_a_head(self):
        run = compose("pre_train_config", [losses(on_field("expressions", "mse"), on_field("expressions", "mae"))])
        assert run.fields[1].decode_modes == {"regression": {}}

    def test_heads_that_are_written_stay_with_their_options(self):
        run = compose(
            "pre_train_config",
            [
                "+fields.1.decode_modes={mvc_regression: {query_field: genes}}",
                losses(on_field("expressions", "is_zero_bce")),
            ],
        )
        assert run.fields[1].decode_modes == {"mvc_regression": {"query_field": "genes"}, "is_zero": {}}

    def test_a_field_that_is_not_masked_has_none(self):
        assert compose("pre_train_config").fields[0].decode_modes == {}
        assert all(field.decode_modes == {} for field in compose("fine_tune_train_config").fields)
