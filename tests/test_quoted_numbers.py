"""Claims: the numbers that docs/concepts.md takes from the pages of results are those of the pages, to their digits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TypeAlias

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
Source: TypeAlias = Callable[[], Decimal]
CONCEPTS = " ".join((DOCS / "concepts.md").read_text("utf-8").split())


def number(page: str, section: str, row: str, column: str) -> Decimal:
    """What a table says; of a cell with an interval or an error its first number.

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
    return first_number(cells[head.index(column)])


def first_number(cell: str) -> Decimal:
    """With its sign."""
    found = re.search(r"[+-]?\d+(?:\.\d+)?", cell)
    assert found, cell
    return Decimal(found[0])


def source(page: str, section: str, row: str, column: str) -> Source:
    return lambda: number(page, section, row, column)


def loss(row: str, section: str = "planted") -> Source:
    return source("methods", section, row, "mean loss")


def above_mira(row: str, section: str = "planted") -> Source:
    return source("methods", section, row, "vs mira [95 %]")


def below_alone(row: str, section: str = "planted") -> Source:
    above = source("methods", section, row, "vs local_only [95 %]")
    return lambda: -above()


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
SHARED_A = [above_mira(row, "instruction_induction") for row in ("mira-shared-a", "mira-shared-a-asks-nobody")]
UNRELATED = [above_mira(row) for row in ("mira-uniform", "mira-random", "mira-permuted", "mira-embeddings")]
QUOTED: tuple[tuple[str, tuple[Source, ...]], ...] = (
    ("on planted tasks it comes to {}", (loss("mira"),)),
    ("the true graph to {}", (loss("mira-true"),)),
    ("smooth graphs to {}", (loss("mira-kalofolias"),)),
    ("learned clusters to {}", (loss("mira-clusters"),)),
    ("prompts' embeddings cost {} to {} nats there", (least(UNRELATED), most(UNRELATED))),
    (
        "On planted tasks 1 costs {} and 4 costs {}",
        tuple(above_mira(row) for row in ("mira-strength-1", "mira-strength-4")),
    ),
    (
        "2, 4, 8, 16 and 32 come to {}, {}, {}, {} and {}",
        tuple(loss(row) for row in ("mira-rank-2", "mira-rank-4", "mira", "mira-rank-16", "mira-rank-32")),
    ),
    (
        "instruction induction 2, 8 and 32 tie at {}, {} and {}",
        tuple(loss(row, "instruction_induction") for row in ("mira-rank-2", "mira", "mira-rank-32")),
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
        (below_alone("mira", "flan_few"), above_mira("fedit", "flan_few")),
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


def correction(words: str, quoted: Sequence[str], values: Sequence[Decimal]) -> str:
    """What the page must say instead; empty where all that it quotes is what the results have, to its digits."""
    right = []
    for text, value in zip(quoted, values, strict=True):
        last_digit = Decimal(10) ** -len(text.partition(".")[2])
        right.append(text if abs(Decimal(text) - value) <= last_digit / 2 else f"{value.quantize(last_digit)}")
    if right == list(quoted):
        return ""
    message = f'docs/concepts.md says "{words.format(*quoted)}"; write "{words.format(*right)}"'
    if any(value.startswith("-") for value in right):
        message += ". A minus sign means that the opposite is true: say so in words"
    return message


@pytest.mark.parametrize(("words", "sources"), QUOTED, ids=[words for words, _ in QUOTED])
def test_what_the_page_quotes_stands_in_the_results(words: str, sources: tuple[Source, ...]) -> None:
    wrong = correction(words, found(words).groups(), [of_page() for of_page in sources])
    assert not wrong, wrong


def test_a_number_or_a_sign_that_changed_is_named_with_what_to_write() -> None:
    words, quoted = "1 costs {}, 4 a little ({}", ("0.17", "0.06")
    assert not correction(words, quoted, [Decimal("0.165"), Decimal("0.064")])
    changed = correction(words, quoted, [Decimal("0.172"), Decimal("0.083")])
    assert changed == 'docs/concepts.md says "1 costs 0.17, 4 a little (0.06"; write "1 costs 0.17, 4 a little (0.08"'
    turned = correction(words, quoted, [Decimal("-0.166"), Decimal("0.060")])
    assert turned.endswith(
        '; write "1 costs -0.17, 4 a little (0.06". A minus sign means that the opposite is true: say so in words'
    )
    assert [first_number(cell) for cell in ("-0.19 [-0.24, -0.13]", "+0.02", "7.5%")] == [
        Decimal("-0.19"),
        Decimal("0.02"),
        Decimal("7.5"),
    ]


def test_every_decimal_number_of_these_sections_is_looked_up() -> None:
    looked_up = {place for words, _ in QUOTED for group in found(words).regs[1:] for place in range(*group)}
    for heading in ("Which graph, strength and rank", "Few clients", "Clients that come later"):
        begin = CONCEPTS.index(f"## {heading}")
        section = re.compile(r"\d+\.\d+").finditer(CONCEPTS, begin, CONCEPTS.index(" ## ", begin))
        left = [match[0] for match in section if match.start() not in looked_up]
        assert not left, heading
