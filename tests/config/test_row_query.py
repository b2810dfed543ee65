"""Conditions on rows: what pandas would take, and nothing that runs."""

import pandas as pd
import pytest

from bmfm_pipeline.config.row_query import RowQuery
from bmfm_pipeline.errors import ConfigError

TABLE = pd.DataFrame(
    {
        "Species": ["Homo sapiens", "Mus musculus", None, "Homo sapiens"],
        "Number of Expressed Genes": [10.0, 2000.0, 300.0, None],
        "Tumor": ["no", "yes", "no", "no"],
    }
)
ROWS = [{name: None if pd.isna(value) else value for name, value in row.items()} for row in TABLE.to_dict("records")]
QUERIES = [
    'Species == "Homo sapiens"',
    "Species != 'Homo sapiens'",
    "`Number of Expressed Genes` > 200",
    "200 < `Number of Expressed Genes` <= 2000",
    'Species in ["Homo sapiens", "Rattus"] and not Tumor == "yes"',
    "Species not in ['Homo sapiens']",
    '(Tumor == "no") & (`Number of Expressed Genes` < 400) | (Species == "Mus musculus")',
    'Species == ["Homo sapiens"]',
    "`Number of Expressed Genes` >= -5",
    'Tumor == "a `quoted` text"',
]


@pytest.mark.parametrize("text", QUERIES)
def test_takes_the_rows_that_pandas_takes(text):
    query = RowQuery(text, list(TABLE), "files.query")
    assert [number for number, row in enumerate(ROWS) if query(row)] == TABLE.query(text).index.tolist()


REFUSED = {
    '__import__("os").system("true")': "is no condition",
    'Species.str.contains("Homo")': "is no condition",
    "@x == 1": "cannot be read",
    "len(Species) > 3": "is no column and no value",
    "Species == (lambda: 1)()": "is no column and no value",
    "Species == ": "cannot be read",
    "Spezies == 'Homo sapiens'": "the table has no column 'Spezies'; did you mean 'Species'",
    "Species in Tumor": "must be a list",
    "Species is None": "write ==",
    "Species[0] == 'H'": "is no column and no value",
    "f'{Species}' == 'x'": "is no column and no value",
    "(" * 500 + "1" + ")" * 500: "cannot be read",
    "Species == 'x' " * 1000: "more than 4000",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_condition_is_refused_and_not_run(text):
    with pytest.raises(ConfigError) as caught:
        RowQuery(text, list(TABLE), "files.query")
    assert REFUSED[text] in str(caught.value) and str(caught.value).startswith("files.query: ")


def test_text_is_not_ordered_against_numbers():
    with pytest.raises(ConfigError, match="one is text and one a number"):
        RowQuery("Species > 1.5", list(TABLE), "files.query")(ROWS[0])
