"""A small table as HGNC writes it, with symbols of today, and tables of orthologs."""

from pathlib import Path

HEAD = "hgnc_id\tsymbol\tname\tlocus_group\tstatus\talias_symbol\tprev_symbol\tensembl_gene_id"
CODING = "protein-coding gene"
ROWS = [
    ("HGNC:1673", "CD3D", CODING, "Approved", "", "T3D", "ENSG00000167286"),
    ("HGNC:1674", "CD3E", CODING, "Approved", "TCRE", "", "ENSG00000198851"),
    ("HGNC:1633", "CD19", CODING, "Approved", "B4", "", "ENSG00000177455"),
    ("HGNC:132", "ACTB", CODING, "Approved", "", "", "ENSG00000075624"),
    ("HGNC:26077", "MARCHF1", CODING, "Approved", '"RNF171|MARCH-I"', "MARCH1", "ENSG00000145416"),
    ("HGNC:28038", "MARCHF2", CODING, "Approved", "", "MARCH2", "ENSG00000099785"),
    ("HGNC:26189", "MTARC1", CODING, "Approved", "", '"MOSC1|MARC1"', "ENSG00000186205"),
    ("HGNC:7729", "SEPTIN2", CODING, "Approved", "", '"DIFF6|NEDD5|SEPT2"', "ENSG00000168385"),
    ("HGNC:9213", "POU2F1", CODING, "Approved", "OCT1", "OTF1", "ENSG00000143190"),
    ("HGNC:10963", "SLC22A1", CODING, "Approved", "OCT1", "", "ENSG00000175003"),
    ("HGNC:9221", "POU5F1", CODING, "Approved", "OCT4", "OTF3", "ENSG00000204531"),
    ("HGNC:4398", "RACK1", CODING, "Approved", "", "GNB2L1", "ENSG00000204628"),
    ("HGNC:28062", "C1orf159", CODING, "Approved", "", "", "ENSG00000131591"),
    ("HGNC:29665", "MALAT1", "non-coding RNA", "Approved", "", "", "ENSG00000251562"),
    ("HGNC:9", "OLD1~withdrawn", "withdrawn", "Entry Withdrawn", "", "", ""),
]  # fmt: skip


def hgnc_text(rows=ROWS) -> str:
    lines = [
        "\t".join([identifier, symbol, "a name", group, status, alias, previous, ensembl])
        for identifier, symbol, group, status, alias, previous, ensembl in rows
    ]
    return "\n".join([HEAD, *lines]) + "\n"


def write_hgnc(folder: Path, rows=ROWS) -> Path:
    path = folder / "hgnc_complete_set.txt"
    path.write_text(hgnc_text(rows))
    return path


def write_orthologs(folder: Path) -> Path:
    """Mouse and human, one-to-one, two mouse genes of one human gene, and a mouse gene with two human ones."""
    path = folder / "orthologs.csv"
    path.write_text(
        "mouse,human\nCd3d,CD3D\nCd3e,CD3E\nActb,ACTB\nActb2,ACTB\nGnb2l1,GNB2L1\nDouble,CD19\nDouble,POU5F1\n"
    )
    return path
