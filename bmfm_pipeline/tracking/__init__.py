"""MLflow: one parent run a pipeline and a child per stage, batched writes, nothing lost when the store cannot be reached.

The only room that imports mlflow, and only when a run is written: importing this package is cheap.
"""

from bmfm_pipeline.tracking.locations import (
    artifact_folder,
    database_file,
    is_http,
    run_url,
    serving_command,
    tracking_uri,
)
from bmfm_pipeline.tracking.redaction import redact, redact_text
from bmfm_pipeline.tracking.references import Reference, check_store, references_in_store
from bmfm_pipeline.tracking.registry import CHALLENGER, CHAMPION, PREVIOUS, ModelVersion, Registry, registered_name
from bmfm_pipeline.tracking.revision import git_revision
from bmfm_pipeline.tracking.runs import EXPERIMENT, StageTracker
from bmfm_pipeline.tracking.spool import replay_spool

__all__ = [
    "CHALLENGER",
    "CHAMPION",
    "EXPERIMENT",
    "PREVIOUS",
    "ModelVersion",
    "Reference",
    "Registry",
    "StageTracker",
    "artifact_folder",
    "check_store",
    "database_file",
    "git_revision",
    "is_http",
    "redact",
    "redact_text",
    "references_in_store",
    "registered_name",
    "replay_spool",
    "run_url",
    "serving_command",
    "tracking_uri",
]
