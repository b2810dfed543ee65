"""The names by which configs call the steps."""

from bmfm_pipeline.data.transforms.binning import Bin
from bmfm_pipeline.data.transforms.gene_steps import (
    ChangeExpressionLevel,
    HighlyVariableGenes,
    KeepExplanatoryAndTargetGenes,
    KeepVocabGenes,
    MedianNormalize,
    MoveExpressionsToLabels,
)
from bmfm_pipeline.data.transforms.renaming import RenameGenes
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

STEPS: dict[str, type[Step]] = {
    "RenameGenesTransform": RenameGenes,
    "KeepGenesTransform": KeepGenes,
    "KeepVocabGenesTransform": KeepVocabGenes,
    "KeepExplanatoryAndTargetGenesTransform": KeepExplanatoryAndTargetGenes,
    "FilterCellsTransform": FilterCells,
    "FilterGenesTransform": FilterGenes,
    "QcMetricsTransform": QcMetrics,
    "NormalizeTotalTransform": NormalizeTotal,
    "MedianNormalizeTransform": MedianNormalize,
    "LogTransform": Log,
    "ScaleCountsTransform": ScaleCounts,
    "BinTransform": Bin,
    "HighlyVariableGenesTransform": HighlyVariableGenes,
    "ChangeExpressionLevelTransform": ChangeExpressionLevel,
    "MoveExpressionsToLabels": MoveExpressionsToLabels,
}
