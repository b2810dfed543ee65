"""Splits: every cell is train, dev or test before anything is fitted; seeded, hashed, stored, and used again by name."""

from bmfm_pipeline.data.splits.assignment import Split, assign_split, make_split
from bmfm_pipeline.data.splits.drawing import smallest_class
from bmfm_pipeline.data.splits.few_shot import part_of_each_class
from bmfm_pipeline.data.splits.records import (
    SPLITS,
    UNUSED,
    describe_split,
    read_split,
    read_split_info,
    split_column,
    split_sentence,
    write_split,
)

__all__ = [
    "SPLITS",
    "UNUSED",
    "Split",
    "assign_split",
    "describe_split",
    "make_split",
    "part_of_each_class",
    "read_split",
    "read_split_info",
    "smallest_class",
    "split_column",
    "split_sentence",
    "write_split",
]
