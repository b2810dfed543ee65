"""The training process: `python -m bmfm_pipeline.training.child SPEC.json`. stdout carries JSON events, stdin is the parent's pipe."""

import json
import logging
import os
import re
import sys
import time
import traceback
import warnings
from pathlib import Path

from bmfm_pipeline.errors import ConfigError, PipelineError
from bmfm_pipeline.training.spec import EXIT_PREEMPTED, TrainSpec
from bmfm_pipeline.training.stopping import IS_FIRST, StopRequest, emit, note

STARTED = float(os.environ.get("BMFM_CHILD_STARTED") or time.time())


def main(spec_file: str) -> int:
    stop = StopRequest()
    stop.watch()  # before the seconds that imports take
    stop.watch_parent()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    try:
        summary = train(TrainSpec.from_file(spec_file), stop)
    except PipelineError as error:
        emit({"kind": "error", "error": type(error).__name__, "message": str(error)}, every_process=True)
        return 2
    except Exception as error:
        traceback.print_exc()
        if not is_out_of_memory(error):
            return 1
        emit({"kind": "error", "error": "TrainingError", "message": out_of_memory_message(error)}, every_process=True)
        return 2
    if summary is None:
        emit({"kind": "preempted", "reason": stop.reason or "another process was asked to stop"})
        return EXIT_PREEMPTED
    emit({"kind": "done", "summary": summary})
    return 0


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on the host or on an accelerator, whose libraries say so in words only."""
    text = str(error).lower()
    words = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(word in text for word in words)


def out_of_memory_message(error: Exception) -> str:
    found = re.search(r"[Tt]ried to allocate ([\d.]+ ?\w+)", str(error))
    return (
        f"out of memory{f' (tried to allocate {found[1]})' if found else ''}; lower data_module.batch_size (and raise "
        "task.accumulate_grad_batches to keep the effective batch), data_module.max_length, or model.hidden_size / num_hidden_layers"
    )


def train(spec: TrainSpec, stop: StopRequest) -> dict | None:
    """Train as `spec` says; returns the summary, or None when stopped early with a checkpoint to resume from."""
    from bmfm_pipeline.config import RunConfig, find_accelerator, settle_execution
    from bmfm_pipeline.training.lease import acquire

    run = RunConfig.model_validate(spec.config)
    task, notes = settle_execution(run.task, find_accelerator())
    for text in notes:
        note(text)
    run = run.model_copy(update={"task": task})
    run_dir = Path(spec.run_dir)
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    lease = acquire(run_dir) if IS_FIRST else None
    try:
        return _train(spec, run, stop, lease)
    finally:
        _leave_group()
        if lease is not None:
            lease.release()


def _train(spec: TrainSpec, run, stop: StopRequest, lease) -> dict | None:
    import pytorch_lightning as pl
    import torch

    from bmfm_pipeline.models.gene2vec import describe_pretrained
    from bmfm_pipeline.training.adaptive import adaptive_masking
    from bmfm_pipeline.training.callbacks import History, Patience, Progress
    from bmfm_pipeline.training.checkpoints import newest_valid, read_place
    from bmfm_pipeline.training.data_module import build_data_module
    from bmfm_pipeline.training.export import export_model
    from bmfm_pipeline.training.keeping import Checkpointing, Position
    from bmfm_pipeline.training.module import build_module
    from bmfm_pipeline.training.options import trainer_options
    from bmfm_pipeline.training.validation import validate_once

    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)  # their tips are not for our readers
    task, run_dir = run.task, Path(spec.run_dir)
    pl.seed_everything(run.seed.seed_value, verbose=False)
    if task.tf32_mode and task.accelerator == "gpu":
        torch.set_float32_matmul_precision(task.tf32_mode)
    run = _sizes_of_checkpoint(run, spec.init_from)
    data = build_data_module(run, spec.data)
    data.setup("fit")
    module = build_module(run, data)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    dev_batches = len(data.val_dataloader()) if len(data.rows["dev"]) else 0
    options, notes = trainer_options(task, data.most_train_batches, dev_batches, world_size)
    options.update(data.trainer_options)
    notes += _execution_notes(task)
    for text in notes + describe_pretrained(module.model.config.fields):
        note(text)

    position = Position(data, options.get("limit_train_batches"), bool(task.overfit_batches))
    keeping = Checkpointing(run_dir / "checkpoints", position, lease, stop, task.checkpoints_every_n_train_steps)
    history = History(run_dir / "history.jsonl", task.log_every_n_steps, position)
    progress = Progress(spec.stage, STARTED, position)
    resume = newest_valid(keeping.folder, note)
    if resume is None:
        _start_weights(module, spec, run_dir)
    else:
        place = read_place(resume)
        keeping.restore(place, module)
        note(f"resuming from {resume.name} at step {place['step']}")
    if IS_FIRST:
        history.cut(keeping.saved_step, keeping.validated_step)
    _freeze(module.model, task.freeze_layers)
    watching = adaptive_masking(run, data, module, position)
    patience = [Patience(task.early_stopping_patience)] if task.early_stopping_patience else []
    trainer = _trainer(options, [position, *watching, *patience, history, progress, keeping], run_dir)
    parameters = sum(parameter.numel() for parameter in module.model.parameters())
    trained = sum(parameter.numel() for parameter in module.model.parameters() if parameter.requires_grad)
    if task.enable_model_summary:
        from pytorch_lightning.utilities.model_summary import ModelSummary

        note(str(ModelSummary(module, max_depth=3)))
    emit({"kind": "start", "stage": spec.stage, "parameters": parameters, "trained_parameters": trained})
    if stop.reason is not None:
        return None
    if not _fit(trainer, module, data, resume, stop) or keeping.stopped:
        return None
    step = int(trainer.global_step)
    missing = keeping.saved_step != step or not keeping.last.exists()
    if (missing or (dev_batches and keeping.validated_step != step)) and not validate_once(
        trainer, module, data, keeping, [history, progress]
    ):
        return None
    if not IS_FIRST:
        return {}
    summary = export_model(run, spec, module, data, keeping)
    summary.update(
        steps=step,
        epochs=position.epochs,
        cells_per_s=round(progress.cells_per_s, 1),
        loader_wait_share=round(progress.loader_wait, 3),
        first_batch_after_s=round(progress.first_batch_after or 0.0, 2),
        accelerator=task.accelerator,
        devices=world_size,
        precision=task.precision,
        preset=run.preset_used,
    )
    return summary


def _trainer(options: dict, callbacks: list, run_dir: Path):
    import pytorch_lightning as pl
    from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    from bmfm_pipeline.training.keeping import WholeFiles

    # Named, so that a batch system around us is not taken for one that has started these processes.
    environment = TorchElasticEnvironment() if options["devices"] > 1 else LightningEnvironment()
    try:
        return pl.Trainer(
            **options, callbacks=callbacks, plugins=[WholeFiles(), environment], default_root_dir=str(run_dir)
        )
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise ConfigError(f"task: {error}") from error


def _fit(trainer, module, data, resume: Path | None, stop: StopRequest) -> bool:
    """Run Lightning's loop; False when it ended because we were asked to stop."""
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    except MisconfigurationException as error:
        raise ConfigError(f"task: {error}") from error
    except (KeyboardInterrupt, SystemExit):
        if stop.reason is None and not trainer.should_stop:
            raise
        return False
    return True


def _execution_notes(task) -> list[str]:
    import torch

    notes = []
    if task.default_root_dir:
        notes.append(
            f"task.default_root_dir {task.default_root_dir} is not used: what is trained is published in the workspace"
        )
    if task.tf32_mode and task.accelerator != "gpu":
        notes.append(f"task.tf32_mode {task.tf32_mode} is not used: it is for GPUs")
    if task.devices == "auto" and task.accelerator == "gpu" and (count := torch.cuda.device_count()) > 1:
        notes.append(
            f"one of {count} GPUs is used; set task.devices={count} for all (a step is then made of {count} batches)"
        )
    return notes


def _leave_group() -> None:
    """Processes that leave a group one by one abort it."""
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _sizes_of_checkpoint(run, init_from: str | None):
    """Where nobody wrote model sizes, fine-tuning takes those of the model it starts from."""
    from bmfm_pipeline.config.models import read_model

    if init_from is None or not run.sizes_from_checkpoint:
        return run
    stored = json.loads((Path(init_from) / "config.json").read_text())
    named, found = run.model.model_type, stored["model_type"]
    if named not in ("scbert", found):  # scbert is also what a config says that does not choose
        raise ConfigError(
            f"model: the config asks for {named}, but the checkpoint it starts from is {found}; use model={found.removeprefix('sc')}, or "
            f"another model.checkpoint ({init_from})"
        )
    if found != named:
        note(f"model: {found}, as the checkpoint it starts from")
    kind = type(read_model({"model_type": found}))
    sizes = {name: stored[name] for name in kind.model_fields if name in stored and name != "checkpoint"}
    return run.model_copy(update={"model": read_model({**sizes, "checkpoint": run.model.checkpoint})})


def _start_weights(module, spec: TrainSpec, run_dir: Path) -> None:
    from bmfm_pipeline.storage import write_json_atomic

    if spec.init_from is None:
        note(f"{spec.stage}: training FROM SCRATCH (model.checkpoint is null)")
        return
    from bmfm_pipeline.models import initialise_from

    report = initialise_from(module.model, spec.init_from)
    if IS_FIRST:
        write_json_atomic(run_dir / "loading_report.json", report.to_dict())
    note(report.render())


def _freeze(model, freeze_layers: bool | str) -> None:
    """freeze_layers true freezes the encoder; a text is a regular expression over parameter names."""
    if not freeze_layers:
        return
    try:
        pattern = re.compile(model.encoder_pattern if freeze_layers is True else freeze_layers)
    except re.error as error:
        raise ConfigError(f"task.freeze_layers: {freeze_layers!r} is not a regular expression ({error})") from error
    names = {name for name, _ in model.named_parameters() if pattern.search(name)}
    if not names:
        parts = sorted({".".join(name.split(".")[:3]) for name, _ in model.named_parameters()})
        raise ConfigError(
            f"task.freeze_layers: no parameter matches {pattern.pattern!r}, nothing would be frozen; names begin with {', '.join(parts)}"
        )
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad = False


def _leave(code: int) -> None:
    """End at once: unloading everything that Lightning imports would take seconds, and all files are closed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _leave(main(sys.argv[1]))
