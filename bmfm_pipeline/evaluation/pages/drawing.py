"""One drawing, two forms: SVG for pages and files, PNG through matplotlib. Colours are names of the palette."""

from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from bmfm_pipeline.evaluation.pages.palette import DARK, LIGHT

FONT = "system-ui, sans-serif"
Point = tuple[float, float]


@dataclass
class Drawing:
    """Shapes on a sheet of `width` x `height` px, drawn in the order they are added; y grows downwards.

    `title` names the figure, `about` says in words what it shows, for those who do not see it.
    """

    width: float
    height: float
    title: str
    about: str
    shapes: list[tuple] = field(default_factory=list)

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str = "line", width: float = 1, dash: str = ""):
        self.shapes.append(("path", [[(x1, y1), (x2, y2)]], colour, width, dash))

    def curve(self, points: list[Point], colour: str = "mark", width: float = 1.6, dash: str = ""):
        self.shapes.append(("path", [points], colour, width, dash))

    def area(self, points: list[Point], colour: str, opacity: float):
        self.shapes.append(("area", points, colour, opacity))

    def areas(self, polygons: list[list[Point]], colour: str, opacity: float = 1):
        """Filled polygons of one colour."""
        if polygons:
            self.shapes.append(("areas", polygons, colour, opacity))

    def boxes(self, boxes: list[tuple[float, float, float, float]], colour: str, opacity: float = 1):
        """Filled rectangles (x, y, width, height) of one colour."""
        if boxes:
            self.shapes.append(("boxes", boxes, colour, opacity))

    def dots(self, points: list[Point], colour: str, size: float = 3, square: bool = False, hollow: bool = False):
        """Marks of `size` px, round or square."""
        if points:
            self.shapes.append(("dots", points, colour, size, square, hollow))

    def text(self, x: float, y: float, text: str, colour: str = "soft", anchor: str = "start", size: float = 11, bold: bool = False, halo: bool = False):  # fmt: skip
        """`anchor` start, middle or end; (x, y) is on the base line. `halo`: readable on top of other marks."""
        if text:
            self.shapes.append(("text", x, y, str(text), colour, anchor, size, bold, halo))

    def svg(self, *, alone: bool = False) -> str:
        """The drawing as an SVG element; `alone`: as a file that brings its colours, for light and dark ground."""
        dark = "".join(f"--{name}:{value};" for name, value in DARK.items())
        light = "".join(f"--{name}:{value};" for name, value in LIGHT.items())
        style = (
            f"<style>:root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
            f'<rect width="100%" height="100%" style="fill:var(--ground)"/>'
            if alone
            else ""
        )
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_short(self.width)} {_short(self.height)}" width="{_short(self.width)}" '
            f'height="{_short(self.height)}" role="img" aria-label="{escape(self.about)}">'
            f"<title>{escape(self.title)}</title><desc>{escape(self.about)}</desc>{style}"
        )
        return head + "".join(_SVG[kind](*values) for kind, *values in self.shapes) + "</svg>"

    def write_png(self, path: Path, scale: float = 2) -> None:
        """The drawing on light ground, `scale` times as many pixels; needs matplotlib."""
        from bmfm_pipeline.evaluation.pages.raster import write_png

        write_png(self, path, scale)


def _path(lines, colour, width, dash) -> str:
    places = "".join(
        ("L" if index else "M") + f"{_short(x)} {_short(y)}" for points in lines for index, (x, y) in enumerate(points)
    )
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path d="{places}" style="fill:none;stroke:var(--{colour})" stroke-width="{width}" stroke-linejoin="round"{dashes}/>'


def _area(points, colour, opacity) -> str:
    places = " ".join(f"{_short(x)},{_short(y)}" for x, y in points)
    return f'<polygon points="{places}" style="fill:var(--{colour})" fill-opacity="{opacity}"/>'


def _areas(polygons, colour, opacity) -> str:
    places = "".join("M" + "L".join(f"{_short(x)} {_short(y)}" for x, y in points) + "z" for points in polygons)
    return f'<path d="{places}" style="fill:var(--{colour})" fill-opacity="{_short(opacity)}"/>'


def _boxes(boxes, colour, opacity) -> str:
    places = "".join(
        f"M{_short(x)} {_short(y)}h{_short(wide)}v{_short(tall)}h{_short(-wide)}z" for x, y, wide, tall in boxes
    )
    return f'<path d="{places}" style="fill:var(--{colour})" fill-opacity="{_short(opacity)}"/>'


def _dots(points, colour, size, square, hollow) -> str:
    """All marks of one colour are one path of lines without length, which their round or square ends make visible."""
    if hollow:
        shape = "".join(f'<circle cx="{_short(x)}" cy="{_short(y)}" r="{size / 2 - 0.75}"/>' for x, y in points)
        return f'<g style="fill:var(--ground);stroke:var(--{colour})" stroke-width="1.5">{shape}</g>'
    places = "".join(f"M{_short(x)} {_short(y)}h0" for x, y in points)
    cap = "square" if square else "round"
    return f'<path d="{places}" style="stroke:var(--{colour})" stroke-width="{size}" stroke-linecap="{cap}"/>'


def _text(x, y, text, colour, anchor, size, bold, halo) -> str:
    style = f"fill:var(--{colour});font:{'600 ' if bold else ''}{size}px {FONT}"
    if halo:
        style += ";stroke:var(--ground);stroke-width:3px;paint-order:stroke"
    place = f'x="{_short(x)}" y="{_short(y)}"' + (f' text-anchor="{anchor}"' if anchor != "start" else "")
    return f'<text {place} style="{style}">{escape(text)}</text>'


def _short(value: float) -> str:
    """One decimal at most: a page with thousands of marks stays small."""
    return f"{value:.1f}".removesuffix(".0")


_SVG = {"path": _path, "area": _area, "areas": _areas, "boxes": _boxes, "dots": _dots, "text": _text}
