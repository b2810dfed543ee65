"""Templates to pages: every string from outside is escaped, and a page can load nothing and run nothing but its own sorting."""

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from bmfm_pipeline.evaluation.pages import numbers, palette

TEMPLATES = Path(__file__).with_name("templates")


@cache
def _environment():
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        loader=FileSystemLoader(TEMPLATES, encoding="utf-8"),
    )
    environment.filters |= {
        "number": numbers.number,
        "percent": numbers.percent,
        "size": numbers.size,
        "duration": numbers.duration,
        "interval": numbers.with_interval,
        "bounds": _bounds,
        "thousands": lambda value: "–" if value is None else f"{value:,.0f}",
        "svg": lambda drawing: Markup(drawing.svg()),
    }
    script = (TEMPLATES / "sort.js").read_text(encoding="utf-8").strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals |= {
        "observed": numbers.observed,
        "style": Markup(palette.css() + "\n" + (TEMPLATES / "style.css").read_text(encoding="utf-8")),
        "script": Markup(script),
        # Nothing is fetched, and of scripts only this one runs, whatever the names in the data contain.
        "policy": f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'",
    }
    return environment


def _bounds(text: str):
    """'value [low, high]' with the bounds in one piece: on paper a narrow column breaks before them, never between them."""
    from markupsafe import Markup, escape

    value, bracket, bounds = str(text).partition(" [")
    return Markup('{} <span class="bounds">[{}</span>').format(value, bounds) if bracket else escape(text)


def render(template: str, **context: Any) -> str:
    """The page of a template in the folder of templates; templates that extend base.html share its style."""
    return _environment().get_template(template).render(**context)
