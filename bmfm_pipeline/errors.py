"""Errors written for the person who meets them: what was found, where, what would be right, what to run."""

import difflib
import re
from collections.abc import Iterable


class PipelineError(Exception):
    """Anything a user can mend; the command line prints its message without a traceback."""


class ConfigError(PipelineError):
    """A configuration that cannot be run: unknown key, contradiction, missing value."""


class DataError(PipelineError):
    """Input data that cannot be used as asked."""


class StorageError(PipelineError):
    """A path, bucket or disk that cannot be read or written."""


class CheckpointError(PipelineError):
    """Weights that do not fit the model they are loaded into, or cannot be read safely."""


class TrainingError(PipelineError):
    """Training that stopped and will not succeed by trying again."""


class ResourceError(PipelineError):
    """Memory, or another part of the machine, that does not suffice for what was asked."""


class Preempted(PipelineError):
    """Training was asked to stop, saved its state and can be resumed by running it again."""


def closest(found: object, known: Iterable[str], likeness: float = 0.6) -> str | None:
    """The one of `known` that `found` is probably a misspelling of; None when none has this `likeness`, 0 to 1."""
    return next(iter(difflib.get_close_matches(str(found), list(known), 1, likeness)), None)


def did_you_mean(found: object, known: Iterable[str], otherwise: str = "", before: str = "") -> str:
    """The hint in a message on a name that is not known: `before` and the nearest of `known`; `otherwise` when none is near."""
    close = closest(found, known)
    return f"{before}did you mean '{close}'?" if close else otherwise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the host or on an accelerator, whose libraries say so in words only."""
    text = str(error).lower()
    words = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(word in text for word in words)


def out_of_memory_message(error: BaseException | None = None) -> str:
    """What was asked for in vain, and the settings of a training that take less memory."""
    found = re.search(r"[Tt]ried to allocate ([\d.]+ ?\w+)", str(error))
    return (
        f"out of memory{f' (tried to allocate {found[1]})' if found else ''}; set task.auto_batch_size=true, which finds batches that "
        "fit and keeps the effective batch (by hand: lower data_module.batch_size and raise task.accumulate_grad_batches as much), or "
        "model.gradient_checkpointing=true, or lower data_module.max_length, model.hidden_size or model.num_hidden_layers"
    )
