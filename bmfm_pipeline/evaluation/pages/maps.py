"""Pictures of many cells: the map of embeddings, and the confusion of many classes as shades."""

import math
from typing import Any

from bmfm_pipeline.evaluation.pages.drawing import Drawing
from bmfm_pipeline.evaluation.pages.numbers import observed, percent
from bmfm_pipeline.evaluation.pages.palette import CATEGORIES

SIDE, BORDER = 340, 8
APART = 13  # of numbers on a map
# The commonest classes have a colour and a number of their own; the rest are one grey group.
COLOURED = len(CATEGORIES)
CONFIDENCES = (  # the surest last; unsure cells are larger, so that they are seen without their colour
    (0.5, "c4", 5.5, "below 0.5"),
    (0.7, "c1", 4.5, "0.5 to 0.7"),
    (0.9, "c6", 3.5, "0.7 to 0.9"),
    (0.99, "c2", 2.6, "0.9 to 0.99"),
    (math.inf, "c0", 2, "0.99 and more"),
)
SHADES = 5


def embedding_maps(found: dict[str, Any], target: str) -> list[dict[str, Any]]:
    """Of one label the map of cells by truth, by prediction and by confidence: [{"drawing", "legend", "what"}].

    `found` is embedding_map.json. A legend has rows of {number, name, colour, cells}.
    """
    xs, ys = _on_sheet(found["x"], found["y"])
    places = list(zip(xs, ys, strict=True))
    truth = (found.get("truth") or {}).get(target)
    predicted = (found.get("predicted") or {}).get(target)
    confidence = (found.get("confidence") or {}).get(target)
    maps = []
    if (truth and _are_classes(truth)) or (predicted and _are_classes(predicted)):
        order = _commonest([*(truth or []), *(predicted or [])])
        for what, values in (("truth", truth), ("prediction", predicted)):
            if values:
                maps.append(_class_map(target, what, places, values, order, found.get("method", "map")))
    if confidence and any(value is not None for value in confidence):
        maps.append(_confidence_map(target, places, confidence, found.get("method", "map")))
    return maps


def _are_classes(values: list) -> bool:
    return any(isinstance(value, str) for value in values)


def _on_sheet(xs: list[float], ys: list[float]) -> tuple[list[float], list[float]]:
    """Both axes stretched to the sheet alike: distances keep their proportions."""
    span = max(max(xs) - min(xs), max(ys) - min(ys)) or 1
    scale = (SIDE - 2 * BORDER) / span
    middle_x, middle_y = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    return [SIDE / 2 + scale * (x - middle_x) for x in xs], [SIDE / 2 - scale * (y - middle_y) for y in ys]


def _commonest(values: list) -> list[str]:
    counts: dict[str, int] = {}
    for value in values:
        if value is not None:
            counts[value] = counts.get(value, 0) + 1
    return sorted(counts, key=lambda name: (-counts[name], name))


def _class_map(target: str, what: str, places, values: list, order: list[str], method: str) -> dict[str, Any]:
    own = {name: [place for place, value in zip(places, values, strict=True) if value == name] for name in order}
    shown = order[:COLOURED]
    rest = [place for name in order[COLOURED:] for place in own[name]]
    unknown = [place for place, value in zip(places, values, strict=True) if value is None]
    legend = [
        {"number": str(index + 1), "name": name, "colour": CATEGORIES[index], "cells": len(own[name])}
        for index, name in enumerate(shown)
        if own[name]
    ]
    if rest:
        legend.append(
            {
                "number": "",
                "name": f"{len(order) - COLOURED} more classes",
                "colour": "other",
                "cells": len(rest),
            }
        )
    if unknown:
        legend.append({"number": "", "name": "no label", "colour": "other", "cells": len(unknown)})
    said = ", ".join(f"{row['name']} {row['cells']}" for row in legend)
    drawing = Drawing(
        SIDE, SIDE, f"{method} by {what} of {target}", f"{len(places)} {observed()} by {what} of {target}: {said}"
    )
    drawing.dots([*rest, *unknown], "other", size=2.5)
    for index, name in enumerate(shown):
        drawing.dots(own[name], CATEGORIES[index], size=3, square=index % 2 == 1)
    taken: list[tuple[float, float]] = []
    for row in legend:
        if row["number"]:
            x, y = _free(_middle(own[row["name"]]), taken)
            drawing.text(x, y + 4, row["number"], colour="ink", anchor="middle", size=13, bold=True, halo=True)
    return {"drawing": drawing, "legend": legend, "what": what}


def _middle(places: list[tuple[float, float]]) -> tuple[float, float]:
    """The cell nearest to the medians: a place where the class really is."""
    xs, ys = sorted(x for x, _ in places), sorted(y for _, y in places)
    x, y = xs[len(xs) // 2], ys[len(ys) // 2]
    return min(places, key=lambda place: (place[0] - x) ** 2 + (place[1] - y) ** 2)


def _free(place: tuple[float, float], taken: list[tuple[float, float]]) -> tuple[float, float]:
    """The nearest place below or above `place` where a number covers none of those that are there; it is added to them."""
    x, y = place
    steps = (sign * APART * count for count in range(COLOURED + 1) for sign in (1, -1))
    tries = ((x, y + step) for step in steps if BORDER <= y + step <= SIDE - BORDER)
    clear = (
        spot for spot in tries if all(abs(spot[0] - a) >= 1.4 * APART or abs(spot[1] - b) >= APART for a, b in taken)
    )
    taken.append(next(clear, place))
    return taken[-1]


def _confidence_map(target: str, places, confidence: list, method: str) -> dict[str, Any]:
    groups: list[list[tuple[float, float]]] = [[] for _ in CONFIDENCES]
    for place, value in zip(places, confidence, strict=True):
        if value is not None:
            groups[next(index for index, (below, *_) in enumerate(CONFIDENCES) if value < below)].append(place)
    legend = [
        {"number": "", "name": name, "colour": colour, "cells": len(group), "size": size}
        for group, (_, colour, size, name) in zip(groups, CONFIDENCES, strict=True)
        if group
    ]
    said = ", ".join(f"{row['name']} {row['cells']}" for row in legend)
    drawing = Drawing(
        SIDE,
        SIDE,
        f"{method} by confidence of {target}",
        f"{len(places)} {observed()} by confidence in {target}: {said}",
    )
    for group, (_, colour, size, _) in reversed(list(zip(groups, CONFIDENCES, strict=True))):
        drawing.dots(group, colour, size=size)
    return {"drawing": drawing, "legend": legend, "what": "confidence"}


def shaded_confusion(target: str, classes: list[str], counts: list[list[int]]) -> Drawing:
    """Rows true, columns predicted, each row shaded by its shares: where a table would have too many cells."""
    n, side = len(classes), SIDE
    step = (side - 2 * BORDER) / n
    groups: list[list[tuple[float, float, float, float]]] = [[] for _ in range(SHADES)]
    right = total = 0
    for true, row in enumerate(counts):
        size = sum(row)
        total, right = total + size, right + row[true]
        for guess, count in enumerate(row):
            if count:
                shade = min(SHADES - 1, math.floor(SHADES * count / size))
                groups[shade].append((BORDER + guess * step, BORDER + true * step, step, step))
    about = (
        f"{n} true classes by {n} predicted ones, in the order of the class table; "
        f"{percent(right / total if total else None)} of the {observed()} lie on the diagonal"
    )
    drawing = Drawing(side, side, f"confusion of {target}", about)
    drawing.line(BORDER, BORDER, side - BORDER, side - BORDER, "line")
    for shade, boxes in enumerate(groups):
        drawing.boxes(boxes, "mark", opacity=(shade + 1) / SHADES)
    for start, end in (((BORDER, BORDER), (BORDER, side - BORDER)), ((BORDER, side - BORDER), (side - BORDER, side - BORDER))):  # fmt: skip
        drawing.line(*start, *end, "soft")
    return drawing
