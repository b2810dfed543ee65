"""The colours of pages and figures, on light and on dark ground, as one table for CSS, SVG and PNG."""

# Text colours (ink, soft, mark, good, bad, second) reach a contrast of 4.5:1 on ground and on panel; marks of charts (c0 to c9) 3:1.
LIGHT = {
    "ground": "#ffffff",
    "panel": "#f3f6f9",
    "ink": "#1a1d21",
    "soft": "#545c66",
    "line": "#d3dae1",
    "mark": "#0b5cad",
    "good": "#1b7446",
    "bad": "#b3261e",
    "second": "#a84900",
    "c0": "#0b5cad",
    "c1": "#c4570a",
    "c2": "#1b7f4b",
    "c3": "#8e3fa8",
    "c4": "#b3261e",
    "c5": "#007a86",
    "c6": "#7a6400",
    "c7": "#b8327e",
    "c8": "#4d5a9e",
    "c9": "#5b6b2f",
    "other": "#7d8791",
}
DARK = {
    "ground": "#14171a",
    "panel": "#1e2429",
    "ink": "#e8eaed",
    "soft": "#aab3bc",
    "line": "#3b444d",
    "mark": "#74b6ff",
    "good": "#5fcb8f",
    "bad": "#ff8f85",
    "second": "#ffab66",
    "c0": "#74b6ff",
    "c1": "#ffab66",
    "c2": "#5fcb8f",
    "c3": "#d7a1ea",
    "c4": "#ff8f85",
    "c5": "#4fd0d8",
    "c6": "#d9bd3f",
    "c7": "#f58fc6",
    "c8": "#a8b3f0",
    "c9": "#b8c586",
    "other": "#8f99a3",
}
CATEGORIES = tuple(f"c{index}" for index in range(10))
# How strongly the ground of a cell that holds all of its row is coloured with `mark`.
STRONGEST_SHADE = 0.45


def css() -> str:
    """The colours as custom properties, the dark ones where the reader's system asks for them."""
    return f":root {{ color-scheme: light dark; {_properties(LIGHT)} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {_properties(DARK)} }} }}"


def _properties(colours: dict[str, str]) -> str:
    marks = " ".join(str(part) for part in rgb(colours["mark"]))
    return " ".join(f"--{name}: {value};" for name, value in colours.items()) + f" --mark-parts: {marks};"


def rgb(colour: str) -> tuple[int, int, int]:
    """(red, green, blue), 0 to 255, of '#rrggbb'."""
    return tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5))


def mixed(colour: str, ground: str, share: float) -> str:
    """`share` (0 to 1) of `colour` laid over `ground`."""
    parts = (round(share * over + (1 - share) * under) for over, under in zip(rgb(colour), rgb(ground), strict=True))
    return "#" + "".join(f"{part:02x}" for part in parts)


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours (WCAG 2.2), 1 to 21."""
    bright, dim = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def _luminance(colour: str) -> float:
    parts = (part / 255 for part in rgb(colour))
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
