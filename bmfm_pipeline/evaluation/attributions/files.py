"""attributions.json: of every cell and label column the score of every gene, written cell by cell."""

import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from bmfm_pipeline.errors import DataError

DIGITS = 6


class AttributionsWriter:
    """Writes a list of {name, label_column_attributions: [{label_column_name, pred_label, label_attributions: [{label_name,
    attributions: [[gene, score], ...]}]}]}; memory does not grow with the cells. Use as a context manager."""

    def __init__(self, path: str | Path):
        self._path, self._first = Path(path), True

    def __enter__(self) -> "AttributionsWriter":
        self._stream = open(self._path, "w", encoding="utf-8")
        self._stream.write("[")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stream.write("\n]\n")
        self._stream.close()

    def add(self, name: str, columns: Iterable[dict[str, Any]]) -> None:
        """One cell; `columns` are its entries of label_column_attributions."""
        self._stream.write("\n" if self._first else ",\n")
        self._first = False
        json.dump({"name": name, "label_column_attributions": list(columns)}, self._stream, ensure_ascii=False)


def entry(genes: list[str], scores: Iterable[float], label_name: str | None) -> dict[str, Any]:
    """One entry of label_attributions, the largest scores first, whatever their sign."""
    pairs = sorted(zip(genes, scores, strict=True), key=lambda pair: -abs(pair[1]))
    rounded = [[gene, float(f"{score:.{DIGITS}g}")] for gene, score in pairs]
    return {"label_name": label_name, "attributions": rounded}


def read_attributions(path: str | Path) -> list[dict[str, Any]]:
    """The list that attributions.json holds. Raises DataError when the file is something else."""
    with open(path, encoding="utf-8") as stream:
        found = json.load(stream)
    if not isinstance(found, list) or any("label_column_attributions" not in cell for cell in found):
        raise DataError(f"{path}: is no list of attributions; name the attributions.json that `bmfm interpret` writes")
    return found


def scores_by_gene(cells: list[dict[str, Any]], label: str, class_name: str | None = None):
    """DataFrame of genes by cells: the scores of one class of a label column; nan where a cell does not show a gene.

    `class_name` None stands for the class that each cell is predicted as, and for the number of a column of numbers. A token that
    stands several times in a cell has the sum of its scores.
    """
    import pandas as pd

    columns = {}
    for cell in cells:
        for column in cell["label_column_attributions"]:
            if column["label_column_name"] != label:
                continue
            wanted = class_name if class_name is not None else column["pred_label"]
            for item in column["label_attributions"]:
                if item["label_name"] is None or item["label_name"] == wanted:
                    pairs = item["attributions"]
                    series = pd.Series([score for _, score in pairs], index=[gene for gene, _ in pairs], dtype=float)
                    columns[cell["name"]] = series.groupby(level=0).sum()
    return pd.DataFrame(columns)
