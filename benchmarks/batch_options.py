"""Speed of each option that reshapes cells: CPU microseconds a cell in batches of 20 cells and 512 tokens. Prints one JSON line.

python benchmarks/batch_options.py            # synthetic cells, about 525 expressed genes each, on one core
python benchmarks/batch_options.py zeros      # only options whose name holds a word
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from batches import SyntheticStore
from measuring import hardware

from bmfm_pipeline.batching import BatchBuilder, BatchingConfig, FieldSpec, GeneTables, ZeroExposure, genome_places

GENES, CELLS, BATCH = 20_000, 4_000, 20


def options() -> dict[str, dict]:
    """Name -> settings of the builder; `continuous`, `labels` and `tables` are not of the config."""
    generator = np.random.default_rng(1)
    places, chromosomes = genome_places([f"chr{i % 24}" for i in range(GENES)], generator.permutation(GENES))
    weights = GeneTables(dropout_weights=generator.random(GENES).astype(np.float32))
    medians = GeneTables(medians=np.full(GENES, 2, np.float32))
    depth = {"continuous": True, "depth_ids": (GENES + 5, GENES + 6)}
    whole = {"continuous": True, "log_normalize_transform": True}
    return {
        "plain": {},
        "sorted": {"sequence_order": "sorted"},
        "chromosomal": {
            "sequence_order": "chromosomal",
            "tables": GeneTables(places=places, chromosomes=chromosomes),
        },
        "log_normalize": whole,
        "median": {"continuous": True, "tables": medians},
        "sequence dropout 0.1": {"sequence_dropout_factor": 0.1},
        "sequence dropout block of 20": {"sequence_dropout_factor": 20},
        "selective dropout": {"selective_dropout": 0.2, "tables": weights},
        "all zeros": {"expose_zeros": True},
        "zeros batch_wise, half": {"expose_zeros": True, "zeros": ZeroExposure("batch_wise", 0.5)},
        "zeros random": {"expose_zeros": True, "zeros": ZeroExposure("random")},
        "read depth equal": {**depth, "rda_transform": "equal"},
        "read depth 2000": {**depth, "rda_transform": 2000},
        "read depth downsample": {**depth, "rda_transform": "downsample", "labels": True},
        "read depth poisson": {**depth, "rda_transform": "poisson_downsample", "labels": True},
        "whole cells, one set": {**whole, "wced_targets": ("non_input",)},
        "whole cells, three sets": {**whole, "wced_targets": ("input", "non_input", "all")},
        "prevent attention to masked": {"prevent_attention_to_masked": True},
    }


def make_builder(store, continuous=False, labels=False, tables=None, **settings) -> BatchBuilder:
    """Genes and expressions, expressions masked."""
    ids = np.arange(5, GENES + 5, dtype=np.int32)
    bins = None if continuous else np.arange(5, 15, dtype=np.int32)
    fields = [
        FieldSpec("genes", "genes", vocab_size=GENES + 7, column_ids=ids),
        FieldSpec("expressions", "values", not continuous, True, vocab_size=15, value_ids=bins),
    ]
    if labels:
        fields.append(FieldSpec("label_expressions", "values", tokenized=False, is_input=False))
    config = {"collation_strategy": "language_modeling", "sequence_order": "random", "padding": "longest", **settings}
    return BatchBuilder(store, fields, BatchingConfig(**config), tables=tables)


def cpu_us_per_cell(builder: BatchBuilder, batches: list[np.ndarray]) -> float:
    """The best of three rounds of at least half a second."""
    builder.build(batches[0])
    best, cells = np.inf, sum(map(len, batches))
    for _ in range(3):
        began, epochs = time.process_time(), 0
        while (spent := time.process_time() - began) < 0.5:
            for rows in batches:
                builder.build(rows, epochs)
            epochs += 1
        best = min(best, spent / (epochs * cells))
    return round(best * 1e6, 1)


def main() -> None:
    torch.set_num_threads(1)
    store = SyntheticStore(CELLS, GENES, 525)
    order = np.random.default_rng(0).permutation(CELLS)[: 20 * BATCH]
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    words = sys.argv[1:]
    found = {
        name: cpu_us_per_cell(make_builder(store, **settings), batches)
        for name, settings in options().items()
        if not words or any(word in name for word in words)
    }
    print(json.dumps({"benchmark": "batch_options", "cpu_us_per_cell": found, "batch": BATCH, "hardware": hardware()}))


if __name__ == "__main__":
    main()
