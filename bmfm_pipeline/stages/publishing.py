"""The last step of every stage: what it has made becomes an artefact."""

from typing import Any

from bmfm_pipeline.stages.costs import cost_of
from bmfm_pipeline.stages.jobs import Job
from bmfm_pipeline.storage import Artefact
from bmfm_pipeline.storage import publish as publish_artefact


def publish_staged(job: Job, summary: dict[str, Any]) -> Artefact:
    """Publish the staging folder of a job under its key, with what it was made from and what its steps have cost."""
    return publish_artefact(
        job.staging,
        job.place,
        job.stage,
        job.key,
        inputs=job.inputs,
        config=job.view,
        code_version=job.code,
        summary=summary,
        cost=cost_of(job),
    )
