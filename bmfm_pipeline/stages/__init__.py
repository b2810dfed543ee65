"""What everything else calls: plan stages, run them whole or step by step. Light to import; steps load what they need."""

from bmfm_pipeline.stages.data_modules import build_data_module
from bmfm_pipeline.stages.jobs import STAGES, STEPS, Job
from bmfm_pipeline.stages.planning import plan_pipeline, plan_stage
from bmfm_pipeline.stages.running import run_stage, run_step
from bmfm_pipeline.stages.study_plan import plan_study
from bmfm_pipeline.stages.study_running import run_study

__all__ = [
    "STAGES",
    "STEPS",
    "Job",
    "build_data_module",
    "plan_pipeline",
    "plan_stage",
    "plan_study",
    "run_stage",
    "run_step",
    "run_study",
]
