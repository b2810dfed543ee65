"""Files that are no h5ad as an h5ad: read in parts, rows sorted, values as they are."""

from bmfm_pipeline.data.sources.converting.conversion import convert

__all__ = ["convert"]
