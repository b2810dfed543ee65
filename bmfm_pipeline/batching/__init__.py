"""The hot path: rows of a cell store -> one model batch. Needs torch, numpy and numba only."""

from importlib import import_module

_EXPORTS = {
    "BatchBuilder": "bmfm_pipeline.batching.builder",
    "BatchReport": "bmfm_pipeline.batching.report",
    "BatchingConfig": "bmfm_pipeline.batching.settings",
    "CellDataset": "bmfm_pipeline.batching.loading",
    "EpochBatchSampler": "bmfm_pipeline.batching.loading",
    "SequenceBuilder": "bmfm_pipeline.batching.sequences",
    "FieldSpec": "bmfm_pipeline.batching.settings",
    "GeneTables": "bmfm_pipeline.batching.tables",
    "ZeroExposure": "bmfm_pipeline.batching.settings",
    "balancing_weights": "bmfm_pipeline.batching.loading",
    "choose_rows": "bmfm_pipeline.batching.loading",
    "gene_mask_weights": "bmfm_pipeline.batching.tables",
    "genome_places": "bmfm_pipeline.batching.tables",
    "make_loader": "bmfm_pipeline.batching.loading",
    "read_gene_list": "bmfm_pipeline.batching.tables",
    "read_gene_numbers": "bmfm_pipeline.batching.tables",
    "read_gene_positions": "bmfm_pipeline.batching.tables",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'bmfm_pipeline.batching' has no attribute {name!r}")
