"""From settings and gene tables to the recipe that `arranging.arrange_cells` follows."""

import numpy as np

from bmfm_pipeline.batching import arranging
from bmfm_pipeline.batching.arranging import Recipe
from bmfm_pipeline.batching.settings import BatchingConfig
from bmfm_pipeline.batching.tables import GeneTables
from bmfm_pipeline.errors import ConfigError, DataError

_ORDERS = {
    None: arranging.AS_STORED,
    "random": arranging.SHUFFLED,
    "sorted": arranging.SORTED,
    "chromosomal": arranging.CHROMOSOMAL,
}
_ZEROS = {"batch_wise": arranging.ZEROS_OF_BATCH, "random": arranging.ZEROS_AT_RANDOM}
_DEPTHS = {
    "downsample": arranging.DEPTH_DOWNSAMPLE,
    "poisson_downsample": arranging.DEPTH_POISSON,
    "equal": arranging.DEPTH_EQUAL,
}


def usable_columns(column_ids: np.ndarray, config: BatchingConfig, tables: GeneTables) -> np.ndarray:
    """Which gene columns may enter a batch, uint8 (genes,): those with a token (unless limit_genes is None), allowed, with a median."""
    usable = column_ids > 0 if config.limit_genes else np.ones(len(column_ids), dtype=bool)
    if tables.allowed is not None:
        usable = usable & tables.allowed
    if tables.medians is not None:
        usable = usable & (tables.medians > 0)
    return usable.astype(np.uint8)


def staying(weights: np.ndarray | None, usable: np.ndarray, share: float) -> np.ndarray:
    """The probability of each gene to stay in selective dropout, float64 (genes,); equal for all without weights."""
    relative = np.ones(len(usable)) if weights is None else np.asarray(weights, dtype=np.float64)
    mean = relative[usable > 0].mean() if usable.any() else 1.0
    if mean <= 0:
        raise DataError("dropout weights are 0 for every gene that may enter a batch")
    relative = relative / mean
    return 1.0 - share * relative / (1.0 + share * (relative - 1.0))


def make_recipe(
    config: BatchingConfig, tables: GeneTables, usable: np.ndarray, training: bool, always: bool = False
) -> Recipe | None:
    """The recipe of `config`; None where plain picking does (unless `always`).

    Dropout belongs to training alone. Cells are reduced to fewer reads in training, and in evaluation where masked values are predicted.
    Raises ConfigError for a chromosomal order without positions.
    """
    if config.sequence_order == "chromosomal" and tables.places is None:
        raise ConfigError("sequence_order chromosomal needs gene_positions, a table of gene, chromosome and start")
    drop = (config.sequence_dropout_factor or 0) if training else 0
    block = drop if isinstance(drop, int) else 0
    keep = np.zeros(0)
    if training and config.selective_dropout > 0:
        keep = staying(tables.dropout_weights, usable, config.selective_dropout)
    reshapes = (
        drop or len(keep) or config.expose_zeros or tables.medians is not None or config.rda_transform is not None,
        config.sequence_order == "chromosomal",
        always,
    )
    if not any(reshapes):
        return None
    clip = max((config.max_mfi_data_len or 0) - config.lead, 0) if config.max_mfi_data_len else 0
    sampled = 0
    if config.sequence_order == "chromosomal":
        room = config.max_length - len(config.prefix_ids) - 1 - config.lead
        sampled = min(clip, room) if clip and config.truncation else clip or room
    zeros = arranging.ZEROS_HIDDEN
    if config.expose_zeros:
        zeros = arranging.ZEROS_IN_ORDER if config.zeros is None else _ZEROS[config.zeros.strategy]
    cycle = config.zeros.cycle if config.zeros is not None and config.zeros.strategy == "batch_wise" else (0, 0)
    depth = config.rda_transform
    if depth is None:
        mode = arranging.DEPTH_OFF
    else:
        mode = _DEPTHS[depth] if isinstance(depth, str) else arranging.DEPTH_TARGET
    none = np.zeros(0, np.int32)
    return Recipe(
        usable=usable,
        medians=np.zeros(0, np.float32) if tables.medians is None else np.asarray(tables.medians, np.float32),
        keep=keep,
        drop_share=0.0 if block else float(drop),
        drop_block=int(block),
        order=_ORDERS[config.sequence_order],
        places=none if tables.places is None else np.asarray(tables.places, np.int32),
        chromosomes=none if tables.chromosomes is None else np.asarray(tables.chromosomes, np.int32),
        sampled=sampled,
        clip=clip,
        zeros=zeros,
        pool=np.flatnonzero(usable).astype(np.int32) if zeros else none,
        cycle_own=cycle[0],
        cycle_zeros=cycle[1],
        expressed_only=float(config.zeros.expressed_sample_ratio) if config.zeros else 0.0,
        normalise=config.log_normalize_transform,
        target_sum=float(config.log_normalize_sum),
        depth=mode,
        thin=training or config.masks,
        target=float(depth) if mode == arranging.DEPTH_TARGET else 0.0,
    )
