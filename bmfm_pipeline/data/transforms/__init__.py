"""The transform chain: steps described by name and arguments, checked before reading, run chunk by chunk."""

from bmfm_pipeline.data.transforms.chain import AppliedCells, Chain, TransformReport, build_chain
from bmfm_pipeline.data.transforms.registry import STEPS, list_transforms

__all__ = ["STEPS", "AppliedCells", "Chain", "TransformReport", "build_chain", "list_transforms"]
