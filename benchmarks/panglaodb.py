"""Many files as one dataset: RData files replicated a thousand times, read as one source and as one store.

    python benchmarks/panglaodb.py --data ../shared/data/panglao --copies 1000

The files are converted once; the copies are entries of a list that name the same converted files, as hard links would. Prints one JSON line:
CPU seconds to open, rows a second, peak memory, the most files that were open at once. With --preprocess the whole stage over hard links too: CPU
seconds of each step in this process, and of all with those of --workers processes.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def convert_all(folder: Path, target: Path) -> dict[str, Path]:
    from bmfm_pipeline.data.sources.converting import convert
    from bmfm_pipeline.data.sources.formats import name_of_file

    made = {}
    for path in sorted((folder / "rdata").iterdir()):
        name = name_of_file(path.name)
        convert(path, target / f"{name}.h5ad")
        made[name] = target / f"{name}.h5ad"
    return made


def read_source(files: dict[str, Path]) -> dict:
    """Every row of all files, in order, with genes aligned: what a step of preprocessing reads."""
    from bmfm_pipeline.data.sources import open_several

    began, before = time.process_time(), peak_mb()
    source = open_several(files, cell_names="prefix")
    genes = source.n_genes
    opened = time.process_time() - began
    rows = values = most_open = 0
    for _, chunk in source.iter_chunks():
        rows, values = rows + chunk.shape[0], values + chunk.nnz
        if rows % 5000 == 0:
            most_open = max(most_open, open_files())
    seconds = time.process_time() - began
    return {
        "files": len(files),
        "rows": rows,
        "genes": genes,
        "values": values,
        "open_cpu_s": round(opened, 2),
        "cpu_s": round(seconds, 2),
        "rows_per_cpu_s": round(rows / seconds),
        "more_memory_mb": round(peak_mb() - before),
        "open_files": most_open,
    }


def read_store(files: dict[str, Path], batches: int, batch: int) -> dict:
    """Random rows of all files through one store, genes aligned: what training would read of files that are not joined on disk."""
    from bmfm_pipeline.data.stores.opening import open_store

    began, before = time.process_time(), peak_mb()
    store = open_store(list(files.values()), unique_names=True)
    opened = time.process_time() - began
    generator = np.random.default_rng(0)
    began, most_open = time.process_time(), 0
    for _ in range(batches):
        store.gather(generator.integers(0, store.n_cells, batch))
        most_open = max(most_open, open_files())
    seconds = time.process_time() - began
    return {
        "rows": batches * batch,
        "open_cpu_s": round(opened, 2),
        "rows_per_cpu_s": round(batches * batch / seconds),
        "more_memory_mb": round(peak_mb() - before),
        "open_files": most_open,
    }


def preprocess(files: dict[str, Path], folder: Path, workers: int) -> dict:
    """The preprocess stage with the transforms of the catalogue; the first step starts the tracking store."""
    from bmfm_pipeline.config import load_entry
    from bmfm_pipeline.stages.jobs import STEPS
    from bmfm_pipeline.stages.planning import plan_stage
    from bmfm_pipeline.stages.running import one_at_a_time, run_step

    linked = folder / "links"
    linked.mkdir()
    for name, path in files.items():
        os.link(path, linked / f"{name}.h5ad")
    config = folder / "many.yaml"
    plain = {
        "transforms": load_entry("panglaodb").transforms,
        "source_h5ad_file_name": str(linked),
        "num_workers": workers,
    }
    plain |= {"cell_names": "prefix", "input_values": "any", "split": {"method": "group", "group": "file"}}
    tree = {
        "defaults": ["pre_train_config", "_self_"],
        "label_columns": [],
        "data_module": {"transform_kwargs": plain},
    }
    config.write_text(json.dumps(tree, default=lambda step: step.model_dump()))
    began = cpu_seconds()
    job = plan_stage("preprocess", config_name="many", config_dir=str(folder), workspace=str(folder / "workspace"))[-1]
    found = {"files": len(files), "workers": workers, "plan_cpu_s": round(cpu_seconds() - began, 2)}
    clock, whole = time.monotonic(), cpu_seconds()
    with one_at_a_time(job):
        for step in STEPS["preprocess"]:
            began = cpu_seconds()
            run_step(job.write(), step)
            found[f"{step}_cpu_s"] = round(cpu_seconds() - began, 2)
    spent = round(cpu_seconds() - whole, 2)  # of the processes that worked on files too, which have ended now
    return found | {"cpu_s": spent, "wall_s": round(time.monotonic() - clock, 1), "peak_mb": round(peak_mb())}


def cpu_seconds() -> float:
    """Of this process and those that it started and that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("BMFM_DATA_DIR", "../shared/data")) / "panglao"
    )
    parser.add_argument("--copies", type=int, default=1000)
    parser.add_argument("--store", action="store_true", help="also read random rows through one store over all files")
    parser.add_argument("--preprocess", action="store_true", help="also run the preprocess stage over all files")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        made = convert_all(arguments.data, Path(folder))
        convert_s = time.process_time() - began
        files = {f"{name}-{copy}": path for copy in range(arguments.copies) for name, path in made.items()}
        found = {
            "benchmark": "panglaodb",
            "copies": arguments.copies,
            "convert_cpu_s_per_file": round(convert_s / len(made), 3),
        }
        if arguments.preprocess:  # first: peaks are those of the process
            found["preprocess"] = preprocess(files, Path(folder), arguments.workers)
        found["source"] = read_source(files)
        if arguments.store:
            found["store"] = read_store(files, arguments.batches, arguments.batch)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
