"""Claims: the numbers that docs/concepts.md takes from the pages of results are those of the pages, to their digits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from decimal import Decimal
from pathlib import Path
from typing import TypeAlias

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
Source: TypeAlias = Callable[[], Decimal]
CONCEPTS = " ".join((DOCS / "concepts.md").read_text("utf-8").split())


def number(page: str, section: str, row: str, column: str) -> Decimal:
    """What a table says; of a cell with an interval or an error its first number, without its sign.

    Args:
        page: of `docs/results`.
        section: its heading; empty: the page has one table.
        row: its first cell.
        column: its heading.
    """
    text = (DOCS / "results" / f"{page}.md").read_text("utf-8")
    parts = re.split(r"^## ", text, flags=re.M)
    part = next(one for one in parts if one.startswith(f"{section}\n")) if section else text
    lines = [line for line in part.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    [cells] = [cells for cells in rows if cells[0] == row]
    found = re.search(r"\d+(?:\.\d+)?", cells[head.index(column)])
    assert found, cells
    return Decimal(found[0])


def source(page: str, section: str, row: str, column: str) -> Source:
    return lambda: number(page, section, row, column)


def loss(row: str, section: str = "planted") -> Source:
    return source("methods", section, row, "mean loss")


def versus_mira(row: str, section: str = "planted") -> Source:
    return source("methods", section, row, "vs mira [95 %]")


def attacked(row: str, column: str) -> Source:
    return source("attacks", "", row, column)


def joined(column: str) -> Source:
    return source("joining", "", "mira", column)


def least(cells: Iterable[Source]) -> Source:
    return lambda: min(cell() for cell in cells)


def most(cells: Iterable[Source]) -> Source:
    return lambda: max(cell() for cell in cells)


FEDERATIONS = ("flan", "flan_few", "instruction_induction", "natural_instructions", "planted", "planted_unequal")
BY_CHANCE = [source("methods", one, "local_only-other-batches", "harmed") for one in FEDERATIONS]
JOINED = ("joined, welcomed", "joined, fresh", "there from the start")
SHARED_A = [versus_mira(row, "instruction_induction") for row in ("mira-shared-a", "mira-shared-a-asks-nobody")]
UNRELATED = [versus_mira(row) for row in ("mira-uniform", "mira-random", "mira-permuted", "mira-embeddings")]
QUOTED: tuple[tuple[str, tuple[Source, ...]], ...] = (
    ("on planted tasks it comes to {}", (loss("mira"),)),
    ("the true graph, learned clusters and smooth graphs to {}", (loss("mira-true"),)),
    ("learned clusters and smooth graphs to {}", (loss("mira-clusters"),)),
    ("smooth graphs to {}", (loss("mira-kalofolias"),)),
    ("prompts' embeddings cost {} to {} nats there", (least(UNRELATED), most(UNRELATED))),
    (
        "On planted tasks 1 costs {}, 4 a little ({}",
        tuple(versus_mira(row) for row in ("mira-strength-1", "mira-strength-4")),
    ),
    (
        "2, 4, 8, 16 and 32 come to {}, {}, {}, {} and {}",
        tuple(loss(row) for row in ("mira-rank-2", "mira-rank-4", "mira", "mira-rank-16", "mira-rank-32")),
    ),
    ("({} with rank 2, {} with 32)", tuple(loss(row) for row in ("local_only-rank-2", "local_only-rank-32"))),
    ("loses {} to {} on instruction induction", (least(SHARED_A), most(SHARED_A))),
    (
        "2, 8 and 32 in turn `mira` comes to {}, {} more than with rank 2",
        (loss("mira-ranks-mixed"), lambda: loss("mira-ranks-mixed")() - loss("mira-rank-2")()),
    ),
    (
        "come to {} and {}, and training alone to {}",
        tuple(loss(row) for row in ("hetlora-ranks-mixed", "flexlora-ranks-mixed", "local_only-ranks-mixed")),
    ),
    (
        "takes `mira` from {} to {} ({} alone)",
        (attacked("mira", "nobody"), attacked("mira", "turned"), attacked("local_only", "nobody")),
    ),
    ("It leaves {}, where `pfedgraph` has {}", (attacked("mira-krum", "turned"), attacked("pfedgraph", "turned"))),
    (
        "`mira` is {} below training alone and {} below one model for all",
        (source("methods", "flan_few", "mira", "vs local_only [95 %]"), versus_mira("fedit", "flan_few")),
    ),
    (
        "end at {} so, at {} if they start from the initial adapter, and at {} if they were there",
        tuple(joined(column) for column in JOINED),
    ),
    ("more than 1 % worse for {} to {} % of the clients", (least(BY_CHANCE), most(BY_CHANCE))),
)
"""Words of the page with a gap for each number, and where these numbers stand."""


def found(words: str) -> re.Match[str]:
    matches = list(re.finditer(re.escape(words).replace(re.escape("{}"), r"(\d+(?:\.\d+)?)"), CONCEPTS))
    assert len(matches) == 1, f"docs/concepts.md does not say {words!r} once: bring QUOTED up to date with it"
    return matches[0]


@pytest.mark.parametrize(("words", "sources"), QUOTED, ids=[words for words, _ in QUOTED])
def test_what_the_page_quotes_stands_in_the_results(words: str, sources: tuple[Source, ...]) -> None:
    for quoted, of_page in zip(found(words).groups(), sources, strict=True):
        half_a_digit = Decimal(10) ** -len(quoted.partition(".")[2]) / 2
        assert abs(Decimal(quoted) - of_page()) <= half_a_digit, f"{quoted}: the page of results has {of_page()}"


def test_every_decimal_number_of_these_sections_is_looked_up() -> None:
    looked_up = {place for words, _ in QUOTED for group in found(words).regs[1:] for place in range(*group)}
    for heading in ("What the paper leaves open", "Few clients", "Clients that come later"):
        begin = CONCEPTS.index(f"## {heading}")
        section = re.compile(r"\d+\.\d+").finditer(CONCEPTS, begin, CONCEPTS.index(" ## ", begin))
        left = [match[0] for match in section if match.start() not in looked_up]
        assert not left, heading
