"""Validation after the last step of a training, so that its last state can be the best one."""

import contextlib

import torch


def validate_once(trainer, module, data, keeping, watchers, average=None) -> bool:
    """Validate the trained state (its `average`, where there is one), tell `watchers`, keep last and best.

    False when it was stopped, with a checkpoint to go on from.
    """
    limit = trainer.limit_val_batches
    batches = len(data.val_dataloader()) if len(data.rows["dev"]) else 0
    batches = min(limit, batches) if isinstance(limit, int) else int(limit * batches)
    module.validation = {}
    if batches:
        # Lightning has moved the model to the host when it ended.
        module.to(trainer.strategy.root_device).eval()
        with average.used() if average is not None else contextlib.nullcontext():
            finished = _validate(trainer, module, data, keeping, batches)
        if not finished:
            keeping.save(trainer, module, keeping.last, reason=keeping.stop.reason)
            keeping.tell_saved(trainer)
            return False
        for watcher in watchers:
            watcher.on_validation_end(trainer, module)
        module.train()
    keeping.keep(trainer, module)
    return True


def _validate(trainer, module, data, keeping, batches: int) -> bool:
    """Score the first `batches` of the dev cells; False when training was asked to stop."""
    module.on_validation_epoch_start()
    for index, batch in enumerate(data.val_dataloader()):
        if index >= batches:
            break
        if keeping.agreement.any(keeping.stop.reason is not None)[0]:
            return False
        if keeping.lease is not None:
            keeping.lease.renew_if_old()
        _validate_batch(trainer, module, batch, index)
    module.on_validation_epoch_end()
    return True


@torch.inference_mode()
def _validate_batch(trainer, module, batch, index: int) -> None:
    batch = module.on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), 0)
    with trainer.precision_plugin.forward_context():
        module.validation_step(trainer.strategy.batch_to_device(batch), index)
