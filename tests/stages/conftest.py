"""A finished chain on real cells with a tiny model, made once for all tests of stages."""

import json
from pathlib import Path

import pytest

from bmfm_pipeline import cli

TINY = [
    "model.hidden_size=32",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    "model.intermediate_size=64",
    "data_module.max_length=128",
    "data_module.batch_size=32",
]


class Chain:
    """Where a finished chain lies: `artefacts` by stage, `workspace`, and the file it was made from."""

    def __init__(self, workspace, file):
        self.workspace, self.file, self.artefacts = str(workspace), file, {}

    def stage(self, stage: str, *words: str) -> dict:
        """Run one stage through the command line; returns its JSON."""
        import contextlib
        import io

        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            code = cli.main([stage, str(self.file), "label=celltype", *words, "--workspace", self.workspace, "--json"])
        assert code == 0
        found = json.loads(out.getvalue().splitlines()[-1])
        self.artefacts.update(found["artefacts"])
        return found


@pytest.fixture(scope="session")
def finished(tmp_path_factory, mini_h5ad) -> Chain:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("finished")
        patch.setenv("BMFM_WORKSPACE", str(folder / "workspace"))  # the command line sets it, and must not leak
        chain = Chain(folder / "workspace", mini_h5ad)
        chain.stage("pretrain", *TINY, "task.max_steps=8")
        chain.stage("finetune", *TINY, "task.max_steps=25", "trainer.learning_rate=0.003", "model.checkpoint=latest")
        chain.stage("evaluate", f"task.checkpoint={chain.artefacts['finetune']}")
    return chain


@pytest.fixture(scope="session")
def state(tmp_path_factory) -> Path:
    """A place where runs of several modules are tracked: making another takes longer than a run."""
    return tmp_path_factory.mktemp("state")
