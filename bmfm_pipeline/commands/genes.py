"""`bmfm genes download`, `bmfm genes show NAME...`: the table of gene names, and what a name resolves to."""

import argparse
import sys
from pathlib import Path
from typing import Any

from bmfm_pipeline.errors import ConfigError


def genes(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.what == "download":
        if arguments.names:
            raise ConfigError(
                f"genes download takes no names ({', '.join(arguments.names)}); `bmfm genes show NAME` does"
            )
        return _download(arguments)
    if not arguments.names:
        raise ConfigError("genes show: name one or more genes, e.g. `bmfm genes show MARCH1 ENSG00000167286 1-Mar`")
    return _show(arguments)


def _download(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fetch the table of HGNC; its address and checksum are kept beside it."""
    from bmfm_pipeline.stages.gene_tables import HGNC_URL, fetch_gene_table

    found = fetch_gene_table(arguments.url or HGNC_URL, arguments.sha256, _progress(arguments))
    if not arguments.json:
        print(f"{found['file']}: {found['genes']} genes, sha256 {found['sha256']}")
        print(
            f'use it with data_module.transform_kwargs.gene_names.table=hgnc, or this very version with ="{found["kept_as"]}"'
        )
    return found


def _progress(arguments: argparse.Namespace):
    if arguments.json or not sys.stderr.isatty():
        return None

    def say(done: int, total: int | None) -> None:
        print(f"\r{done / 1e6:.1f} MB" + (f" of {total / 1e6:.1f}" if total else ""), end="", file=sys.stderr)

    return say


def _show(arguments: argparse.Namespace) -> dict[str, Any]:
    """What each name resolves to through the table, alone: other genes of a data set can change how a date is read."""
    from bmfm_pipeline.stages.gene_tables import downloaded_table
    from bmfm_pipeline.vocabulary.gene_table import read_hgnc
    from bmfm_pipeline.vocabulary.harmonising import GeneNameMapper

    path = Path(arguments.table).expanduser() if arguments.table else downloaded_table()
    if not arguments.table and not path.exists():
        raise ConfigError(f"{path} is not there; run `bmfm genes download`, or name a table with --table FILE")
    table = read_hgnc(path)
    mapper, rows = GeneNameMapper(table), []
    by_symbol = {gene.symbol: gene for gene in table.genes}
    for name in arguments.names:
        found = mapper.resolve([name])[0]
        row = {"name": name, "symbol": found.target if found.known else None, "how": found.how, "why": found.why}
        if found.known:
            gene = by_symbol[found.target]
            row |= {"hgnc_id": gene.hgnc_id, "ensembl_id": gene.ensembl_id, "group": gene.locus_group}
            row |= {"previous": list(gene.previous), "aliases": list(gene.aliases)}
        rows.append(row)
    if not arguments.json:
        for row in rows:
            print(f"{row['name']}: {row['symbol'] or row['how']} ({row['why']})")
            if row["symbol"]:
                print(f"    {row['hgnc_id']}  {row['ensembl_id'] or 'no Ensembl id'}  {row['group']}")
                for word in ("previous", "aliases"):
                    if row[word]:
                        print(f"    {word}: {', '.join(row[word])}")
    return {"table": str(path), "genes": rows}
