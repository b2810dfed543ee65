"""Errors written for the person who meets them: what was found, where, what would be right, what to run."""


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


class Preempted(PipelineError):
    """Training was asked to stop, saved its state and can be resumed by running it again."""
