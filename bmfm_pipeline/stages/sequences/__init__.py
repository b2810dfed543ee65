"""Preprocessing of nucleotide sequences: the same steps as for cells, on tables of sequences."""
