"""Claims: the page of a run shows who was left out and why, what compression saved and what privacy cost, and none of
that where there is nothing to show."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedmira.report.page import render
from fedmira.report.reading import read

Make = Callable[..., Path]
REASON = "the upload of client <b>x</b> was rejected: its norm 3 is 300 times the median"


def altered(run: Path, change: Callable[[dict[str, Any]], None], exchange: dict[str, Any] | None = None) -> str:
    """The page of the run after `change` of every round's event."""
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for event in events:
        if event["event"] == "round":
            change(event)
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    config = yaml.safe_load((run / "config.resolved.yaml").read_text())
    (run / "config.resolved.yaml").write_text(yaml.safe_dump({**config, "exchange": exchange or {}}))
    return render(read(run))


def test_nothing_is_shown_where_nothing_happened(make_run: Make) -> None:
    page = render(read(make_run(rounds=2)))
    assert "<h2>Left out</h2>" not in page
    assert "<h2>Privacy</h2>" not in page
    assert "Compressed" not in page


@pytest.mark.parametrize(("rounds", "folded"), [(3, False), (13, True)])
def test_who_was_left_out_stands_by_round_with_the_reason_escaped(make_run: Make, rounds: int, folded: bool) -> None:
    def change(event: dict[str, Any]) -> None:
        event["failures"] = [{"client": "<b>x</b>", "reason": REASON}] if event["round"] != 2 or folded else []

    page = altered(make_run(rounds=rounds), change)
    section = page.split("<h2>Left out</h2>")[1].split("</section>")[0]
    assert section.count("300 times the median") == (rounds if folded else 2)
    assert "<td>3</td>" in section
    assert ("<td>2</td>" in section) == folded
    assert "&lt;b&gt;x&lt;/b&gt;" in section
    assert "<b>x" not in page
    assert ("<summary>Show all 13</summary>" in section) == folded


def test_the_caption_of_the_bytes_says_what_compression_saved(make_run: Make) -> None:
    def change(event: dict[str, Any]) -> None:
        event.update(upload_bytes=1000, download_bytes=3000, uncompressed_bytes=8000)

    page = altered(make_run(rounds=2), change, {"compression": "int8", "download_compression": "none"})
    assert "Compressed (int8 up) to 50" in page
    assert "of the 15.6 KiB that the tensors as they are would take" in page


def test_epsilon_is_that_after_the_last_upload_of_each_client(make_run: Make) -> None:
    def change(event: dict[str, Any]) -> None:
        spent = {"anna": 1.5 * event["round"], **({"ben": 0.5} if event["round"] == 1 else {})}
        event["privacy"] = {"delta": 1e-5, "epsilon": spent}

    settings = {"enabled": True, "clip_norm": 0.25, "noise_multiplier": 4.0, "delta": 1e-5, "budget": None}
    page = altered(make_run(rounds=2), change, {"privacy": {**settings, "noise_seed": "run"}})
    section = page.split("<h2>Privacy</h2>")[1].split("</section>")[0]
    for word, value in [
        ("largest epsilon", "3.000"),
        ("mean epsilon", "1.750"),
        ("clip norm", "0.25"),
        ("delta", "1e-05"),
    ]:
        assert f"<dt>{word}</dt><dd>{value}</dd>" in section
    assert "budget" not in section
