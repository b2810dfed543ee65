"""MLflow: one parent run a pipeline and a child per stage, batched writes, nothing lost when the store cannot be reached.

The only room that imports mlflow, and only when a run is written: importing this package is cheap.
"""

from bmfm_pipeline.tracking.locations import is_http, run_url, serving_command, tracking_uri
from bmfm_pipeline.tracking.redaction import redact, redact_text
from bmfm_pipeline.tracking.references import Reference, references_in_store
from bmfm_pipeline.tracking.revision import git_revision
from bmfm_pipeline.tracking.runs import EXPERIMENT, StageTracker
from bmfm_pipeline.tracking.spool import replay_spool

__all__ = [
    "EXPERIMENT",
    "Reference",
    "StageTracker",
    "git_revision",
    "is_http",
    "redact",
    "redact_text",
    "references_in_store",
    "replay_spool",
    "run_url",
    "serving_command",
    "tracking_uri",
]
