"""Files of graphs that a user gives: JSON, .npy, or .csv with or without the clients' names.

Knows nothing about clients: whose row is which, and whether the weights make a graph, is for `federation.graph`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from fedmira.errors import DataError


def read_graph_file(path: Path) -> tuple[np.ndarray, list[str] | None]:
    """The matrix in the file `path`, and the names of its rows if the file has them.

    Raises:
        DataError: the file is missing, unreadable, or holds no matrix of numbers.
    """
    try:
        return _READERS.get(path.suffix.lower(), _from_json)(path)
    except OSError as error:
        raise DataError(f"method.graph.path: cannot read {path}: {error.strerror or error}") from error
    # damaged files: zipfile, EOF and overflow errors come from inside numpy
    except (ValueError, KeyError, TypeError, EOFError, OverflowError, RecursionError, BadZipFile) as error:
        raise DataError(
            f"method.graph.path: {path} is no graph: {str(error).rstrip('.')}. Allowed: JSON with `adjacency` (a "
            "square list of lists) and optionally `names`, a .npy matrix in client order, or a .csv matrix in that "
            "order or with the clients' names above and beside it"
        ) from error


def _from_npy(path: Path) -> tuple[np.ndarray, None]:
    with path.open("rb") as file:
        matrix = np.load(file, allow_pickle=False)
    if not isinstance(matrix, np.ndarray) or matrix.dtype.kind not in "biuf":
        raise ValueError(f"it holds {getattr(matrix, 'dtype', 'an archive')}, not one matrix of real numbers")
    return matrix, None


def _from_csv(path: Path) -> tuple[np.ndarray, list[str] | None]:
    """A matrix, with or without the clients' names above it and beside it, as spreadsheets and pandas write it."""
    text = path.read_text(encoding="utf-8-sig")
    rows = max((_rows(text, mark) for mark in ";\t,"), key=_likely_table)
    if not rows:
        raise ValueError("it is empty")
    names = None
    if not all(map(_is_number, rows[0])):
        names, *rows = rows
        if len(names) == len(rows) + 1:
            names, beside = names[1:], [row[0] for row in rows]
            if names != beside:
                raise ValueError(f"its columns are named {names[:5]} and its rows {beside[:5]}")
            rows = [row[1:] for row in rows]
    if len(sizes := sorted({len(row) for row in rows})) > 1:
        raise ValueError(f"it has rows of {sizes[0]} and of {sizes[-1]} cells")
    # where cells are parted by a semicolon, a comma is the decimal point
    return np.array([[float(cell.replace(",", ".")) for cell in row] for row in rows], ndmin=2), names


def _rows(text: str, delimiter: str) -> list[list[str]]:
    """The cells of the lines that are neither empty nor, as numpy writes headers, a comment."""
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    return [row for row in rows if any(cell.strip() for cell in row) and not row[0].startswith("#")]


def _likely_table(rows: list[list[str]]) -> tuple[bool, int]:
    widths = [len(row) for row in rows] or [0]
    return widths[0] > 1 and len(set(widths)) == 1, widths[0]


def _is_number(cell: str) -> bool:
    try:
        float(cell.replace(",", "."))
    except ValueError:
        return False
    return True


def _from_json(path: Path) -> tuple[np.ndarray, list[str] | None]:
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(content, dict) or "adjacency" not in content:
        raise ValueError("it has no `adjacency`")
    names = content.get("names")
    if not (names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names))):
        raise ValueError("`names` is not a list of client names")
    return np.asarray(content["adjacency"], dtype=np.float64), names


_READERS: Mapping[str, Callable[[Path], tuple[np.ndarray, list[str] | None]]] = {
    ".npy": _from_npy,
    ".csv": _from_csv,
}
