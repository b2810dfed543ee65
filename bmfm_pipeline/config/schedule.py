"""Lengths and batch sizes that change from epoch to epoch: the entries of data_module.batch_schedule."""

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from bmfm_pipeline.config.strict import Section
from bmfm_pipeline.errors import ConfigError

SCHEDULED = "scheduled"


class BatchScheduleEntry(Section):
    """Some epochs of training with batches of their own; a length or size left out is the data module's.

    `n_epochs` is given for all entries, their sum being task.max_epochs, or for none: the epochs are then shared out evenly.
    """

    max_length: int | None = Field(None, gt=2)
    batch_size: int | None = Field(None, gt=0)
    n_epochs: int | None = Field(None, gt=0)


def settle_scheduled(values: dict[str, Any]) -> dict[str, Any]:
    """`max_length: scheduled` and `batch_size: scheduled` as numbers, for all that does not follow the schedule.

    They are those of the entry with the longest cells (the largest batch, where only sizes change). Raises ValueError.
    """
    asked = [key for key in ("max_length", "batch_size") if values.get(key) == SCHEDULED]
    if not asked:
        return values
    entries = values.get("batch_schedule") or []
    if not isinstance(entries, list):
        return values  # refused where its type is checked
    plain = [entry if isinstance(entry, dict) else dict(entry) for entry in entries]
    for key in asked:
        missing = [number for number, entry in enumerate(plain) if not isinstance(entry.get(key), int)]
        if not plain or missing:
            where = f"entry {missing[0]} of batch_schedule gives none" if missing else "batch_schedule is not set"
            raise ValueError(
                f"{key} is scheduled, but {where}; write batch_schedule: [{{max_length: 256, batch_size: 64}}, "
                "{max_length: 512, batch_size: 32}]"
            )
    longest = max(plain, key=lambda entry: (entry.get("max_length") or 0, entry.get("batch_size") or 0))
    return {**values, **{key: longest[key] for key in asked}}


def settle_epochs(entries: Sequence[BatchScheduleEntry], max_epochs: int | None) -> None:
    """Give every entry its number of epochs, earlier ones one more where they do not divide evenly. Raises ConfigError."""
    where = "data_module.batch_schedule"
    if max_epochs is None:
        raise ConfigError(f"{where}: epochs are scheduled, so task.max_epochs must be set")
    given = [entry.n_epochs for entry in entries if entry.n_epochs is not None]
    if given and len(given) < len(entries):
        raise ConfigError(
            f"{where}: n_epochs is given for {len(given)} of {len(entries)} entries; give it for all or none"
        )
    if given and sum(given) != max_epochs:
        raise ConfigError(
            f"{where}: the entries' n_epochs add up to {sum(given)}, task.max_epochs is {max_epochs}; make them equal, or leave "
            "n_epochs out to share the epochs evenly"
        )
    if len(entries) > max_epochs:
        raise ConfigError(
            f"{where}: {len(entries)} entries need at least as many epochs; task.max_epochs is {max_epochs}"
        )
    each, more = divmod(max_epochs, len(entries))
    for number, entry in enumerate(entries):
        entry.n_epochs = entry.n_epochs or each + (number < more)
