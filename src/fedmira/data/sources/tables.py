"""Tables as spreadsheets save them, with a header and a row for each record: CSV with commas or semicolons, TSV.

Knows nothing about files or what a column means.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from fedmira.formats import counted

DELIMITERS = (",", ";", "\t")
_NUM_LOOKED_AT = 20
"""Rows from which the delimiter is told."""
_LONGEST_CELL = 2**31 - 1
"""Characters; the csv module refuses more than 131,072 by itself, other files may have any number."""


class Table(NamedTuple):
    """What the text of a table holds."""

    columns: tuple[str, ...]
    """Names from the header, in its order, without columns that have none."""
    rows: tuple[tuple[int, dict[str, str | None]], ...]
    """(first line counted from 1, column to cell); None: an empty cell. Without rows that are empty all over."""
    bad: tuple[tuple[int, str], ...]
    """(first line, reason) of rows that do not fit the header."""


def read_table(text: str) -> Table:
    r"""Read a table; a cell in quotation marks may hold line breaks and the delimiter.

    Raises:
        csv.Error: two columns have one name, or a quotation mark is never closed.

    >>> read_table('Frage;Antwort\nWo?;"hier; dort"\nWann?;\n').rows
    ((2, {'Frage': 'Wo?', 'Antwort': 'hier; dort'}), (3, {'Frage': 'Wann?', 'Antwort': None}))
    """
    text = text.replace("\r\n", "\n")
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        found = list(_rows(text, _delimiter(text)))
    finally:
        csv.field_size_limit(before)
    header = next((cells for _, cells in found if isinstance(cells, list)), [])
    names = [name.strip() for name in header]
    columns = tuple(name for name in names if name)
    if doubled := [name for name in dict.fromkeys(columns) if columns.count(name) > 1]:
        raise csv.Error(f"two columns are called {doubled[0]!r}")
    rows, bad = [], []
    for line, cells in found:
        if cells is header:
            continue
        if isinstance(cells, str):
            bad.append((line, f"not a row of a table ({cells})"))
        elif len(cells) != len(names):
            bad.append((line, f"{counted(len(cells), 'cell')}, where the header has {len(names)}"))
        else:
            # spreadsheets and data frames save columns without a name, such as the number of a row
            named = ((name, cell) for name, cell in zip(names, cells, strict=True) if name)
            rows.append((line, {name: cell if cell.strip() else None for name, cell in named}))
    return Table(columns, tuple(rows), tuple(bad))


def _rows(text: str, delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """The first line of each row that is not empty, with its cells or what is wrong with it."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if str(error) == "unexpected end of data":
                raise csv.Error(f"a quotation mark that is opened in line {line} is never closed") from error
            yield line, str(error)
        else:
            if any(cell.strip() for cell in cells):
                yield line, cells


def _delimiter(text: str) -> str:
    r"""The delimiter with which most rows have as many cells as the header, and that is more than one.

    >>> [_delimiter(text) for text in ("a,b\n1;2,3\n", "a, or b;c\n1;2\n3;4\n", "a\tb,c\n1\t2\n", "alone\n")]
    [',', ';', '\t', ',']
    """

    def fit(delimiter: str) -> tuple[bool, int, int]:
        rows = list(
            islice(
                (row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row), _NUM_LOOKED_AT
            )
        )
        width = len(rows[0]) if rows else 0
        return width > 1, sum(len(row) == width for row in rows), width

    return max(DELIMITERS, key=fit)
