"""What the page of a run shows when a step is done: tables, figures and links, and a name a person can read."""

import functools
import re
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID

import httpx
from prefect import get_client, runtime
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.logging import get_run_logger

from bmfm_pipeline.storage import load_artefact, read_json
from flows.course import embedded

# Figures lie in Prefect's database: few and small ones. The page of an evaluation has all of them.
MOST_BYTES_OF_A_FIGURE, MOST_BYTES = 60_000, 250_000
FIRST_FIGURES = ("accuracy", "macro-f1", "mse", "confusion", "reliability", "risk", "train-loss", "validation")


def _when_it_answers(show: Callable[..., None]) -> Callable[..., None]:
    """What a page shows is waited for while the server is away for a moment; where it stays away, the work goes on without."""

    @functools.wraps(show)
    def shown(*given: Any, **named: Any) -> None:
        for wait in (1, 2, 4, 8, 16, 0):
            try:
                return show(*given, **named)
            except httpx.TransportError as error:
                if not wait:
                    get_run_logger().warning(
                        "Prefect's server does not take what the page shows (%s); the work goes on", error
                    )
            time.sleep(wait)

    return shown


def artifact_key(*parts: str) -> str:
    """Artifact keys take lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


@_when_it_answers
def label_run(*tags: str, name: str | None = None) -> None:
    """Add tags to the current flow run, and rename it, once it is known what it makes."""
    if runtime.flow_run.id is None:
        return
    run = UUID(str(runtime.flow_run.id))
    with get_client(sync_client=True) as client:
        known = client.read_flow_run(run).tags  # what this process knows of its run dates from its start
        client.update_flow_run(run, name=name, tags=sorted({*known, *tags}))


@_when_it_answers
def show_table(key: str, rows: list[dict[str, Any]], description: str) -> None:
    if rows:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        table = [{name: _cell(row.get(name)) for name in columns} for row in rows]
        create_table_artifact(table=table, key=key, description=description)


@_when_it_answers
def show_links(key: str, links: dict[str, str]) -> None:
    """One link artifact each, such as the MLflow run and the report."""
    for text, address in links.items():
        if address:
            create_link_artifact(
                link=_address(address), link_text=text, key=artifact_key(key, text), description=address
            )


@_when_it_answers
def show_figures(key: str, uri: str, title: str, links: dict[str, str]) -> None:
    """The figures of an artefact in one page, below the sentences of its verdict. Links to places that only this machine has are text.

    A page of Prefect shows an image artifact with its whole address in letters; in markdown the figure carries its bytes.
    """
    artefact = load_artefact(uri)
    names = sorted((name for name in artefact.files if re.fullmatch(r"figures/[^/]+\.svg", name)), key=_place_of_figure)
    if not names:
        return
    told = next((name for name in ("evaluation.json", "study.json") if name in artefact.files), None)
    said = read_json(artefact.local_file(told)).get("verdicts", []) if told else []
    shown, taken = [], 0
    for name in names:
        size = artefact.files[name]["bytes"]
        if size <= MOST_BYTES_OF_A_FIGURE and taken + size <= MOST_BYTES:
            taken += size
            about = name.rsplit("/", 1)[-1].removesuffix(".svg").replace("-", " ")
            shown.append(f"*{about}*\n\n{embedded(about, artefact.local_file(name).read_bytes())}")
    where = [f"[{text}]({place})" if is_page(place) else f"{text}: `{place}`" for text, place in links.items() if place]
    rest = f"{len(names) - len(shown)} more figures are in the report." if len(names) > len(shown) else ""
    verdicts = "\n".join(f"- {sentence}" for sentence in said)
    parts = [f"### {title}", verdicts, "\n\n".join(shown), rest, "\n\n".join(where)]
    create_markdown_artifact(
        "\n\n".join(filter(None, parts)), key=artifact_key(key, "figures"), description=said[0] if said else title
    )


def _place_of_figure(name: str) -> tuple[int, str]:
    own = name.removeprefix("figures/")
    return next((place for place, start in enumerate(FIRST_FIGURES) if own.startswith(start)), len(FIRST_FIGURES)), own


def in_mlflow(run: str | None, file: str) -> str:
    """The address at which MLflow shows a file of a run: a browser opens no file of this disk from a page of a server."""
    return f"{run}/artifacts/{file}" if run and is_page(run) else ""


def is_page(place: str) -> bool:
    return place.startswith(("http://", "https://"))


def _address(place: str) -> str:
    return f"file://{place}" if place.startswith("/") else place


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    return "" if value is None else value if isinstance(value, int | str) else str(value)
