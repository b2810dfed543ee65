"""What the words of the command line do, one function a command: each takes the parsed arguments and returns a plain value.

Functions are found by name and imported when first used, so that `bmfm --help` loads none of them.
"""

from importlib import import_module

_COMMANDS = {
    "benchmark": "bmfm_pipeline.commands.benchmarking",
    "compare": "bmfm_pipeline.commands.comparing",
    "data": "bmfm_pipeline.commands.inspecting",
    "datasets": "bmfm_pipeline.commands.datasets",
    "deploy": "bmfm_pipeline.commands.deploying",
    "doctor": "bmfm_pipeline.commands.information",
    "evaluate": "bmfm_pipeline.commands.one_stage",
    "export": "bmfm_pipeline.commands.exporting",
    "genes": "bmfm_pipeline.commands.genes",
    "finetune": "bmfm_pipeline.commands.one_stage",
    "interpret": "bmfm_pipeline.commands.one_stage",
    "plan": "bmfm_pipeline.commands.whole_chain",
    "predict": "bmfm_pipeline.commands.prediction",
    "preprocess": "bmfm_pipeline.commands.one_stage",
    "pretrain": "bmfm_pipeline.commands.one_stage",
    "promote": "bmfm_pipeline.commands.reevaluating",
    "reevaluate": "bmfm_pipeline.commands.reevaluating",
    "run": "bmfm_pipeline.commands.whole_chain",
    "seed": "bmfm_pipeline.commands.one_stage",
    "ui": "bmfm_pipeline.commands.interfaces",
    "workspace": "bmfm_pipeline.commands.workspace",
}


def find(name: str):
    """The function that carries out command `name`."""
    return getattr(import_module(_COMMANDS[name]), name)
