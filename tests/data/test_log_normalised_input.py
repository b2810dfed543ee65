"""Input that is said to be log-normalised, or is and is not said to be."""

import anndata
import numpy as np
import pytest
from scipy import sparse

from bmfm_pipeline.data.sources import check_source, open_source
from bmfm_pipeline.errors import DataError

COUNTS = np.random.default_rng(0).poisson(2, (30, 12)).astype(np.float32)


@pytest.fixture
def opened(tmp_path):
    def of(values):
        file = tmp_path / "cells.h5ad"
        anndata.AnnData(sparse.csr_matrix(values)).write_h5ad(file)
        return open_source(file)

    return of


def test_logarithms_pass_as_what_they_are(opened):
    report = check_source(opened(np.log1p(COUNTS)), need_counts=False, log_normalised=True)
    assert report["cells"] == 30 and not report["whole_values"]


def test_logarithms_are_not_taken_for_counts(opened):
    with pytest.raises(DataError, match=r"look log-normalised, and counts are needed.*input_values=log_normalised"):
        check_source(opened(np.log1p(COUNTS)))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (COUNTS, "all values are whole numbers, as counts are"),
        (COUNTS * 1000.5, "more than a logarithm of normalised counts does"),
        (np.log1p(COUNTS) - 0.5, "values are negative"),
    ],
)
def test_what_is_no_logarithm_is_not_taken_for_one(opened, values, said):
    with pytest.raises(DataError, match=said):
        check_source(opened(values), need_counts=False, log_normalised=True)
