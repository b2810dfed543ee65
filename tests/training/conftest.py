"""The demonstration cells, preprocessed once for all tests of training."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def prepared(mini_h5ad, tmp_path_factory) -> Path:
    """The folder of the preprocess artefact of the 700 real cells."""
    from bmfm_pipeline.stages import plan_stage, run_stage

    workspace = tmp_path_factory.mktemp("training-workspace")
    jobs = plan_stage("preprocess", str(mini_h5ad), label="celltype", workspace=str(workspace))
    return Path(run_stage(jobs[-1])["uri"])


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Models this small are trained faster by one thread than by several that wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # for the children
        yield
    torch.set_num_threads(before)


@pytest.fixture
def cases(prepared, tmp_path):
    """Tiny trainings on those cells."""
    from training_cases import Cases

    return Cases(prepared, tmp_path)
