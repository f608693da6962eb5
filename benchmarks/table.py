"""Results as one Markdown page: the targets, and a table per section.

`python -m benchmarks.table` writes the committed results' page anew, and the targets into docs/performance.md. Knows
nothing about how anything was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.peer import OURS
from benchmarks.results import Results, Row, Section, read_results
from benchmarks.suite import Target, Verdict, judge, machines

PAGE = "README.md"
RESULTS = Path(__file__).resolve().parent / "results"
DOCS_PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- written by python -m benchmarks.table -->", "<!-- end -->"


def write_pages(folder: Path) -> None:
    """Write the page over all result files of a folder; of the committed ones, the targets into the docs' page too."""
    found = found_in(folder)
    (folder / PAGE).write_text(render(found), encoding="utf-8")
    if folder.resolve() == RESULTS:
        DOCS_PAGE.write_text(with_targets(DOCS_PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")


def render(found: dict[str, Results]) -> str:
    """The page, from results by name of a machine (`cpu-intel-xeon`)."""
    parts = ["# Benchmark results", render_verdicts(found)]
    for name, results in found.items():
        machine = results.machine
        parts.append(
            f"## {name}\n\n{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, "
            f"copy {machine['copy_bytes_per_second'] / 1e9:.1f} GB/s (read + write)."
        )
        parts += [render_section(section) for section in results.sections]
    return "\n\n".join(parts) + "\n"


def render_verdicts(found: dict[str, Results]) -> str:
    """All targets, with a column for each machine."""
    names, cells = list(machines(found)), dict[Target, dict[str, str]]()
    for verdict in judge(found):
        cells.setdefault(verdict.target, {})[verdict.machine] = _verdict(verdict)
    rows = [
        (
            target.what,
            f"{'at least' if target.at_least else 'at most'} {target.bound:g}",
            *(by_machine.get(name, "") for name in names),
        )
        for target, by_machine in cells.items()
    ]
    return markdown_table(("target", "bound", *names), rows)


def _verdict(verdict: Verdict) -> str:
    """The number, the word, and what was measured when."""
    if verdict.value is None or verdict.section is None:
        return verdict.word
    return ", ".join(text for text in (f"{verdict.value:.2f} {verdict.word}", _when(verdict.section)) if text)


def _when(section: Section) -> str:
    """The commit and the day of a section, as far as they are known."""
    return " of ".join(text for text in (section.commit, section.date) if text)


def render_section(section: Section) -> str:
    """One workload."""
    parts = [f"### {section.name}", f"{section.title}."]
    if section.rows:
        header = ("", "seconds", "quartiles", "of ours", "tokens/s", "supervised/s", "peak MiB", "final loss")
        parts.append(markdown_table(header, [_cells(row, section) for row in section.rows]))
    notes = _notes(section)
    if notes:
        parts.append(" ".join(notes))
    return "\n\n".join(parts)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells as Markdown; the first column is left-aligned, the others right."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def _notes(section: Section) -> list[str]:
    """What the table does not hold, in sentences."""
    facts, measures = section.facts, section.measures
    notes = []
    if "padding_own_batch" in facts:
        notes.append(
            f"{facts['tokens']:,} real tokens, {facts['supervised_tokens']:,} of them supervised; padded to the "
            f"longest, own batches hold {facts['padding_own_batch']:.2f} times as many positions, batches of all "
            f"clients {facts['padding_all_clients']:.2f} times."
        )
    if "cohort_size" in facts:
        notes.append(f"Ours trains {facts['cohort_size']} clients at a time.")
    if "over floor" in measures:
        notes.append(
            f"Ours takes {measures['over floor']:.2f} times the floor: {facts['floor_flops'] / 1e12:.3f} TFLOP at "
            f"{facts['gemm_flops_per_second'] / 1e9:,.0f} GFLOP/s measured for the frozen layers."
        )
    if "new_tokens" in facts:
        notes.append(f"{facts['new_tokens']:,} new tokens; {facts['equal_answers']:.1%} of the answers are equal.")
    if facts.get("equal_answers", 1.0) < 1.0 and "equal_tokens_per_answer" in facts:
        notes.append(
            f"{facts['equal_first_tokens']:.1%} of the first tokens are; answers agree for "
            f"{facts['equal_tokens_per_answer']:.1f} tokens on average."
        )
    if "bytes_per_client" in facts:
        notes.append(
            f"One more client takes {facts['bytes_per_client'] / facts['parameters']:.1f} bytes per parameter; "
            "adapter, gradient and two moments are 16."
        )
    if "copy_bytes_per_second" in facts:
        notes.append(f"Copying moves {facts['copy_bytes_per_second'] / 1e9:.1f} GB/s (read + write).")
    notes += _about_contestants(section)
    if section.commit:
        notes.append(f"Measured at {_when(section)}.")
    return notes


def _about_contestants(section: Section) -> list[str]:
    """In which form and with which settings the contestants ran."""
    notes = [
        f"{row.contestant}: {row.clients_per_batch} clients in a batch, the fastest of the sizes tried."
        for row in section.rows
        if row.clients_per_batch is not None
    ]
    settings: dict[str, list[str]] = {}
    for row in section.rows:
        if row.settings:
            words = ", ".join(f"{name} {value}" for name, value in row.settings.items())
            settings.setdefault(words, []).append(f"`{row.contestant}`")
    if settings:
        told = "; ".join(f"{words}: {', '.join(contestants)}" for words, contestants in settings.items())
        notes.append(f"Each in a process of its own, whose whole memory is told ({told}).")
    elif any(row.contestant == OURS and row.peak_bytes for row in section.rows):
        notes.append(
            "All in one process; `peak MiB` is what a round adds, on a GPU in bytes that torch's allocator gave out."
        )
    return notes


def _cells(row: Row, section: Section) -> tuple[str, ...]:
    if row.seconds is None:
        return (row.contestant, row.note, *("" for _ in range(6)))
    facts = section.facts
    tokens, supervised = facts.get("tokens", facts.get("new_tokens")), facts.get("supervised_tokens")
    ratio = section.measures.get(f"over {row.contestant}", 1.0 if row.contestant == OURS else None)
    return (
        row.contestant,
        f"{row.seconds:.3f}",
        f"{row.lower:.3f} - {row.upper:.3f}",
        "" if ratio is None else f"{ratio:.2f}",
        "" if tokens is None else f"{tokens / row.seconds:,.0f}",
        "" if supervised is None else f"{supervised / row.seconds:,.0f}",
        "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f}",
        "" if row.final_loss is None else f"{row.final_loss:.4f}",
    )


def with_targets(page: str, found: dict[str, Results]) -> str:
    """A page whose marked part holds what was found about all targets."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    measured_on = ", ".join(f"{results.machine['device']} ({name})" for name, results in found.items())
    return f"{before}{BEGIN}\n\n{render_verdicts(found)}\n\nMeasured on {measured_on}.\n\n{END}{after}"


def found_in(folder: Path) -> dict[str, Results]:
    """The results of a folder by name of a machine."""
    return {path.stem: read_results(path) for path in sorted(folder.glob("*.json"))}


def main() -> None:
    """Bring both pages up to date."""
    write_pages(RESULTS)


if __name__ == "__main__":
    main()
