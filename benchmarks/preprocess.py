"""Time and memory of preprocessing: check, split, label dictionary, vocabulary and transform of one h5ad. Prints one JSON line.

python benchmarks/preprocess.py                                     # 68,579 synthetic cells x 20,000 genes, Zheng68K chain
python benchmarks/preprocess.py --cells 1000000 --umis 380          # a million cells of fewer genes
python benchmarks/preprocess.py --encoding csc --compression gzip
python benchmarks/preprocess.py --h5ad cells.h5ad --label celltype --chain generic

The work runs in a fresh process, and again in a second one; the second is reported, so that compiled kernels come from their
cache. Seconds and memory are beyond what importing the same modules takes. Neither Prefect nor MLflow takes part.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from measuring import hardware

# Shares of the eleven labels of Zheng68K.
LABELS = {
    "CD8+ Cytotoxic T": 0.303,
    "CD8+/CD45RA+ Naive Cytotoxic": 0.243,
    "CD56+ NK": 0.128,
    "CD4+/CD25 T Reg": 0.090,
    "CD19+ B": 0.086,
    "CD4+/CD45RO+ Memory": 0.045,
    "CD14+ Monocyte": 0.042,
    "Dendritic": 0.031,
    "CD4+/CD45RA+/CD25- Naive T": 0.027,
    "CD34+": 0.004,
    "CD4+ T Helper2": 0.001,
}
GENERIC = "[{transform_name: NormalizeTotalTransform, transform_args: {target_sum: 10000.0}}, {transform_name: LogTransform, transform_args: {base: 2}}, {transform_name: BinTransform, transform_args: {num_bins: 10, binning_method: int_cast}}, {transform_name: FilterCellsTransform, transform_args: {min_counts: 2}}, {transform_name: FilterGenesTransform, transform_args: {min_counts: 1}}]"
CELLS_PER_BLOCK = 4000


def draw_cells():
    """The compiled generator of a block of cells: molecules drawn from Zipf-like genes, counted per cell."""
    import numba

    @numba.njit(cache=True)
    def draw(seed, sizes, gene_of, tally, indices, data, indptr):
        np.random.seed(seed)
        touched = np.empty(len(tally), np.int32)
        position = 0
        for cell in range(len(sizes)):
            n = 0
            for _ in range(sizes[cell]):
                gene = gene_of[np.random.randint(0, len(gene_of))]
                if tally[gene] == 0:
                    touched[n] = gene
                    n += 1
                tally[gene] += 1
            ordered = np.sort(touched[:n])
            for k in range(n):
                indices[position] = ordered[k]
                data[position] = tally[ordered[k]]
                tally[ordered[k]] = 0
                position += 1
            indptr[cell + 1] = position

    return draw


def cell_blocks(n_cells: int, n_genes: int, umis: float, seed: int = 0):
    """Yield (indptr, indices, data) of blocks of cells: int64, int32 sorted, float32 whole counts."""
    random = np.random.default_rng(seed)
    weights = (np.arange(n_genes) + 25.0) ** -1.5
    weights = random.permutation(weights)
    gene_of = np.repeat(np.arange(n_genes), np.maximum(1, np.rint(weights / weights.sum() * (1 << 22)).astype(int)))
    gene_of, draw, tally = gene_of.astype(np.int32), draw_cells(), np.zeros(n_genes, np.int32)
    for start in range(0, n_cells, CELLS_PER_BLOCK):
        rows = min(CELLS_PER_BLOCK, n_cells - start)
        sizes = np.maximum(1, random.lognormal(np.log(umis), 0.2, rows)).astype(np.int64)
        indices, data = np.empty(sizes.sum(), np.int32), np.empty(sizes.sum(), np.float32)
        indptr = np.zeros(rows + 1, np.int64)
        draw(seed + start, sizes, gene_of, tally, indices, data, indptr)
        yield indptr, indices[: indptr[-1]], data[: indptr[-1]]


def write_h5ad(path: Path, n_cells: int, n_genes: int, umis: float, encoding: str, compression: str | None) -> int:
    """Write a synthetic h5ad block by block; returns its number of stored values."""
    import h5py
    import pandas as pd
    from anndata.io import write_elem

    genes = [f"MT-{index}" if index < 13 else f"GENE{index}" for index in range(n_genes)]
    labels = np.random.default_rng(1).choice(
        list(LABELS), n_cells, p=np.array([*LABELS.values()]) / sum(LABELS.values())
    )
    labels[: 3 * len(LABELS)] = list(LABELS) * 3
    obs = pd.DataFrame({"celltype": pd.Categorical(labels)}, index=[f"cell-{index}" for index in range(n_cells)])
    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        write_elem(file, "obs", obs)
        write_elem(file, "var", pd.DataFrame(index=genes))
        blocks = cell_blocks(n_cells, n_genes, umis)
        if encoding == "dense":
            return _write_dense(file, blocks, (n_cells, n_genes), compression)
        if encoding == "csc":  # column-major files are made in memory: choose the size to fit
            from scipy import sparse

            parts = [sparse.csr_matrix((d, i, p), shape=(len(p) - 1, n_genes)) for p, i, d in blocks]
            matrix = sparse.vstack(parts, format="csr").tocsc()
            write_elem(file, "X", matrix, dataset_kwargs={"compression": compression} if compression else {})
            return matrix.nnz
        return _write_csr(file, blocks, (n_cells, n_genes), compression)


def _write_csr(file, blocks, shape: tuple[int, int], compression: str | None) -> int:
    group = file.create_group("X")
    group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": np.array(shape)})
    spool = {name: tempfile.TemporaryFile(dir=Path(file.filename).parent) for name in ("data", "indices")}  # noqa: SIM115
    lengths = []
    for indptr, indices, data in blocks:
        spool["indices"].write(indices)
        spool["data"].write(data)
        lengths.append(np.diff(indptr))
    indptr = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
    group["indptr"] = indptr
    for name, dtype in (("data", np.float32), ("indices", np.int32)):
        target = group.create_dataset(
            name, (int(indptr[-1]),), dtype, compression=compression, chunks=True if compression else None
        )
        spool[name].seek(0)
        for start in range(0, int(indptr[-1]), 1 << 22):
            part = np.fromfile(spool[name], dtype, 1 << 22)
            target[start : start + len(part)] = part
    return int(indptr[-1])


def _write_dense(file, blocks, shape: tuple[int, int], compression: str | None) -> int:
    from scipy import sparse

    target = file.create_dataset("X", shape, np.float32, compression=compression, chunks=True if compression else None)
    target.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    start = stored = 0
    for indptr, indices, data in blocks:
        block = sparse.csr_matrix((data, indices, indptr), shape=(len(indptr) - 1, shape[1]))
        target[start : start + block.shape[0]] = block.toarray()
        start, stored = start + block.shape[0], stored + block.nnz
    return stored


def work(settings: dict) -> dict:
    """Every step of preprocessing but publishing, in this process; seconds and memory beyond imports."""
    began = time.perf_counter()
    import h5py  # noqa: F401
    import numba  # noqa: F401
    import pandas  # noqa: F401
    import scipy.sparse  # noqa: F401
    import sklearn.model_selection  # noqa: F401
    from anndata.io import read_elem, write_elem  # noqa: F401

    from bmfm_pipeline.stages import preprocess
    from bmfm_pipeline.stages.jobs import STEPS
    from bmfm_pipeline.stages.planning import compose_stage, plan_preprocess
    from bmfm_pipeline.stages.running import run_step
    from bmfm_pipeline.storage import Workspace

    preprocess.start_tracking = lambda job: None
    chain = {"zheng68k": _zheng_chain, "generic": lambda: GENERIC}[settings["chain"]]()
    run = compose_stage(
        "preprocess",
        settings["h5ad"],
        label=settings["label"],
        overrides=[f"++data_module.transform_kwargs.transforms={chain}"],
    )
    job = plan_preprocess(run, Workspace(settings["workspace"]))
    job_file = job.write()
    imports = time.perf_counter() - began
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the imports is forgotten
    memory = _memory_mb("VmRSS")
    seconds, peaks, before = {}, {}, _cpu()
    began = time.perf_counter()
    for step in STEPS["preprocess"][:-1]:
        start = _cpu()
        result = run_step(job_file, step)
        seconds[step] = round(_cpu() - start, 3)
        peaks[step] = _memory_mb("VmHWM") - memory
        Path("/proc/self/clear_refs").write_text("5")
    return {
        "cpu_s": round(_cpu() - before, 2),
        "wall_s": round(time.perf_counter() - began, 2),
        "cpu_s_of_step": seconds,
        "peak_mb_beyond_imports": max(peaks.values()),
        "peak_mb_of_step": peaks,
        "peak_mb": memory + max(peaks.values()),
        "imports_s": round(imports, 2),
        "processed_mb": os.path.getsize(result["uri"]) >> 20,
        "sha256": result["hash"],
        **{name: result["summary"][name] for name in ("cells", "genes")},
    }


def _zheng_chain() -> str:
    from bmfm_pipeline.config import load_entry

    return json.dumps([step.model_dump() for step in load_entry("zheng68k").transforms]).replace('"', "")


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _memory_mb(what: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) of this process; unlike ru_maxrss it begins anew with the program."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--h5ad", help="an h5ad file instead of synthetic cells")
    parser.add_argument("--label", default="celltype", help="obs column to stratify by")
    parser.add_argument("--chain", choices=["zheng68k", "generic"], default="zheng68k")
    parser.add_argument("--cells", type=int, default=68579)
    parser.add_argument("--genes", type=int, default=20000)
    parser.add_argument(
        "--umis", type=float, default=1300, help="median molecules per cell; 1300 gives about 525 genes"
    )
    parser.add_argument("--compression", choices=["gzip", "lzf"])
    parser.add_argument("--encoding", choices=["csr", "csc", "dense"], default="csr")
    parser.add_argument(
        "--folder", help="where the synthetic file and the workspace lie; a temporary folder unless set"
    )
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        print(json.dumps(work(json.loads(arguments.work))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = arguments.h5ad
        if path is None:
            name = f"{arguments.cells}x{arguments.genes}-{arguments.encoding}-{arguments.compression}.h5ad"
            path = str(Path(arguments.folder or folder) / name)
            if not Path(path).exists():
                shape = arguments.cells, arguments.genes, arguments.umis
                write_h5ad(Path(path), *shape, arguments.encoding, arguments.compression)
        for attempt in ("first", "second"):
            settings = {
                "h5ad": path, "label": arguments.label, "chain": arguments.chain, "workspace": f"{folder}/{attempt}"
            }  # fmt: skip
            command = [sys.executable, __file__, "--work", json.dumps(settings)]
            done = subprocess.run(command, text=True, stdout=subprocess.PIPE, check=True)
        print(
            json.dumps(
                {
                    "benchmark": "preprocess",
                    **json.loads(done.stdout.splitlines()[-1]),
                    "input": Path(path).name,
                    "input_mb": os.path.getsize(path) >> 20,
                    "chain": arguments.chain,
                    "hardware": hardware(),
                }
            )
        )


if __name__ == "__main__":
    main()
