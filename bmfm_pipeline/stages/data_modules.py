"""The data module of a run for those who write their own training loop: it preprocesses by itself, like the stages do."""

from pathlib import Path

from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.stages.planning import plan_preprocess
from bmfm_pipeline.stages.running import run_stage
from bmfm_pipeline.storage import Workspace, load_artefact


def build_data_module(run: RunConfig, data: str | Path | None = None, workspace: str | None = None):
    """A LightningDataModule of batches for `run` (spec: input_ids (B, F, L), attention_mask (B, L), labels).

    Without `data`, the folder of a preprocess artefact, `prepare_data()` runs the preprocess stage in `workspace` (default
    $BMFM_WORKSPACE, else ./workspace), or finds its artefact there. Raises what the stage raises.
    """
    from bmfm_pipeline.training import CellDataModule

    def prepare() -> Path:
        place = Workspace(workspace)
        job = plan_preprocess(run, place)
        run_stage(job)
        return load_artefact(job.uri).local()

    return CellDataModule(run, data, prepare)
