"""`bmfm datasets`: the catalogue, one dataset of it in full, and its download."""

import argparse
import glob
import os
import sys
import time
from pathlib import Path
from typing import Any

from bmfm_pipeline.config import list_entries, load_entry
from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.storage import is_pattern, is_remote, join_uri, strip_userinfo

SAY_EVERY = 5.0  # seconds between lines where there is no terminal


def datasets(arguments: argparse.Namespace) -> Any:
    """List the catalogue, show one dataset, or download one."""
    action = {"list": _list, "show": _show, "download": _download}[arguments.action or "list"]
    if arguments.action in ("show", "download") and not arguments.name:
        raise ConfigError(f"name a dataset: bmfm datasets {arguments.action} NAME (`bmfm datasets` lists them)")
    if arguments.action in (None, "list") and arguments.name:
        raise ConfigError(f"`bmfm datasets` lists all; for one: bmfm datasets show {arguments.name}")
    if arguments.action != "download" and (arguments.to or arguments.url or arguments.sha256):
        raise ConfigError("--to, --url and --sha256 belong to `bmfm datasets download NAME`")
    return action(arguments)


def summary(entry) -> dict[str, Any]:
    """What the list says of a dataset: name, title, cells, genes, labels, whether its file is there, and how to get it."""
    state, how = _state(entry)
    return {
        "name": entry.name,
        "title": entry.title,
        "cells": entry.cells,
        "genes": entry.genes,
        "labels": [column.label_column_name for column in entry.label_columns],
        "state": state,
        "get": how,
    }


def _state(entry) -> tuple[str, str]:
    """("ready" or what is missing, the command or step that gets it, empty when it is there)."""
    source = entry.source
    if source.builder:
        return "ready", ""
    named = os.environ.get(source.env or "", "")
    remote = join_uri(named, source.file) if named and is_remote(named) else source.file
    if is_remote(remote):
        return f"at {strip_userinfo(remote)}", ""
    path = Path(source.file) if source.env is None else entry.data_folder / source.file
    if path.exists() or (is_pattern(path) and any(glob.iglob(str(path), recursive=True))):
        return "ready", ""
    missing = f"{path} is missing"
    if source.env and not named:
        missing = f"set {source.env} to the folder that holds {source.file}"
    if source.download:
        return missing, f"bmfm datasets download {entry.name}"
    return missing, f"by hand, from {entry.homepage}" if entry.homepage else "by hand"


def _list(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = [summary(entry) for entry in list_entries()]
    if not arguments.json:
        width = max(len(row["name"]) for row in rows)
        print(f"{'name':<{width}}  {'cells':>7} {'genes':>7}  {'labels':<16}  state")
        for row in rows:
            shown, more = row["labels"][:3], len(row["labels"]) - 3
            labels = (", ".join(shown) or "none") + (f" and {more} more" if more > 0 else "")
            print(
                f"{row['name']:<{width}}  {_number(row['cells']):>7} {_number(row['genes']):>7}  {labels:<16}  {row['state']}"
            )
            if row["get"]:
                print(f"{'':<{width}}  {'':>7} {'':>7}  {'':<16}  get it: {row['get']}")
    return rows


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _show(arguments: argparse.Namespace) -> dict[str, Any]:
    entry = load_entry(arguments.name)
    found = {**entry.model_dump(mode="json", exclude_none=True), **summary(entry)}
    if not arguments.json:
        print(f"{entry.name}: {entry.title}")
        lines = {
            "size": f"{_number(entry.cells)} cells x {_number(entry.genes)} genes",
            "values": {"log_normalised": "log-normalised, not counts", "any": "not counts"}.get(entry.input_values, ""),
            "genes": f"renamed by the gene table {entry.gene_names.table}"
            if entry.gene_names and entry.gene_names.table
            else "",
            "labels": "; ".join(_label(entry, column) for column in entry.label_columns) or "none",
            "split": _split(entry),
            "batches": f"obs['{entry.batch_column}']" if entry.batch_column else "",
            "state": found["state"],
            "get it": found["get"],
            "fetch": entry.fetch,
            "accession": entry.accession,
            "licence": entry.licence,
            "notes": entry.notes,
            "citation": entry.citation,
            "homepage": entry.homepage,
        }
        for name, text in lines.items():
            if text:
                print(f"{name:<9} {text}")
        if entry.expected:
            print("others")
            for score in entry.expected:
                numbers = ", ".join(f"{name} {value:.4g}" for name, value in score.scores.items())
                about = f"{score.protocol}; {score.source}" if score.protocol else score.source
                print(f"  {score.method}: {numbers} ({about})")
        print("transforms")
        for step in entry.transforms:
            words = ", ".join(
                f"{key}={value}" for key, value in (step.transform_args or {}).items() if value is not None
            )
            print(f"  {step.transform_name.removesuffix('Transform')}({words})")
        print(f"run it    bmfm run {entry.name}")
    return found


def _label(entry, column) -> str:
    """A label column in words: its kind, and its classes where the entry knows them."""
    name, listed = column.label_column_name, entry.expected_labels.get(column.label_column_name)
    if column.is_regression_label:
        return f"{name} (number)"
    n = entry.n_classes(name)
    kind = ["several classes a cell"] if column.is_multilabel else []
    kind += [f"{n} classes" + (f": {', '.join(listed)}" if listed else "")] if n else []
    kind += ["in an ontology"] if column.label_ontology else []
    kind += ["to be unlearned"] if column.gradient_reversal_coefficient is not None else []
    return f"{name} ({'; '.join(kind)})" if kind else name


def _split(entry) -> str:
    if entry.split_column_name:
        return f"as obs['{entry.split_column_name}'] says"
    if entry.split is None:
        return ""
    rule = entry.split.model_dump(mode="json", exclude_none=True)
    words = [f"as obs['{rule.pop('column')}'] says"] if "column" in rule else []
    words += [f"no value of obs['{rule.pop('group')}'] in two splits"] if "group" in rule else []
    mapping = rule.pop("mapping", {})
    words += [", ".join(f"{value} is {split}" for value, split in mapping.items() if value != split)] if mapping else []
    words += [f"{name}={value}" for name, value in rule.items()]
    return "; ".join(words)


def _download(arguments: argparse.Namespace) -> dict[str, Any]:
    from bmfm_pipeline.data.sources.fetching import download_dataset

    entry = load_entry(arguments.name)
    folder = Path(arguments.to) if arguments.to else None
    meter = Meter()
    found = download_dataset(
        entry, folder, urls=_pairs(arguments.url, "--url"), sums=_pairs(arguments.sha256, "--sha256"), on_progress=meter
    )
    meter.end()
    if not arguments.json:
        if found["made"]:
            print(f"{found['file']}: {found['cells']:,} cells x {found['genes']:,} genes")
            for name, count in found.get("labels", {}).items():
                print(f"  {count:>7,}  {name}")
            if found.get("repeated_symbols"):
                print(
                    f"{found['repeated_symbols']} gene symbols come more than once; the later ones are named SYMBOL_ID"
                )
            print(f"what came from where: {found['provenance']}")
        else:
            print(f"{found['file']}: is there already; move it away to make it again")
        where = Path(found["file"])
        if entry.source.env and (entry.data_folder is None or (entry.data_folder / entry.source.file) != where):
            top = str(where)[: -len(entry.source.file)].rstrip("/")
            print(f"next: export {entry.source.env}={top}")
        print(f"next: bmfm run {entry.name}")
    return found


def _pairs(words: list[str] | None, option: str) -> dict[str, str]:
    pairs = {}
    for word in words or []:
        name, _, value = word.partition("=")
        if not value:
            raise ConfigError(f"{option} {word}: write it as {option} FILE=VALUE, e.g. {option} matrix=...")
        pairs[name] = value
    return pairs


class Meter:
    """Progress on stderr: one line that is rewritten on a terminal, else a line every few seconds."""

    def __init__(self) -> None:
        self._what, self._said_at, self._open = "", 0.0, False
        self._terminal = sys.stderr.isatty()

    def __call__(self, what: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if what != self._what:
            self.end()
            self._what, self._said_at = what, now if not self._terminal else 0.0
        last = total is not None and done >= total
        if now - self._said_at < (0.2 if self._terminal else SAY_EVERY) and not last:
            return
        self._said_at = now
        if what == "build":
            text = f"build: {done / 1e6:,.1f} of {total / 1e6:,.1f} million values"
        else:
            text = f"{what}: {done / 2**20:,.1f}" + (f" of {total / 2**20:,.1f} MiB" if total else " MiB")
        self._open = self._terminal
        print(
            f"\r{text}\033[K" if self._terminal else text,
            end="" if self._terminal else "\n",
            file=sys.stderr,
            flush=True,
        )

    def end(self) -> None:
        if self._open:
            print(file=sys.stderr)
        self._open = False
