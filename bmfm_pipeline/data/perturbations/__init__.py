"""Perturbed cells: names in several spellings, splits by perturbation, mean profiles and the genes that change."""

from importlib import import_module

_EXPORTS = {
    "COLUMN": "names",
    "CONTROL": "names",
    "MODEL_RECORD": "records",
    "Perturbations": "names",
    "Profiles": "records",
    "group_moments": "means",
    "looks_like_control": "names",
    "ranked_genes": "means",
    "read_de_genes": "records",
    "read_perturbations": "names",
    "read_profiles": "records",
    "read_record": "records",
    "split_by_perturbation": "splitting",
    "welch_scores": "means",
    "write_perturbations": "records",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
