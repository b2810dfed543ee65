"""The names by which configs call the steps."""

from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from bmfm_pipeline.data.transforms.binning import Bin
from bmfm_pipeline.data.transforms.gene_steps import (
    ChangeExpressionLevel,
    KeepExplanatoryAndTargetGenes,
    KeepVocabGenes,
    MedianNormalize,
    MoveExpressionsToLabels,
)
from bmfm_pipeline.data.transforms.renaming import RenameGenes
from bmfm_pipeline.data.transforms.standardising import StandardizeGeneNames
from bmfm_pipeline.data.transforms.steps import (
    FilterCells,
    FilterGenes,
    KeepGenes,
    Log,
    NormalizeTotal,
    QcMetrics,
    ScaleCounts,
    Step,
)
from bmfm_pipeline.data.transforms.tpm import TPMNormalization
from bmfm_pipeline.data.transforms.variable_genes import HighlyVariableGenes

STEPS: dict[str, type[Step]] = {
    "RenameGenesTransform": RenameGenes,
    "StandardizeGeneNamesTransform": StandardizeGeneNames,
    "KeepGenesTransform": KeepGenes,
    "KeepVocabGenesTransform": KeepVocabGenes,
    "KeepExplanatoryAndTargetGenesTransform": KeepExplanatoryAndTargetGenes,
    "FilterCellsTransform": FilterCells,
    "FilterGenesTransform": FilterGenes,
    "QcMetricsTransform": QcMetrics,
    "NormalizeTotalTransform": NormalizeTotal,
    "TPMNormalizationTransform": TPMNormalization,
    "MedianNormalizeTransform": MedianNormalize,
    "LogTransform": Log,
    "ScaleCountsTransform": ScaleCounts,
    "BinTransform": Bin,
    "HighlyVariableGenesTransform": HighlyVariableGenes,
    "ChangeExpressionLevelTransform": ChangeExpressionLevel,
    "MoveExpressionsToLabels": MoveExpressionsToLabels,
}


def list_transforms() -> list[dict[str, Any]]:
    """Every transform: `name`, `help` (one sentence), `needs_pass` (whether it may read the cells once more) and its `arguments`.

    An argument is {"name", "type", "default", "required"}; names and defaults are those of `transform_args` in a config.
    """
    return [
        {
            "name": name,
            "help": " ".join((step.__doc__ or "").split("\n\n")[0].split()),
            "needs_pass": bool(step.needs_pass),  # true for a property, too: it depends on the arguments
            "arguments": [
                {
                    "name": argument,
                    "type": _type_name(field.annotation),
                    "default": None if field.is_required() else field.get_default(call_default_factory=True),
                    "required": field.is_required(),
                }
                for argument, field in step.model_fields.items()
                if not argument.endswith("_")
            ],
        }
        for name, step in STEPS.items()
    ]


def _type_name(annotation: Any) -> str:
    """A type as a person writes it: `str | None`, `one of 'a', 'b'`, `list[str]`."""
    if annotation is Any:
        return "any"
    origin, members = get_origin(annotation), [_type_name(member) for member in get_args(annotation)]
    if origin is Literal:
        return "one of " + ", ".join(map(repr, get_args(annotation)))
    if origin in (list, dict):
        return f"{origin.__name__}[{', '.join(members)}]"
    if origin in (Union, UnionType):
        return " | ".join("None" if member == "NoneType" else member for member in members)
    return getattr(annotation, "__name__", str(annotation))
