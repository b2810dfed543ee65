"""Stages that can be killed anywhere, and what they make where nothing goes wrong."""

import pytest
from running_stages import Stages


@pytest.fixture(scope="session")
def stages(tmp_path_factory, mini_h5ad):
    """Stages on 260 of the demonstration cells."""
    import anndata

    folder = tmp_path_factory.mktemp("stages")
    anndata.read_h5ad(mini_h5ad)[:260].copy().write_h5ad(folder / "cells.h5ad")
    made = Stages(folder, folder / "cells.h5ad")
    yield made
    made.process.kill()
    made.process.communicate()


@pytest.fixture(scope="session")
def undisturbed(stages, tmp_path_factory) -> dict:
    """What the stage makes where nothing goes wrong."""
    return stages.run(tmp_path_factory.mktemp("undisturbed") / "w").made
