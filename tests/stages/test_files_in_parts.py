"""Several files read in groups, in this process, in others, or where a flow spreads them: what comes of them is the same."""

import functools
import json
import pickle
import shutil
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from bmfm_pipeline.data.sources import several
from bmfm_pipeline.data.sources.several import spans
from bmfm_pipeline.data.transforms import STEPS, build_chain
from bmfm_pipeline.data.transforms.steps import Step
from bmfm_pipeline.errors import DataError, StorageError
from bmfm_pipeline.stages import several_files
from bmfm_pipeline.stages.fanning import spread_by
from bmfm_pipeline.stages.parts import PARTS, _Exchange
from bmfm_pipeline.stages.planning import plan_stage
from bmfm_pipeline.stages.running import run_stage
from bmfm_pipeline.storage import read_json

KWARGS = "data_module.transform_kwargs"
GENES = [f"G{number}" for number in range(40)]
# Every step that must see the cells first, and what stands before it.
FITTED = {
    "genes": [{"transform_name": "FilterGenesTransform", "transform_args": {"min_cells": 40}}],
    "counts": [{"transform_name": "FilterGenesTransform", "transform_args": {"min_counts": 150}}],
    "totals": [
        {"transform_name": "ScaleCountsTransform", "transform_args": {"scale_factor": 1.5}},
        {"transform_name": "NormalizeTotalTransform", "transform_args": {"target_sum": None, "exclude_highly_expressed": True}},
    ],
    "quality": [{"transform_name": "QcMetricsTransform", "transform_args": {"total_counts_iqr_scale": 0.5}}],
    "variable": [
        {"transform_name": "NormalizeTotalTransform", "transform_args": {"target_sum": 100}},
        {"transform_name": "LogTransform", "transform_args": {}},
        {"transform_name": "HighlyVariableGenesTransform", "transform_args": {"n_top_genes": 12, "batch_key": "file"}},
    ],
    "variable counts": [
        {"transform_name": "HighlyVariableGenesTransform", "transform_args": {"n_top_genes": 12, "flavor": "seurat_v3", "span": 1.0}},
    ],
    "level": [{"transform_name": "ChangeExpressionLevelTransform", "transform_args": {"gene_perturbations": {"G3": "positive", "G4": "negative"}}}],
    "moved": [
        {"transform_name": "MoveExpressionsToLabels", "transform_args": {"regression_label_columns": ["G5"]}},
        {"transform_name": "FilterCellsTransform", "transform_args": {"min_counts": 80}},
    ],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_tracking_store(state, monkeypatch):
    """All runs of this module are tracked in one place, for making another takes longer than a run."""
    monkeypatch.setenv("BMFM_STATE", str(state))


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch):
    """A few cells or bytes are enough for a group of their own."""
    monkeypatch.setattr(several, "CELLS_PER_PIECE", 50)
    monkeypatch.setattr(several_files, "BYTES_PER_GROUP", 1)


@pytest.fixture
def studies(tmp_path) -> Path:
    """Seven files of 30 cells; genes in another order in each, some missing; one stored by column."""
    folder = tmp_path / "studies"
    folder.mkdir()
    for number in range(7):
        generator = np.random.default_rng(number)
        genes = [GENES[at] for at in generator.permutation(40)[: 40 if number % 2 else 34]]
        genes = list(dict.fromkeys([*genes, "G3", "G4", "G5"]))
        rates = 1.0 + np.array([int(name[1:]) % 7 for name in genes])
        counts = generator.poisson(rates * generator.gamma(2.0, 0.5, (30, 1))).astype(np.float32)
        counts[:, 0] += 1
        matrix = sparse.csc_matrix(counts) if number == 2 else sparse.csr_matrix(counts)
        obs = pd.DataFrame({"celltype": ["A", "B", "C"] * 10}, index=[f"{number}-{row}" for row in range(30)])
        anndata.AnnData(matrix, obs=obs, var=pd.DataFrame(index=pd.Index(genes, dtype=object))).write_h5ad(
            folder / f"s{number}.h5ad"
        )
    return folder


def chain(steps) -> str:
    """The steps as an override."""

    def plain(value) -> str:
        if isinstance(value, dict):
            return "{" + ",".join(f"{key}: {plain(entry)}" for key, entry in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ",".join(map(plain, value)) + "]"
        return value if isinstance(value, str) else json.dumps(value)

    return f"{KWARGS}.transforms={plain(steps)}"


def preprocess(folder, steps, *words, workspace=None) -> Path:
    (job,) = plan_stage(
        "preprocess", str(folder), label="celltype", overrides=[chain(steps), *words],
        workspace=None if workspace is None else str(workspace),
    )  # fmt: skip
    return Path(run_stage(job)["uri"])


def elsewhere(function, items, names):
    """As another process would do it, the last item first."""
    done = [_sent(function)(_sent(item)) for item in reversed(items)]
    return [_sent(value) for value in reversed(done)]


def _sent(value):
    return pickle.loads(pickle.dumps(value))


def test_groups_of_neighbours():
    assert spans([1] * 10, 4) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert spans([5, 1, 1, 1, 9, 1], 3) == [(0, 2), (2, 5), (5, 6)]
    assert (
        spans([1] * 10, 64, least=4) == [(0, 4), (4, 8), (8, 10)]
        and spans([], 3) == []
        and spans([0, 0], 2) == [(0, 1), (1, 2)]
    )


class Groups:
    """A Spread in this process, with everything pickled on its way when the work is done elsewhere."""

    def __init__(self, cells, folder, away):
        self.pieces, self.folder, self.away = cells.pieces(), folder, away

    def each(self, function, wanted):
        rows = [wanted[piece.first_row : piece.first_row + piece.n_cells] for piece in self.pieces]
        return self._map(function, list(zip(self.pieces, rows, strict=True)))

    def write(self, function):
        paths = [self.folder / f"{number}.rows" for number in range(len(self.pieces))]
        return list(zip(self._map(function, list(zip(self.pieces, paths, strict=True))), paths, strict=True))

    def _map(self, function, items):
        if not self.away:
            return [function(*item) for item in items]
        return elsewhere(functools.partial(_unpacked, function), items, [])


def _unpacked(function, item):
    return function(*item)


@pytest.mark.parametrize("steps", FITTED.values(), ids=FITTED)
def test_a_chain_makes_the_same_of_groups_wherever_they_are_read(studies, tmp_path, steps):
    if any(step["transform_args"].get("flavor") == "seurat_v3" for step in steps):
        pytest.importorskip("skmisc")
    files, made = {path.stem: path for path in sorted(studies.iterdir())}, []
    for away in (False, True):
        cells, made_by, out = several.open_several(files), build_chain(steps), tmp_path / f"{away}.h5ad"
        rows = np.flatnonzero(np.arange(cells.n_cells) % 3)
        report = made_by.run(cells, rows, out, {}, spread=Groups(cells, tmp_path, away))
        made.append((out.read_bytes(), made_by.to_json(), report.steps))
        assert report.steps[0].cells == 210 and report.steps[-1].cells > 0
    assert made[0] == made[1]
    # And what one pass over all cells makes, but for the last bits of sums.
    alone = build_chain(steps)
    alone.run(several.open_several(files), rows, tmp_path / "alone.h5ad", {})
    one, other = anndata.read_h5ad(tmp_path / "alone.h5ad"), anndata.read_h5ad(out)
    assert one.var_names.tolist() == other.var_names.tolist() and one.obs.equals(other.obs)
    np.testing.assert_allclose(one.X.toarray(), other.X.toarray(), rtol=1e-6)


def test_the_stage_makes_the_same_wherever_files_are_read(studies, tmp_path):
    here = preprocess(studies, FITTED["variable"], workspace=tmp_path / "here")
    names = []

    def spread(function, items, called):
        names.append(called)
        return elsewhere(function, items, called)

    with spread_by(spread):
        there = preprocess(studies, FITTED["variable"], workspace=tmp_path / "there")
    assert (there / "processed.h5ad").read_bytes() == (here / "processed.h5ad").read_bytes()
    assert (there / "transforms.json").read_bytes() == (here / "transforms.json").read_bytes()
    # The check goes file by file here, the passes in groups of at least 50 cells.
    assert [len(called) for called in names] == [7, 4, 4] and names[-1] == [
        "transform s0 and 1 more",
        "transform s2 and 1 more",
        "transform s4 and 1 more",
        "transform s6",
    ]
    assert not list((tmp_path / "there").rglob(PARTS))


def test_every_step_that_sees_cells_can_say_what_it_saw():
    for name, step in STEPS.items():
        if step.observe is not Step.observe or step.observe_rows is not Step.observe_rows:
            assert step.seen is not Step.seen and step.add is not Step.add, name


def test_processes_make_the_same_and_a_bad_file_is_set_aside(studies, tmp_path):
    (studies / "s9.h5ad").write_bytes(b"no h5ad")
    words = [f"{KWARGS}.max_share_of_files_set_aside=0.2"]
    here = preprocess(studies, FITTED["genes"], *words, workspace=tmp_path / "here")
    there = preprocess(studies, FITTED["genes"], *words, f"{KWARGS}.num_workers=2", workspace=tmp_path / "there")
    assert there.name == here.name  # the number of processes is no part of the key
    assert (there / "processed.h5ad").read_bytes() == (here / "processed.h5ad").read_bytes()
    reports = [read_json(folder / "report.json")["files"] for folder in (here, there)]
    assert [row["cells_kept"] for row in reports[0]["files"]] == [30] * 7
    assert [row["file"] for row in reports[1]["set_aside"]] == ["s9"] and reports[0]["files"] == reports[1]["files"]


def test_a_file_that_changes_under_way_is_found_by_the_process_that_reads_it(studies):
    def meddling(function, items, names):
        anndata.read_h5ad(studies / "s4.h5ad")[:20].copy().write_h5ad(studies / "s4.h5ad")
        return elsewhere(function, items, names)

    def spread(function, items, names):
        return meddling(function, items, names) if len(names) == 4 else elsewhere(function, items, names)

    with spread_by(spread), pytest.raises(DataError, match=r"s4\.h5ad: changed while it was being read"):
        preprocess(studies, FITTED["genes"])


class TestMachinesThatDoNotShareAFolder:
    def test_what_they_write_comes_through_a_remote_workspace(self, studies, s3, monkeypatch):
        from bmfm_pipeline.stages import parts

        expected = preprocess(studies, FITTED["variable"])
        seen = []

        def blind(function, items, names):
            """A machine that does not see the run folder, though it sees the files."""
            made = _Exchange.make

            def make(self, function, piece):
                hidden = self.folder.with_name("hidden")
                self.folder.rename(hidden)
                try:
                    found = made(self, function, piece)
                finally:
                    shutil.rmtree(self.folder, ignore_errors=True)
                    hidden.rename(self.folder)
                seen.append((piece[0], (self.folder / piece[0]).exists()))
                return found

            with monkeypatch.context() as patch:
                patch.setattr(parts._Exchange, "make", make)
                return elsewhere(function, items, names)

        with spread_by(blind):
            (job,) = plan_stage(
                "preprocess", str(studies), label="celltype", workspace=f"{s3.uri}/workspace",
                overrides=[chain(FITTED["variable"])],
            )  # fmt: skip
            run_stage(job)
        assert len(seen) == 7 + 4 and not any(here for _, here in seen)
        assert (Path(job.artefact().local()) / "processed.h5ad").read_bytes() == (
            expected / "processed.h5ad"
        ).read_bytes()
        assert not any(f"/{PARTS}/" in name for name in s3.keys())  # noqa: SIM118  a bucket is no dict

    def test_a_file_that_they_do_not_see_ends_the_run_and_is_not_set_aside(self, studies):
        hidden = studies.with_name("hidden")

        def blind(function, items, names):
            studies.rename(hidden)
            try:
                return elsewhere(function, items, names)
            finally:
                hidden.rename(studies)

        with (
            spread_by(blind),
            pytest.raises(StorageError, match=r"s6\.h5ad: .* not seen by the machine .* same names, or the files"),
        ):
            preprocess(studies, FITTED["genes"], f"{KWARGS}.max_share_of_files_set_aside=0.99")

    def test_a_local_workspace_that_they_do_not_see_is_named(self, tmp_path):
        exchange = _Exchange(tmp_path / "elsewhere", "token", None)
        with pytest.raises(
            StorageError, match="elsewhere is not seen by a machine of the cluster; put the workspace on"
        ):
            exchange.make(lambda item, path: None, ("000.rows", None))
