"""Losses that predict a whole cell from part of it: which they are, what they need, which head they read."""

from typing import TYPE_CHECKING, Any

from bmfm_pipeline.errors import ConfigError

if TYPE_CHECKING:
    from bmfm_pipeline.config.run_config import RunConfig

VOCABULARY = "genes"
WHOLE_CELL_LOSSES = ("mse", "mae", "is_zero_bce", "is_zero_focal")


def value_field(run: "RunConfig") -> str | None:
    """The field whose values are the targets: the first input that is not the genes."""
    return next((field.field_name for field in run.fields if field.is_input and field.field_name != VOCABULARY), None)


def default_whole_cell_losses(run: "RunConfig") -> list[dict[str, Any]]:
    """Mean squared error on the genes that the model does not see, or on the first label set asked for."""
    field, sets = value_field(run), run.data_module.masking_strategy.label_sets
    if field is None:
        return []
    chosen = "non_input" if "non_input" in sets else sets[0]
    return [{"field_name": field, "name": "mse", "wced_target": f"{chosen}_{VOCABULARY}"}]


def check_whole_cell_loss(entry: dict[str, Any], path: str, run: "RunConfig") -> None:
    """Raise ConfigError where a loss with a wced_target cannot be computed."""
    field, loss, target = entry["field_name"], entry["name"], entry["wced_target"]
    if not run.predicts_whole_cells:
        raise ConfigError(
            f"{path}: wced_target needs whole-cell targets: set data_module.masking_strategy={{kind: wced}} and collation_strategy to "
            "language_modeling or multitask, or remove this loss"
        )
    if field != value_field(run):
        raise ConfigError(f"{path}: whole-cell targets are values of the field '{value_field(run)}', not of '{field}'")
    if loss not in WHOLE_CELL_LOSSES:
        raise ConfigError(f"{path}: loss {loss} cannot predict whole cells; use {', '.join(WHOLE_CELL_LOSSES)}")
    sets = [f"{name}_{VOCABULARY}" for name in run.data_module.masking_strategy.label_sets]
    if target not in sets:
        raise ConfigError(
            f"{path}: wced_target {target!r} is not among the targets that are made ({', '.join(sets)}); add it to "
            "data_module.masking_strategy.label_sets, or choose one of them"
        )


def whole_cell_head(losses: list[dict[str, Any]], given: dict[str, Any] | None) -> dict[str, Any]:
    """The head that the whole-cell losses of one field read: an output for each kind of loss, unless the config says which."""
    names = list(dict.fromkeys(entry["name"] for entry in losses))
    return {"vocab_field": VOCABULARY, "logit_outputs": names, **(given or {})}
