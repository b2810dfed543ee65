"""From a task section to arguments of the Lightning Trainer: what cannot be done is an error, what is done differently a note."""

import re
from typing import Any

from bmfm_pipeline.config import TrainingTaskConfig
from bmfm_pipeline.errors import ConfigError

STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false", "fsdp")
SHARDED_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


def processes(devices: int | str | list[int], gpus: int) -> tuple[int, list[int] | None]:
    """How many processes task.devices asks for, and the numbers of the devices when it names them.

    A number, a list of device numbers (also as text), -1 for every GPU, `auto` for one: more would change the batch that a step
    is made of. Raises ConfigError.
    """
    if isinstance(devices, str):
        text = devices.strip()
        if text == "auto":
            return 1, None
        if not re.fullmatch(r"-?\d+(\s*,\s*\d+)*,?", text):
            raise ConfigError(f"task.devices: {devices!r} is neither a number, a list of device numbers, -1 nor auto")
        numbers = [int(part) for part in text.split(",") if part.strip()]
        devices = numbers if "," in text else numbers[0]
    if isinstance(devices, int):
        if devices == -1:
            return max(gpus, 1), None
        if devices < 1:
            raise ConfigError(
                f"task.devices: {devices} devices cannot train; use a number from 1, -1 for every GPU, or auto"
            )
        return devices, None
    if not devices or len(set(devices)) < len(devices) or min(devices) < 0:
        raise ConfigError(f"task.devices: {devices} must name at least one device, each once")
    return len(devices), list(devices)


def trainer_options(
    task: TrainingTaskConfig, train_batches: int, dev_batches: int, world_size: int
) -> tuple[dict[str, Any], list[str]]:
    """Arguments of the Trainer, and notes on what is done otherwise than asked. Raises ConfigError.

    `train_batches` and `dev_batches` are what the data has in an epoch.
    """
    _refuse(task)
    notes: list[str] = []
    # Overfitting is training on the first batches only; the sampler keeps them the same.
    name = "overfit_batches" if task.overfit_batches else "limit_train_batches"
    train_limit = _limit(name, getattr(task, name), train_batches, notes)
    if train_limit == 0:
        raise ConfigError(f"task.{name} is 0: nothing would be trained")
    dev_limit = _limit("limit_val_batches", task.limit_val_batches, dev_batches, notes) if dev_batches else 0
    options = dict(
        accelerator=task.accelerator,
        devices=world_size,
        strategy=_strategy(task, world_size, notes),
        precision=task.precision,
        max_epochs=task.max_epochs if task.max_epochs is not None else -1,
        min_epochs=task.min_epochs,
        max_steps=task.max_steps,
        min_steps=task.min_steps,
        max_time=task.max_time,
        accumulate_grad_batches=task.accumulate_grad_batches,
        gradient_clip_val=task.gradient_clip_val,
        gradient_clip_algorithm=task.gradient_clip_algorithm,
        limit_train_batches=train_limit,
        limit_val_batches=dev_limit,
        num_sanity_val_steps=task.num_sanity_val_steps,
        deterministic=task.deterministic,
        detect_anomaly=task.detect_anomaly,
        fast_dev_run=task.fast_dev_run,
        sync_batchnorm=task.sync_batchnorm,
        inference_mode=task.inference_mode,
        log_every_n_steps=task.log_every_n_steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    given = {name: value for name, value in options.items() if value is not None}
    # Here None is a value: to count batches across epochs.
    return given | _validation_times(task, train_limit or train_batches, notes), notes


def _refuse(task: TrainingTaskConfig) -> None:
    if task.num_nodes != 1:
        raise ConfigError(
            f"task.num_nodes is {task.num_nodes}: training runs on one machine, whose run folder one process leads; use task.devices for "
            "several GPUs of it"
        )
    if task.max_steps == 0 or task.max_steps < -1:
        raise ConfigError(
            f"task.max_steps is {task.max_steps}: use a number of optimiser steps from 1, or -1 for no limit"
        )
    ends = task.max_epochs is not None or task.max_steps > 0 or task.max_time is not None
    if not ends and task.early_stopping_patience is None and not task.fast_dev_run:
        raise ConfigError(
            "task: training would never end; set max_epochs, max_steps, max_time or early_stopping_patience"
        )
    if task.strategy not in STRATEGIES:
        raise ConfigError(f"task.strategy: '{task.strategy}' is not offered; use one of {', '.join(STRATEGIES)}")
    if task.precision == "16-true":
        raise ConfigError(
            "task.precision 16-true cannot train: the steps and the epsilon of AdamW are 0 in float16; use 16-mixed, bf16-mixed or "
            "bf16-true"
        )


def _strategy(task: TrainingTaskConfig, world_size: int, notes: list[str]) -> str:
    if task.strategy == "fsdp" and world_size > 1:
        if task.accelerator != "gpu":
            raise ConfigError(
                f"task.strategy fsdp shards a model over GPUs, and this training runs on {task.accelerator}; use task.strategy=ddp"
            )
        if task.precision not in SHARDED_PRECISIONS:
            raise ConfigError(
                f"task.precision {task.precision} does not go with task.strategy fsdp; use {', '.join(SHARDED_PRECISIONS)}"
            )
        return "fsdp"
    if world_size > 1:
        # A head or pooler that no loss reads is common, and plain ddp fails on parameters without gradients.
        return "ddp_find_unused_parameters_true" if task.strategy in ("auto", "ddp") else task.strategy
    if task.strategy != "auto":
        notes.append(f"task.strategy {task.strategy} is not used: one process trains (task.devices is {task.devices})")
    return "auto"


def _limit(name: str, wanted: float | int | None, batches: int, notes: list[str]) -> int | None:
    """A limit as a number of batches: an integer counts, a fraction is a share. None when there is no limit."""
    if wanted is None:
        return None
    if wanted < 0 or (isinstance(wanted, float) and wanted > 1):
        raise ConfigError(f"task.{name} is {wanted}: use a share of the batches in 0..1, or a whole number of them")
    count = min(wanted, batches) if isinstance(wanted, int) else int(batches * wanted)
    if count < 1 and wanted:
        notes.append(f"task.{name}: {wanted} of {batches} batches is less than one, so one is used")
        count = 1
    return count


def _validation_times(task: TrainingTaskConfig, batches: int, notes: list[str]) -> dict[str, Any]:
    """When validation runs: always between optimiser steps, and at least once in an epoch's batches.

    Lightning refuses intervals longer than an epoch, and would validate in the middle of an optimiser step.
    """
    every_epochs, interval, gather = task.check_val_every_n_epoch, task.val_check_interval, task.accumulate_grad_batches
    if interval is None or task.fast_dev_run:
        return {"check_val_every_n_epoch": every_epochs or 1}
    if isinstance(interval, float):
        if not 0 < interval <= 1:
            raise ConfigError(
                f"task.val_check_interval is {interval}: use a share of an epoch in 0..1, or a whole number of batches"
            )
        count = int(batches * interval)
        if count < 1:
            notes.append(
                f"task.val_check_interval {interval} of {batches} batches is less than one: validating after every batch"
            )
            count = 1
    else:
        count = interval
        if count < 1:
            raise ConfigError(
                f"task.val_check_interval is {interval}: use at least one batch, or a share of an epoch in 0..1"
            )
    if count == batches:
        return {"check_val_every_n_epoch": every_epochs or 1}
    if count > batches:
        every = max(1, round(count / batches))
        notes.append(
            f"task.val_check_interval {interval} is more than the {batches} batches of an epoch: validating every {every} epochs"
        )
        return {"check_val_every_n_epoch": every}
    if every_epochs is None and gather > 1:
        notes.append("task.check_val_every_n_epoch null is read as 1 where gradients are accumulated")
        every_epochs = 1
    if count % gather:
        rounded = min(-(-count // gather) * gather, batches)
        notes.append(
            f"task.val_check_interval of {count} batches: validating every {rounded}, between optimiser steps of {gather} batches"
        )
        count = rounded
    return {"val_check_interval": count, "check_val_every_n_epoch": every_epochs}
