"""Prediction for new cells: open a model, compute what it makes of each cell, keep it on disk, write it as tables or into an h5ad."""

from bmfm_pipeline.stages.predicting.predictor import Predictor

__all__ = ["Predictor"]
