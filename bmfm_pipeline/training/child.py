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

from bmfm_pipeline.errors import ConfigError, PipelineError, is_out_of_memory, out_of_memory_message
from bmfm_pipeline.tracking.redaction import RedactedLines
from bmfm_pipeline.training.spec import EXIT_PREEMPTED, TrainSpec
from bmfm_pipeline.training.stopping import IS_FIRST, EventLog, StopRequest, emit, note

STARTED = float(os.environ.get("BMFM_CHILD_STARTED") or time.time())


def main(spec_file: str) -> int:
    stop = StopRequest()
    stop.watch()  # before the seconds that imports take
    stop.watch_parent()
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(RedactedLines("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[lines])
    logging.getLogger().addHandler(EventLog())
    logging.getLogger("bmfm_pipeline").setLevel(logging.INFO)
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


def train(spec: TrainSpec, stop: StopRequest) -> dict | None:
    """Train as `spec` says; returns the summary, or None when stopped early with a checkpoint to resume from."""
    from bmfm_pipeline.config import RunConfig, find_accelerator, settle_execution
    from bmfm_pipeline.storage import disk_errors
    from bmfm_pipeline.training.lease import LEAVES_WITHIN, acquire
    from bmfm_pipeline.training.sharing import BothLeases

    run = RunConfig.model_validate(spec.config)
    task, notes = settle_execution(run.task, find_accelerator())
    for text in notes:
        note(text)
    run = run.model_copy(update={"task": task})
    run_dir = Path(spec.run_dir)
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    lease = None
    if IS_FIRST:
        lease = acquire(run_dir, LEAVES_WITHIN, note, lambda: stop.reason is not None)
        if lease is None:
            return None
    sharing, summary, uploads = None, None, {}
    try:
        with disk_errors(run_dir):
            if spec.shared is not None:
                sharing = _share(spec, lease, run_dir, stop)
                if sharing is None and lease is not None:
                    return None
            summary = _train(spec, run, stop, BothLeases(lease, sharing) if sharing else lease, sharing)
    finally:
        _leave_group()
        if sharing is not None:
            uploads = sharing.finish(stop)
        if lease is not None:
            lease.release()
    return None if summary is None else summary | uploads


def _share(spec: TrainSpec, lease, run_dir: Path, stop: StopRequest):
    """Take the copy of the run on the remote workspace, and what it has that this machine has not.

    None in other than the first process, and when it was asked to stop meanwhile.
    """
    from bmfm_pipeline.storage import SharedRun
    from bmfm_pipeline.training.sharing import Sharing, wait_for_first

    sharing = Sharing(SharedRun(spec.shared["uri"]), run_dir) if lease is not None else None
    if sharing is not None and not sharing.begin(spec.shared["job"], stop):
        return None
    wait_for_first(run_dir, sharing is not None)
    return sharing


def _train(spec: TrainSpec, run, stop: StopRequest, lease, sharing=None) -> dict | None:
    import pytorch_lightning as pl
    import torch

    from bmfm_pipeline.models.compiling import compile_layers
    from bmfm_pipeline.models.gene2vec import describe_pretrained
    from bmfm_pipeline.models.host_memory import keep_freed_memory
    from bmfm_pipeline.training.adaptive import adaptive_masking
    from bmfm_pipeline.training.averaging import WeightAverage
    from bmfm_pipeline.training.batch_size import settle_batch_size
    from bmfm_pipeline.training.calibrating import calibrate
    from bmfm_pipeline.training.callbacks import History, Patience, Progress
    from bmfm_pipeline.training.checkpoints import newest_valid, read_place
    from bmfm_pipeline.training.data_module import build_data_module
    from bmfm_pipeline.training.export import export_model
    from bmfm_pipeline.training.keeping import Checkpointing, Position
    from bmfm_pipeline.training.memory import memory_taken
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
    resume = newest_valid(run_dir / "checkpoints", note)
    place = {} if resume is None else read_place(resume)
    batches = None
    if task.auto_batch_size:

        def stopped() -> bool:
            if lease is not None:
                lease.renew_if_old()
            return stop.reason is not None

        settled = settle_batch_size(
            run, spec.data, lambda trial: _hold(trial.model, run, spec.init_from), stopped, place.get("batches_found")
        )
        if settled is None:
            return None
        run, batches = settled
        task = run.task
    data = build_data_module(run, spec.data)
    data.setup("fit")
    if run.data_module.train_fraction is not None:
        note(data.prepared.training_sentence(run))
    module = build_module(run, data)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    dev_batches = len(data.val_dataloader()) if len(data.rows["dev"]) else 0
    options, notes = trainer_options(task, data.most_train_batches, dev_batches, world_size)
    options.update(data.trainer_options)
    notes += _execution_notes(task)
    for text in notes + describe_pretrained(module.model.config.fields):
        note(text)

    position = Position(data, options.get("limit_train_batches"), bool(task.overfit_batches))
    keeping = Checkpointing(
        run_dir / "checkpoints",
        position,
        lease,
        stop,
        task.checkpoints_every_n_train_steps,
        on_saved=sharing and sharing.take,
    )
    history = History(run_dir / "history.jsonl", task.log_every_n_steps, position)
    progress = Progress(spec.stage, STARTED, position, run.observed)
    keeping.batches_found = batches and batches.to_dict()
    if resume is None:
        _start_weights(module, spec, run_dir, run, data)
    else:
        keeping.restore(place, module)
        note(f"resuming from {resume.name} at step {place['step']}")
        _check_processes(place, world_size, options["strategy"])
    if IS_FIRST:
        history.cut(keeping.saved_step, keeping.validated_step)
    adapted = _hold(module.model, run, spec.init_from)
    if adapted is not None:
        note(adapted.sentence(module.model))
    watching = adaptive_masking(run, data, module, position)
    patience = [Patience(task.early_stopping_patience)] if task.early_stopping_patience else []
    if run.trainer.ema_decay and options["strategy"] == "fsdp":
        raise ConfigError(
            "trainer.ema_decay averages whole weights, which task.strategy fsdp shares out; use task.strategy=ddp"
        )
    average = [WeightAverage(module, run.trainer.ema_decay)] if run.trainer.ema_decay else []
    keep_freed_memory()
    compile_layers(module.model, task.compile, "cpu" if task.accelerator == "cpu" else "gpu", note)
    trainer = _trainer(options, [position, *average, *watching, *patience, history, progress, keeping], run_dir)
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
        trainer, module, data, keeping, [history, progress], *average
    ):
        return None
    if not IS_FIRST:
        return {}
    if options["strategy"] == "fsdp":  # the trained model is in parts
        module = build_module(run, data)
        _hold(module.model, run, spec.init_from)
    summary = export_model(run, spec, module, data, keeping, adapted)

    def go_on() -> bool:
        if lease is not None:
            lease.renew_if_old()
        return stop.reason is None

    if calibrate(run, data, run_dir / "model", go_on, note) is None:
        return None
    summary.update(
        trained_parameters=trained,
        steps=step,
        epochs=position.epochs,
        cells_per_s=round(progress.cells_per_s, 1),
        loader_wait_share=round(progress.loader_wait, 3),
        first_batch_after_s=round(progress.first_batch_after or 0.0, 2),
        **memory_taken(task.accelerator),
        accelerator=task.accelerator,
        devices=world_size,
        precision=task.precision,
        preset=run.preset_used,
        **({"skipped_steps": module.finite.skipped} if module.finite.skipped else {}),
        **(batches.summary() if batches else {}),
    )
    return summary


def _trainer(options: dict, callbacks: list, run_dir: Path):
    import pytorch_lightning as pl
    from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    from bmfm_pipeline.training.keeping import WholeFiles
    from bmfm_pipeline.training.sharding import sharding_strategy

    if options["strategy"] == "fsdp":
        options = {**options, "strategy": sharding_strategy(options["devices"])}
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


def _check_processes(place: dict, processes: int, strategy: str) -> None:
    """Say what differs where a training goes on in other processes than it was stopped in. Raises ConfigError."""
    if strategy == "fsdp" and not place.get("sharded"):
        raise ConfigError(
            "task.strategy fsdp: the checkpoint to resume from was written without sharding, and its optimiser state cannot be shared out; "
            "resume with task.strategy=ddp, or begin anew by deleting the run folder"
        )
    if (before := place.get("processes", processes)) != processes:
        note(
            f"resuming with {processes} processes what {before} began: a step is made of {processes} batches from here on, so that the "
            "losses are not those of a training that was not stopped"
        )


def _leave_group() -> None:
    """Processes that leave a group one by one abort it."""
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _sizes_of_checkpoint(run, init_from: str | None):
    """Where nobody wrote model sizes, fine-tuning takes those of the model it starts from."""
    from bmfm_pipeline.config.models import LINEAR_PATH, WHERE_WEIGHTS_START, read_model

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
    # Heads, and so the linear path beside them, are what is trained for, not what was trained before.
    start = {name: getattr(run.model, name) for name in (*WHERE_WEIGHTS_START, *LINEAR_PATH)}
    sizes = {name: stored[name] for name in kind.model_fields if name in stored and name not in start}
    return run.model_copy(update={"model": read_model({**sizes, **start})})


def _start_weights(module, spec: TrainSpec, run_dir: Path, run, data) -> None:
    from bmfm_pipeline.storage import write_json_atomic
    from bmfm_pipeline.training.gene_vectors import measure_linear_paths, start_from_singular_vectors

    settings = run.model
    if spec.init_from is None:
        note(f"{spec.stage}: training FROM SCRATCH (model.checkpoint is null)")
        if settings.gene_vectors == "svd":
            note(start_from_singular_vectors(module.model, data, run.seed.seed_value))
        measure_linear_paths(module.model, data)
        return
    from bmfm_pipeline.models import initialise_from

    named = settings.checkpoint if settings.checkpoint not in (None, "latest", "best", "last") else spec.init_from
    report = initialise_from(module.model, spec.init_from, settings.load or "strict", source=named)
    measure_linear_paths(module.model, data)
    if IS_FIRST:
        write_json_atomic(run_dir / "loading_report.json", report.to_dict())
    note(report.render())


def _hold(model, run, init_from: str | None):
    """Keep weights from training as the config says; returns what adapters were put in instead, None without any."""
    from bmfm_pipeline.training.adapters import adapt

    _freeze(model, run.task.freeze_layers)
    return adapt(model, run.trainer.lora_config, init_from, run.seed.seed_value)


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
