"""Which genes a prediction comes from: integrated gradients, what they say of a class, and checks of both."""

from bmfm_pipeline.evaluation.attributions.files import read_attributions, scores_by_gene

__all__ = ["read_attributions", "scores_by_gene"]
