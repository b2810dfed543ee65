"""The training process: `python -m bmfm_pipeline.training.child SPEC.json`. stdout carries JSON events, stdin is the parent's pipe."""

import json
import logging
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

STARTED = float(os.environ.get("BMFM_CHILD_STARTED") or time.time())


def main(spec_file: str) -> int:
    from bmfm_pipeline.errors import PipelineError
    from bmfm_pipeline.training.callbacks import StopRequest, emit
    from bmfm_pipeline.training.spec import EXIT_PREEMPTED, TrainSpec

    stop = StopRequest()
    stop.watch()
    stop.watch_parent()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    for name in ("pytorch_lightning", "lightning_fabric", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        summary = train(TrainSpec.from_file(spec_file), stop)
    except PipelineError as error:
        emit({"kind": "error", "error": type(error).__name__, "message": str(error)})
        return 2
    except MemoryError:
        emit({"kind": "error", "error": "TrainingError", "message": _out_of_memory()})
        return 2
    except Exception as error:
        if "out of memory" in str(error).lower():
            emit({"kind": "error", "error": "TrainingError", "message": _out_of_memory()})
            return 2
        traceback.print_exc()
        return 1
    if summary is None:
        emit({"kind": "preempted", "reason": stop.reason})
        return EXIT_PREEMPTED
    emit({"kind": "done", "summary": summary})
    return 0


def _out_of_memory() -> str:
    return (
        "out of memory; lower data_module.batch_size (and raise task.accumulate_grad_batches to keep the effective batch), "
        "data_module.max_length, or model.hidden_size / num_hidden_layers"
    )


def train(spec, stop) -> dict | None:
    """Train as `spec` says; returns the summary, or None when stopped early with a checkpoint to resume from."""
    import pytorch_lightning as pl
    import torch

    from bmfm_pipeline.config import RunConfig, find_accelerator, settle_execution
    from bmfm_pipeline.training.callbacks import Checkpointing, History, Progress, emit
    from bmfm_pipeline.training.checkpoints import newest_valid
    from bmfm_pipeline.training.data_module import build_data_module
    from bmfm_pipeline.training.export import export_model
    from bmfm_pipeline.training.lease import acquire
    from bmfm_pipeline.training.module import build_module

    run = RunConfig.model_validate(spec.config)
    task, notes = settle_execution(run.task, find_accelerator())
    for note in notes:
        emit({"kind": "note", "message": note})
    run_dir = Path(spec.run_dir)
    checkpoints = run_dir / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    is_first = int(os.environ.get("RANK", "0")) == 0
    lease = acquire(run_dir) if is_first else None
    try:
        pl.seed_everything(run.seed.seed_value, verbose=False)
        if task.tf32_mode:
            torch.set_float32_matmul_precision(task.tf32_mode)
        run = _sizes_of_checkpoint(run, spec.init_from)
        data = build_data_module(run, spec.data)
        data.setup("fit")
        module = build_module(run, data)
        resume = newest_valid(checkpoints, lambda text: emit({"kind": "note", "message": text}))
        if resume is None:
            _start_weights(module, spec, run_dir, emit)
        else:
            emit({"kind": "note", "message": f"resuming from {resume.name}"})
        _freeze(module.model, task.freeze_layers)
        _restore_position(resume, data)
        keeping = Checkpointing(checkpoints, task.checkpoints_every_n_train_steps)
        progress = Progress(spec.stage, lease, stop, STARTED)
        history = History(run_dir / "history.jsonl", task.log_every_n_steps)
        trainer = pl.Trainer(
            **_trainer_options(task, bool(len(data.rows["dev"]))),
            callbacks=[_EpochOfSampler(data), history, keeping, progress, *_early_stopping(task)],
            default_root_dir=str(run_dir),
        )
        emit({"kind": "start", "stage": spec.stage, "parameters": sum(p.numel() for p in module.model.parameters())})
        try:
            trainer.fit(module, datamodule=data, ckpt_path=resume)
        except (KeyboardInterrupt, SystemExit):
            if stop.reason is None:
                raise
        if progress.stopped:
            return None
        if not keeping.last.exists() or _validated_at(history.file) != trainer.global_step:
            _final_validation(trainer, module, data, history, keeping)
        summary = export_model(run, spec, module, data, keeping)
        summary.update(
            steps=int(trainer.global_step),
            epochs=int(trainer.current_epoch),
            cells_per_s=round(progress.cells_per_s, 1),
            loader_wait_share=round(progress.loader_wait, 3),
            first_batch_after_s=round(progress.first_batch_after or 0.0, 2),
            accelerator=task.accelerator,
            precision=task.precision,
            preset=run.preset_used,
        )
        return summary
    finally:
        if lease is not None:
            lease.release()


class _EpochOfSampler:
    """Tells the sampler which epoch begins."""

    def __new__(cls, data):
        import pytorch_lightning as pl

        class Callback(pl.Callback):
            def on_train_epoch_start(self, trainer, module) -> None:
                data.train_sampler.set_epoch(trainer.current_epoch)

        return Callback()


def _sizes_of_checkpoint(run, init_from: str | None):
    """Where nobody wrote model sizes, fine-tuning takes those of the model it starts from."""
    if init_from is None or not run.sizes_from_checkpoint:
        return run
    stored = json.loads((Path(init_from) / "config.json").read_text())
    sizes = {
        name: stored[name]
        for name in type(run.model).model_fields
        if name in stored and name not in ("checkpoint", "model_type")
    }
    return run.model_copy(update={"model": run.model.model_copy(update={**sizes, "model_type": stored["model_type"]})})


def _start_weights(module, spec, run_dir: Path, emit) -> None:
    from bmfm_pipeline.storage import write_json_atomic

    if spec.init_from is None:
        emit({"kind": "note", "message": f"{spec.stage}: training FROM SCRATCH (model.checkpoint is null)"})
        return
    from bmfm_pipeline.models import initialise_from

    report = initialise_from(module.model, spec.init_from)
    write_json_atomic(run_dir / "loading_report.json", report.to_dict())
    emit({"kind": "note", "message": report.render()})


def _freeze(model, freeze_layers: bool | str) -> None:
    """freeze_layers true freezes the encoder; a text is a regular expression over parameter names."""
    import re

    from bmfm_pipeline.errors import ConfigError

    if not freeze_layers:
        return
    pattern = re.compile(r"\.encoder\." if freeze_layers is True else freeze_layers)
    names = [name for name, _ in model.named_parameters() if pattern.search(name)]
    if not names:
        raise ConfigError(f"task.freeze_layers: no parameter matches {pattern.pattern!r}, nothing would be frozen")
    for name, parameter in model.named_parameters():
        if name in set(names):
            parameter.requires_grad = False


def _restore_position(resume: Path | None, data) -> None:
    """Let the sampler begin at the batch after the last one that was trained on."""
    if resume is None:
        return
    import torch

    place = torch.load(resume, map_location="cpu", weights_only=True)["bmfm"]
    epoch, batches = int(place["epoch"]), int(place["batches"])
    if batches >= len(data.train_sampler):
        epoch, batches = epoch + 1, 0
    data.train_sampler.load_state_dict({"epoch": epoch, "position": batches})


def _trainer_options(task, has_dev: bool) -> dict:
    devices = int(os.environ.get("WORLD_SIZE", "1"))
    options = dict(
        accelerator=task.accelerator,
        devices=devices
        if devices > 1
        else (1 if task.accelerator == "cpu" or task.devices == "auto" else task.devices),
        num_nodes=task.num_nodes,
        strategy="ddp" if devices > 1 and task.strategy == "auto" else task.strategy,
        precision=task.precision,
        max_epochs=task.max_epochs if task.max_epochs is not None else -1,
        min_epochs=task.min_epochs,
        max_steps=task.max_steps,
        min_steps=task.min_steps,
        max_time=task.max_time,
        accumulate_grad_batches=task.accumulate_grad_batches,
        gradient_clip_val=task.gradient_clip_val,
        gradient_clip_algorithm=task.gradient_clip_algorithm,
        limit_train_batches=task.limit_train_batches,
        limit_val_batches=task.limit_val_batches if has_dev else 0,
        num_sanity_val_steps=task.num_sanity_val_steps,
        check_val_every_n_epoch=task.check_val_every_n_epoch,
        val_check_interval=task.val_check_interval,
        deterministic=task.deterministic,
        detect_anomaly=task.detect_anomaly,
        overfit_batches=task.overfit_batches,
        fast_dev_run=task.fast_dev_run,
        sync_batchnorm=task.sync_batchnorm,
        log_every_n_steps=task.log_every_n_steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    return {name: value for name, value in options.items() if value is not None}


def _early_stopping(task) -> list:
    if task.early_stopping_patience is None:
        return []
    import pytorch_lightning as pl

    class Patience(pl.Callback):
        best, waited = float("inf"), 0

        def on_validation_end(self, trainer, module) -> None:
            score = module.validation.get("validation/loss", float("inf"))
            self.best, self.waited = (score, 0) if score < self.best else (self.best, self.waited + 1)
            if self.waited >= task.early_stopping_patience:
                trainer.should_stop = True

        def state_dict(self) -> dict:
            return {"best": self.best, "waited": self.waited}

        def load_state_dict(self, state: dict) -> None:
            self.best, self.waited = state["best"], state["waited"]

    return [Patience()]


def _validated_at(history: Path) -> int | None:
    """The step of the newest validation."""
    if not history.exists():
        return None
    steps = [entry["step"] for entry in map(json.loads, history.read_text().splitlines()) if "validation/loss" in entry]
    return steps[-1] if steps else None


def _final_validation(trainer, module, data, history, keeping) -> None:
    """A run that ends between validations is validated once more, so that its last state can be the best."""
    import torch

    loader = data.val_dataloader()
    module.validation = {}
    if len(data.rows["dev"]):
        module.eval()
        module.on_validation_epoch_start()
        with torch.inference_mode(), trainer.precision_plugin.forward_context():
            for index, batch in enumerate(loader):
                batch = module.on_before_batch_transfer(batch, 0)
                module.validation_step(trainer.strategy.batch_to_device(batch), index)
        module.on_validation_epoch_end()
        module.train()
        history.on_validation_end(trainer, module)
    keeping.keep(trainer, module)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
