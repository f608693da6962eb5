"""Texts of the server's own: as many as asked for, drawn by seed, of ordinary tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedmira.data.probe import probe_texts
from fedmira.data.tokenization import TokenizedExample


def drawn(tokenizer: Any, seed: int, count: int = 40) -> tuple[TokenizedExample, ...]:
    return probe_texts(None, count, tokenizer, "plain", 64, "input", seed)


def test_random_texts_are_drawn_by_seed_and_hold_no_special_token(tokenizer: Any) -> None:
    texts = [[tokenizer.decode(one.tokens) for one in drawn(tokenizer, seed)] for seed in (0, 0, 1)]
    assert texts[0] == texts[1]
    assert not set(texts[0]) & set(texts[2])
    # the start token, 16 characters, a new line, 8 characters and the end token
    assert {len(one.tokens) for one in drawn(tokenizer, 0)} == {27}
    assert {one.num_supervised for one in drawn(tokenizer, 0)} == {9}


def test_of_a_file_the_first_texts_are_taken(tokenizer: Any, tmp_path: Path) -> None:
    lines = [json.dumps({"instruction": f"say {number}", "output": "yes"}) for number in range(5)]
    (tmp_path / "probe.jsonl").write_text("\n".join(lines))
    texts = probe_texts(str(tmp_path / "probe.jsonl"), 2, tokenizer, "plain", 64, "input", 0)
    assert [one.id for one in texts] == ["probe.jsonl:1", "probe.jsonl:2"]
