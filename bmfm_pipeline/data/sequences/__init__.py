"""Sequences of nucleotides as data: read from tables, cleaned, compared across splits, kept beside their labels."""

from bmfm_pipeline.data.sequences.leakage import find_leakage
from bmfm_pipeline.data.sequences.letters import Cleaned, clean, reverse_complement
from bmfm_pipeline.data.sequences.tables import SequenceSource, open_sequences
from bmfm_pipeline.data.sequences.writing import SequenceWriter

__all__ = [
    "Cleaned",
    "SequenceSource",
    "SequenceWriter",
    "clean",
    "find_leakage",
    "open_sequences",
    "reverse_complement",
]
