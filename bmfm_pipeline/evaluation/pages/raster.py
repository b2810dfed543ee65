"""Drawings as PNG, by matplotlib, without a display."""

from pathlib import Path

from bmfm_pipeline.evaluation.pages.palette import LIGHT

DOTS_PER_INCH = 100
_ANCHORS = {"start": "left", "middle": "center", "end": "right"}


def write_png(drawing, path: Path, scale: float) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((drawing.width / DOTS_PER_INCH, drawing.height / DOTS_PER_INCH), dpi=DOTS_PER_INCH * scale)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, drawing.width), ylim=(drawing.height, 0))
    axes.axis("off")
    for order, (kind, *values) in enumerate(drawing.shapes):
        _DRAWN[kind](axes, order, *values)
    FigureCanvasAgg(figure).print_png(path, metadata={"Title": drawing.title, "Description": drawing.about})


def _points(pixels: float) -> float:
    """Sizes of lines and letters are in points of 1/72 inch."""
    return pixels * 72 / DOTS_PER_INCH


def _path(axes, order, lines, colour, width, dash):
    style = (0, tuple(_points(float(part)) for part in dash.split())) if dash else "solid"
    for points in lines:
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=LIGHT[colour], linewidth=_points(width), linestyle=style, zorder=order)


def _area(axes, order, points, colour, opacity):
    xs, ys = zip(*points, strict=True)
    axes.fill(xs, ys, color=LIGHT[colour], alpha=opacity, linewidth=0, zorder=order)


def _boxes(axes, order, boxes, colour, opacity):
    corners = [[(x, y), (x + wide, y), (x + wide, y + tall), (x, y + tall)] for x, y, wide, tall in boxes]
    _areas(axes, order, corners, colour, opacity)


def _areas(axes, order, polygons, colour, opacity):
    from matplotlib.collections import PolyCollection

    axes.add_collection(
        PolyCollection(polygons, facecolors=LIGHT[colour], alpha=opacity, linewidths=0, zorder=order), autolim=False
    )


def _dots(axes, order, points, colour, size, square, hollow):
    xs, ys = zip(*points, strict=True)
    ground = LIGHT["ground"] if hollow else LIGHT[colour]
    axes.scatter(
        xs,
        ys,
        s=_points(size) ** 2,
        marker="s" if square else "o",
        facecolors=ground,
        edgecolors=LIGHT[colour],
        linewidths=1 if hollow else 0,
        zorder=order,
    )


def _text(axes, order, x, y, text, colour, anchor, size, bold, halo):
    effects = []
    if halo:
        from matplotlib.patheffects import withStroke

        effects = [withStroke(linewidth=_points(3), foreground=LIGHT["ground"])]
    axes.text(
        x,
        y,
        text.replace("$", r"\$"),
        color=LIGHT[colour],
        fontsize=_points(size),
        ha=_ANCHORS[anchor],
        va="baseline",
        weight="bold" if bold else "normal",
        path_effects=effects,
        zorder=order,
    )


_DRAWN = {"path": _path, "area": _area, "areas": _areas, "boxes": _boxes, "dots": _dots, "text": _text}
