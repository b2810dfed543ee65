"""Checks across sections, made before any data is read: losses against fields, labels, masks and heads."""

from typing import TYPE_CHECKING, Any

from bmfm_pipeline.config.data_module import NORMALISING
from bmfm_pipeline.config.losses import LOSSES, decode_mode, default_loss, read_loss
from bmfm_pipeline.config.models import WITHOUT_PAIRS
from bmfm_pipeline.config.perturbation import LABEL_FIELDS, check_pairs
from bmfm_pipeline.config.reshaping import check_read_depth, check_square_root
from bmfm_pipeline.config.schedule import settle_epochs
from bmfm_pipeline.config.sequences import check_sequences
from bmfm_pipeline.config.whole_cells import check_whole_cell_loss, default_whole_cell_losses, whole_cell_head
from bmfm_pipeline.errors import ConfigError

if TYPE_CHECKING:
    from bmfm_pipeline.config.run_config import RunConfig
    from bmfm_pipeline.config.sections import LabelColumnInfo


def resolve_losses(run: "RunConfig") -> list[dict[str, Any]]:
    """The losses of a run, named and checked; `null` becomes one loss per masked field and per label column.

    Raises ConfigError with the position of the entry and what to change.
    """
    if run.trainer.losses is None:
        return _default_losses(run)
    losses = [_checked(dict(entry), f"trainer.losses.{index}", run) for index, entry in enumerate(run.trainer.losses)]
    seen: dict[tuple, int] = {}
    for index, entry in enumerate(losses):
        key = (
            entry.get("field_name"),
            entry.get("label_column_name"),
            entry.get("wced_target") or entry.get("loss_group"),
            entry["name"],
        )
        if key in seen:
            raise ConfigError(
                f"trainer.losses.{index}: the same loss as trainer.losses.{seen[key]} ({entry['name']} on {key[0] or key[1]}); remove "
                "one of them, or give one a loss_group"
            )
        seen[key] = index
    if losses and not any(entry.get("weight", 1) for entry in losses):
        raise ConfigError(
            "trainer.losses: every loss has weight 0, so nothing would be learned; give one a weight above 0"
        )
    return losses


def _default_losses(run: "RunConfig") -> list[dict[str, Any]]:
    losses: list[dict[str, Any]] = default_whole_cell_losses(run) if run.predicts_whole_cells else []
    if run.predicts_pairs:
        for field in run.fields:
            if field.field_name in LABEL_FIELDS:
                losses.append({"field_name": field.field_name, "name": "mse" if field.continuous else "cross_entropy"})
    if run.predicts_fields and not run.predicts_whole_cells:
        for field in run.fields:
            if field.is_masked:
                names = ("mse", "is_zero_bce") if field.continuous else ("cross_entropy",)
                losses += [{"field_name": field.field_name, "name": name} for name in names]
    if run.predicts_labels:
        for label in run.label_columns:
            losses.append({"label_column_name": label.label_column_name, "name": _default_label_loss(label)})
    return losses


def _default_label_loss(label: "LabelColumnInfo") -> str:
    return default_loss(
        True,
        is_regression=label.is_regression_label,
        is_multilabel=label.is_multilabel,
        has_ontology=label.label_ontology is not None,
    )


def _checked(entry: dict[str, Any], path: str, run: "RunConfig") -> dict[str, Any]:
    field_name, label_name = entry.get("field_name"), entry.get("label_column_name")
    labels = {label.label_column_name: label for label in run.label_columns}
    fields = {field.field_name: field for field in run.fields}
    if label_name in labels:
        default = _default_label_loss(labels[label_name])
    else:
        default = default_loss(False, is_continuous=field_name in fields and fields[field_name].continuous)
    entry = read_loss(entry, path, default)
    if "field_name" in entry:
        _check_field_loss(field_name, entry, path, run)
    else:
        _check_label_loss(label_name, entry, path, run, labels)
    return entry


def _check_field_loss(field_name: str, entry: dict[str, Any], path: str, run: "RunConfig") -> None:
    loss = entry["name"]
    fields = {field.field_name: field for field in run.fields}
    if field_name not in fields:
        raise ConfigError(f"{path}: field '{field_name}' is not among fields ({', '.join(fields)})")
    if entry.get("wced_target"):
        check_whole_cell_loss(entry, path, run)
        return
    if run.predicts_whole_cells:
        raise ConfigError(
            f"{path}: loss {loss} on field '{field_name}' needs masked tokens, but masking_strategy wced masks none; give the loss a "
            "wced_target, such as non_input_genes"
        )
    position = [field.field_name for field in run.fields].index(field_name)
    if run.predicts_pairs:
        if field_name not in LABEL_FIELDS:
            raise ConfigError(
                f"{path}: loss {loss} on field '{field_name}': pairs of cells are compared by {', '.join(LABEL_FIELDS)}"
            )
    elif not fields[field_name].is_masked:
        raise ConfigError(
            f"{path}: loss {loss} on field '{field_name}' needs that field to be masked, but its is_masked is false; "
            f"set fields.{position}.is_masked=true, or remove this loss"
        )
    if not run.predicts_pairs and not run.data_module.masks:
        raise ConfigError(
            f"{path}: loss {loss} on field '{field_name}' needs masked tokens, but data_module.mlm is false; "
            "set data_module.mlm=true, or remove this loss"
        )
    if not run.predicts_fields and not run.predicts_pairs:
        raise ConfigError(
            f"{path}: loss {loss} on field '{field_name}' needs collation_strategy language_modeling or multitask, "
            f"found {run.data_module.collation_strategy}"
        )
    if LOSSES[loss].decoder == "token_scores" and fields[field_name].continuous:
        raise ConfigError(
            f"{path}: loss {loss} predicts tokens, but field '{field_name}' is continuous (tokenization_strategy "
            "continuous_value_encoder); use mse, mae or is_zero_bce"
        )
    if field_name == "genes" and loss not in ("cross_entropy", "focal"):
        raise ConfigError(
            f"{path}: loss {loss} predicts numbers, but genes are names; use cross_entropy or focal, or another field"
        )
    mode = decode_mode(entry, loss)
    if mode.removeprefix("mvc_") != LOSSES[loss].decoder or mode == "mvc_token_scores":
        heads = [f"{field_name}_{LOSSES[loss].decoder}"]
        if LOSSES[loss].decoder != "token_scores":
            heads.append(f"{field_name}_mvc_{LOSSES[loss].decoder}")
        raise ConfigError(
            f"{path}: loss {loss} cannot read decoder_key {entry['decoder_key']!r}; use {' or '.join(heads)}, or leave it out"
        )


def _check_label_loss(
    label_name: str, entry: dict[str, Any], path: str, run: "RunConfig", labels: dict[str, "LabelColumnInfo"]
) -> None:
    loss = entry["name"]
    if label_name not in labels:
        known = ", ".join(labels) or "none are set"
        raise ConfigError(
            f"{path}: label column '{label_name}' is not among label_columns ({known}); add `- label_column_name: {label_name}` to label_columns"
        )
    if not run.predicts_labels:
        raise ConfigError(
            f"{path}: a loss on label column '{label_name}' needs collation_strategy multitask or sequence_classification, "
            f"found {run.data_module.collation_strategy}"
        )
    label = labels[label_name]
    if label.is_regression_label:
        kind, fitting = "a number (is_regression_label is true)", ("mse", "mae")
    elif label.is_multilabel:
        kind, fitting = "several classes at once (is_multilabel is true)", ("bce_with_logits",)
    else:
        kind, fitting = "one class", ("cross_entropy", "focal", "ldam", "hce")
    if loss not in fitting:
        raise ConfigError(
            f"{path}: loss {loss} does not fit label column '{label_name}', which is {kind}; use {' or '.join(fitting)}, or correct "
            "the label column"
        )
    if loss == "hce" and label.label_ontology is None:
        raise ConfigError(
            f"{path}: loss hce needs to know which classes lie under which; set label_ontology of label column '{label_name}' to an OBO "
            "or OWL file, such as the Cell Ontology, or use cross_entropy"
        )
    if entry.get("class_weights") and run.data_module.balancing_label_column == label_name:
        run.note(
            f"{path}: class_weights come on top of data_module.balancing_label_column, which already draws the classes of "
            f"'{label_name}' equally often; one of the two is usually enough"
        )


def check_run(run: "RunConfig") -> None:
    """Contradictions between sections."""
    names = [field.field_name for field in run.fields]
    labels = [label.label_column_name for label in run.label_columns]
    for kind, values in (("fields", names), ("label_columns", labels)):
        if duplicates := sorted({name for name in values if values.count(name) > 1}):
            raise ConfigError(f"{kind}: {', '.join(duplicates)} named more than once")
    if not any(field.is_input for field in run.fields):
        raise ConfigError("fields: at least one field must be an input")
    strategy = run.data_module.collation_strategy
    check_pairs(run)
    if strategy == "language_modeling" and not run.predicts_fields:
        raise ConfigError(
            "data_module: collation_strategy language_modeling with mlm=false has nothing to predict; set mlm=true"
        )
    if strategy == "sequence_classification" and run.data_module.mlm:
        raise ConfigError(
            "data_module: collation_strategy sequence_classification does not mask, but mlm is true; set mlm=false, or "
            "collation_strategy=multitask for both"
        )
    check_sequences(run)
    check_read_depth(run)
    check_square_root(run)
    _check_log_normalised(run)
    if run.is_training:
        _check_training(run)


def _check_log_normalised(run: "RunConfig") -> None:
    """Values of which the logarithm was taken are neither normalised again nor taken for reads."""
    module = run.data_module
    if module.transform_kwargs.input_values != "log_normalised" or not module.transform_datasets:
        return
    for index, step in enumerate(module.transform_kwargs.transforms or []):
        if step.transform_name in NORMALISING:
            raise ConfigError(
                f"data_module.transform_kwargs.transforms.{index}: {step.transform_name} would normalise a second time, for input_values says "
                "log_normalised; remove the step, or set input_values=counts"
            )
    if module.rda_transform is not None:
        raise ConfigError(
            f"data_module.rda_transform: {module.rda_transform} draws reads, and log-normalised values (transform_kwargs.input_values) hold "
            "none; set it to null, or give the counts"
        )


def _check_training(run: "RunConfig") -> None:
    module = run.data_module
    lora = run.trainer.lora_config
    if lora is not None and not run.sizes_from_checkpoint:
        lora.check_type(run.model.model_type)
    if module.prevent_attention_to_masked and run.model.model_type in WITHOUT_PAIRS:
        raise ConfigError(
            f"data_module.prevent_attention_to_masked: {run.model.model_type} approximates attention and cannot hide single pairs of "
            "positions; set it to false, or use model=scbert, model=modernbert or model=llama"
        )
    masked = any(field.is_masked for field in run.fields) or run.predicts_whole_cells
    if module.collation_strategy == "language_modeling" and not masked:
        raise ConfigError("fields: language modelling needs a field with is_masked=true, found none")
    if module.batch_schedule:
        settle_epochs(module.batch_schedule, run.task.max_epochs)
        _check_scheduled_task(run.task)
    places, longest = run.model.max_position_embeddings, max(module.lengths)
    if run.model.position_embedding_type is not None and longest > places:
        raise ConfigError(
            f"data_module.max_length {longest} is longer than model.max_position_embeddings {places}; raise the latter, or "
            "set model.position_embedding_type=null"
        )
    balanced = module.balancing_label_column
    classes = [
        label.label_column_name
        for label in run.label_columns
        if not label.is_regression_label and not label.is_multilabel
    ]
    if balanced is not None and balanced not in classes:
        raise ConfigError(
            f"data_module.balancing_label_column: '{balanced}' is no label column with classes ({', '.join(classes) or 'none are set'})"
        )


def _check_scheduled_task(task: Any) -> None:
    """Epochs of a schedule have different numbers of batches, so nothing may be counted as a share of an epoch's."""
    found = [("limit_train_batches", task.limit_train_batches), ("overfit_batches", task.overfit_batches)]
    for name, value in [*found, ("val_check_interval", task.val_check_interval)]:
        if value and not (name == "limit_train_batches" and (isinstance(value, int) or value == 1.0)):
            raise ConfigError(
                f"task.{name}: {value} does not go with data_module.batch_schedule, whose epochs have different numbers of batches; "
                + (
                    "use a whole number"
                    if name == "limit_train_batches"
                    else "remove it: validation is at the end of epochs"
                )
            )


def derive_decode_modes(run: "RunConfig", losses: list[dict[str, Any]]) -> None:
    """Give each masked field exactly the heads that its losses read, so that no loss meets a missing head."""
    for field in run.fields:
        if field.decode_modes is None:
            field.decode_modes = {}
        for entry in losses:
            if entry.get("field_name") == field.field_name:
                field.decode_modes.setdefault(decode_mode(entry, entry["name"]), {})
        for mode, options in field.decode_modes.items():
            # A masked value asks for itself by its gene; its own embedding would be the same for all masked values.
            if mode.startswith("mvc_") and any(other.field_name == "genes" and other.is_input for other in run.fields):
                options.setdefault("query_field", "genes")
        whole = [entry for entry in losses if entry.get("field_name") == field.field_name and entry.get("wced_target")]
        if whole:
            field.decode_modes["wced"] = whole_cell_head(whole, field.decode_modes.get("wced"))
        if not field.decode_modes and field.is_masked and run.predicts_fields and not run.predicts_whole_cells:
            field.decode_modes = {"regression": {}, "is_zero": {}} if field.continuous else {"token_scores": {}}
