"""Letters of nucleotide sequences as tall as their scores, and what every change of a base does as a map of colours."""

import math
from collections.abc import Sequence

import numpy as np

from bmfm_pipeline.evaluation.pages.drawing import Drawing, Point

COLOURS = {"A": "c2", "C": "c0", "G": "c1", "T": "c4"}
BASES = "ACGT"
STEP, PER_LINE, LEFT = 10, 80, 34
LOGO, ROW, SCALE_ROOM = 60, 9, 16
SHORTEST_LINE = 40  # letters that the title needs room of
MOST_LINES = 10  # of a longer sequence the part around its largest score is drawn


def _ring(begin: float, end: float) -> list[Point]:
    """Part of an upright ring in the unit square, angles in degrees against the clock from the right."""
    angles = [math.radians(begin + (end - begin) * step / 18) for step in range(19)]
    outer = [(0.5 + 0.5 * math.cos(angle), 0.5 - 0.5 * math.sin(angle)) for angle in angles]
    inner = [(0.5 + 0.29 * math.cos(angle), 0.5 - 0.35 * math.sin(angle)) for angle in reversed(angles)]
    return outer + inner


# Letters as polygons in the unit square, y downwards: fonts differ between machines, and text cannot be stretched in both directions.
GLYPHS: dict[str, list[list[Point]]] = {
    "A": [
        [(0, 1), (0.38, 0), (0.62, 0), (1, 1), (0.78, 1), (0.5, 0.2), (0.22, 1)],
        [(0.27, 0.62), (0.73, 0.62), (0.73, 0.77), (0.27, 0.77)],
    ],
    "C": [_ring(45, 315)],
    "G": [_ring(45, 315), [(0.55, 0.5), (1, 0.5), (1, 0.95), (0.8, 0.95), (0.8, 0.65), (0.55, 0.65)]],
    "T": [[(0, 0), (1, 0), (1, 0.17), (0.61, 0.17), (0.61, 1), (0.39, 1), (0.39, 0.17), (0, 0.17)]],
}


def drawn_part(scores: np.ndarray) -> slice:
    """Which positions of a sequence are drawn: all, or those around the largest score."""
    most = PER_LINE * MOST_LINES
    if len(scores) <= most:
        return slice(0, len(scores))
    begin = min(max(int(np.argmax(np.abs(scores))) - most // 2, 0), len(scores) - most)
    return slice(begin, begin + most)


def logo(
    title: str, about: str, letters: str, scores: Sequence[float], changes: np.ndarray | None = None, first: int = 1
) -> Drawing:
    """Each letter as tall as its score, above the line where it is positive and below where it is negative, lines of 80 letters.

    `changes` (L, 4) draws beneath what A, C, G and T in place of each letter would do: blue raises, orange lowers, nan is the letter itself.
    `first`: the position of the first letter. Letters other than A, C, G and T are left blank.
    """
    scores = np.nan_to_num(np.asarray(scores, dtype=np.float64))
    high, low = max(scores.max(initial=0), 0.0), max(-scores.min(initial=0), 0.0)
    whole = (high + low) or 1.0
    line_height = LOGO + (4 * ROW + 6 if changes is not None else 0) + SCALE_ROOM + 10
    lines = -(-len(letters) // PER_LINE) or 1
    across = max(min(len(letters), PER_LINE), SHORTEST_LINE)
    drawing = Drawing(LEFT + across * STEP + 12, 44 + lines * line_height, title, about)
    drawing.text(4, 16, title, colour="ink", size=13, bold=True)
    drawing.text(4, 32, f"tallest letter {max(high, low):.3g}")
    strongest = 0.0 if changes is None else float(np.nanmax(np.abs(changes), initial=0))
    for number in range(lines):
        part = slice(number * PER_LINE, min((number + 1) * PER_LINE, len(letters)))
        top = 44 + number * line_height
        _logo_line(drawing, top, letters[part], scores[part], high / whole * LOGO, LOGO / whole)
        floor = top + LOGO
        if changes is not None:
            _changes_line(drawing, floor + 6, changes[part], strongest)
            floor += 6 + 4 * ROW
        _places(drawing, floor + 12, part, first)
    return drawing


def _logo_line(drawing: Drawing, top: float, letters: str, scores: np.ndarray, above: float, scale: float) -> None:
    zero = top + above
    by_letter: dict[str, list[list[Point]]] = {}
    for place, (letter, score) in enumerate(zip(letters, scores.tolist(), strict=True)):
        tall = abs(score) * scale
        if letter not in GLYPHS or tall < 0.3:
            continue
        x, y = LEFT + place * STEP + 0.5, zero - tall if score > 0 else zero
        by_letter.setdefault(letter, []).extend(
            [(x + across * (STEP - 1), y + down * tall) for across, down in polygon] for polygon in GLYPHS[letter]
        )
    drawing.line(LEFT, zero, LEFT + len(letters) * STEP, zero, "soft", 0.7)
    for letter, polygons in by_letter.items():
        drawing.areas(polygons, COLOURS[letter])


def _changes_line(drawing: Drawing, top: float, changes: np.ndarray, strongest: float) -> None:
    """One box a base and position; shades in tenths, so that boxes of one shade are one shape."""
    shades: dict[tuple[str, int], list[tuple[float, float, float, float]]] = {}
    for row, base in enumerate(BASES):
        drawing.text(LEFT - 14, top + row * ROW + 8, base, size=9)
        for place, value in enumerate(changes[:, row].tolist()):
            shade = 0 if not np.isfinite(value) or not strongest else round(10 * abs(value) / strongest)
            if shade:
                colour = "mark" if value > 0 else "second"
                box = (LEFT + place * STEP, top + row * ROW, STEP - 1, ROW - 1)
                shades.setdefault((colour, shade), []).append(box)
    for (colour, shade), boxes in sorted(shades.items()):
        drawing.boxes(boxes, colour, shade / 10)


def _places(drawing: Drawing, y: float, part: slice, first: int) -> None:
    for place in range(part.start, part.stop):
        if (place + first) % 10 == 0 or place == part.start:
            x = LEFT + (place - part.start) * STEP + STEP / 2
            drawing.text(x, y, str(place + first), anchor="middle", size=9)
