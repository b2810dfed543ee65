"""Variable genes from a stream are those that scanpy finds with all cells in memory."""

import importlib.util

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from bmfm_pipeline.data.sources import h5ad, open_source
from bmfm_pipeline.data.transforms import Chain, build_chain
from bmfm_pipeline.errors import ConfigError, DataError


def step(name, **arguments):
    return {"transform_name": name, "transform_args": arguments}


@pytest.fixture(scope="module")
def cells():
    random = np.random.default_rng(0)
    levels = random.gamma(0.4, 2, 600) * random.gamma(3, 1 / 3, (400, 1)) * np.exp(random.normal(0, 0.4, (400, 600)))
    counts = sparse.csr_matrix(random.poisson(levels).astype(np.float32))
    obs = pd.DataFrame({"donor": random.choice(["d2", "d1", "d10"], 400)}, index=[f"c{index}" for index in range(400)])
    genes = [f"G{index}" for index in random.permutation(600)]
    return anndata.AnnData(counts, obs=obs.astype("category"), var=pd.DataFrame(index=genes))


@pytest.mark.parametrize("flavor", ["seurat", "cell_ranger"])
@pytest.mark.parametrize("batch_key", [None, "donor"])
@pytest.mark.parametrize("base", [None, 2])
def test_genes_are_those_of_scanpy(cells, tmp_path, monkeypatch, flavor, batch_key, base):
    import scanpy

    monkeypatch.setattr(h5ad, "VALUES_PER_CHUNK", 7000)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    expected = cells.copy()
    scanpy.pp.normalize_total(expected, target_sum=1e4)
    scanpy.pp.log1p(expected, base=base)
    before = [step("NormalizeTotalTransform", target_sum=1e4), step("LogTransform", base=base)]
    for wanted in (None, 100):
        scanpy.pp.highly_variable_genes(expected, n_top_genes=wanted, flavor=flavor, batch_key=batch_key)
        chosen = step("HighlyVariableGenesTransform", n_top_genes=wanted, flavor=flavor, batch_key=batch_key)
        found = build_chain([*before, chosen]).vocabulary_genes(open_source(tmp_path / "cells.h5ad"), None)
        assert found == expected.var_names[expected.var["highly_variable"]].tolist()
        assert len(found) >= (wanted or 5)


def test_only_the_cells_to_fit_on_count(cells, tmp_path):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    cells[:250].copy().write_h5ad(tmp_path / "part.h5ad")
    steps = [step("LogTransform"), step("HighlyVariableGenesTransform", n_top_genes=50, batch_key="donor")]
    chain = build_chain(steps)
    found = chain.vocabulary_genes(open_source(tmp_path / "cells.h5ad"), np.arange(250))
    assert found == build_chain(steps).vocabulary_genes(open_source(tmp_path / "part.h5ad"), None)
    assert Chain.from_json(chain.to_json()).gene_names(found) == found


@pytest.mark.skipif(importlib.util.find_spec("skmisc") is None, reason="scikit-misc is not installed")
@pytest.mark.parametrize("flavor", ["seurat_v3", "seurat_v3_paper"])
def test_counts_based_flavor_is_that_of_scanpy(cells, tmp_path, flavor):
    import scanpy

    cells.write_h5ad(tmp_path / "cells.h5ad")
    expected = cells.copy()
    scanpy.pp.highly_variable_genes(expected, n_top_genes=100, flavor=flavor, batch_key="donor")
    chain = build_chain([step("HighlyVariableGenesTransform", n_top_genes=100, flavor=flavor, batch_key="donor")])
    found = chain.vocabulary_genes(open_source(tmp_path / "cells.h5ad"), None)
    assert found == expected.var_names[expected.var["highly_variable"]].tolist()


@pytest.mark.skipif(importlib.util.find_spec("skmisc") is not None, reason="scikit-misc is installed")
def test_counts_based_flavor_says_what_to_install(make_h5ad):
    with pytest.raises(ConfigError, match="pip install scikit-misc"):
        build_chain([step("HighlyVariableGenesTransform", flavor="seurat_v3")]).look_at(open_source(make_h5ad()))


def test_wrong_settings_are_refused(make_h5ad):
    with pytest.raises(ConfigError, match=r"transforms\.1 .* needs raw counts; put it before LogTransform"):
        build_chain([step("LogTransform"), step("HighlyVariableGenesTransform", flavor="seurat_v3")])
    source = open_source(make_h5ad())
    with pytest.raises(DataError, match=r"batch_key: obs has no column 'donor' \(columns: celltype\)"):
        build_chain([step("HighlyVariableGenesTransform", batch_key="donor")]).look_at(source)
    with pytest.raises(DataError, match="none of the 25 genes is highly variable"):
        build_chain([step("HighlyVariableGenesTransform", min_disp=99)]).fit(source, None)
    with pytest.raises(DataError, match="percentiles of their mean, which coincide"):
        few = make_h5ad(sparse.csr_matrix(np.eye(25, dtype=np.float32)[:4]), name="few.h5ad")
        build_chain([step("HighlyVariableGenesTransform", flavor="cell_ranger")]).fit(open_source(few), None)
