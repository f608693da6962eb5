"""The data sets of the recipes, as their owners publish them. Skipped where the development data is absent."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fedmira.config.data import DollyConfig, JsonlConfig, NaturalInstructionsConfig, PartitionConfig
from fedmira.data.partition import build_federation
from fedmira.data.splits import SPLITS, content_key
from fedmira.data.tokenization import tokenize_federation
from fedmira.types import Federation


@pytest.fixture(scope="module")
def small_tokenizer(shared_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared_dir / "models" / "stories260K")


def sizes(federation: Federation) -> Counter[tuple[int, int, int]]:
    return Counter((len(c.train), len(c.validation), len(c.test)) for c in federation.clients)


def assert_no_text_in_two_splits(federation: Federation) -> None:
    splits: dict[str, set[str]] = {}
    for client in federation.clients:
        for split in SPLITS:
            for e in getattr(client, split):
                splits.setdefault(content_key(e), set()).add(split)
    assert all(len(found) == 1 for found in splits.values())


@pytest.mark.parametrize("name", ["dolly-mini-1600.jsonl", "databricks-dolly-15k.jsonl.gz"])
def test_dolly_is_eighty_clients(shared_dir: Path, name: str) -> None:
    path = str(shared_dir / "data" / "dolly" / name)
    config = DollyConfig(source="dolly", path=path, partition=PartitionConfig(clients_per_task=10))
    federation = build_federation(config, 0)
    assert len(federation.clients) == 80
    assert set(Counter(c.task for c in federation.clients).values()) == {10}
    assert federation.provenance["partition"]["examples_left_out"] == 0
    assert_no_text_in_two_splits(federation)
    assert federation.clients == build_federation(config, 0).clients


def test_all_natural_instructions_tasks_load(shared_dir: Path) -> None:
    path = str(shared_dir / "data" / "natural_instructions" / "tasks")
    federation = build_federation(NaturalInstructionsConfig(source="natural_instructions", path=path), 0)
    assert len(federation.clients) == 36
    assert all(c.task == c.name and c.category for c in federation.clients)
    assert sizes(federation)[(180, 45, 75)] == 30
    assert [file["unusable_records"] for file in federation.provenance["files"]] == [0] * 36
    assert any(len(e.references) > 1 for c in federation.clients for e in c.test)
    assert_no_text_in_two_splits(federation)


def test_instruction_induction_with_four_small_clients_per_task(shared_dir: Path, small_tokenizer: Any) -> None:
    config = NaturalInstructionsConfig(
        source="natural_instructions",
        path=str(shared_dir / "data" / "instruction_induction" / "tasks"),
        tasks=("antonyms", "sum", "singular_to_plural"),
        partition=PartitionConfig(clients_per_task=4, examples_per_client=20),
    )
    federation = build_federation(config, 0)
    assert federation.names[:5] == ("antonyms-0", "antonyms-1", "antonyms-2", "antonyms-3", "sum-0")
    assert sizes(federation) == {(12, 3, 5): 12}
    tokenized, report = tokenize_federation(federation, small_tokenizer, config.template, config.max_length)
    assert (report.truncated_prompts, report.dropped_examples) == (0, 0)
    assert len(tokenized) == 12


def test_flan_with_five_clients_per_task(shared_dir: Path, small_tokenizer: Any) -> None:
    config = JsonlConfig(
        source="jsonl",
        path=str(shared_dir / "data" / "flan"),
        partition=PartitionConfig(clients_per_task=5, examples_per_client=60),
    )
    federation = build_federation(config, 0)
    assert len(federation.clients) == 40
    assert sizes(federation) == {(36, 9, 15): 40}
    assert len({c.category for c in federation.clients}) == 8
    assert_no_text_in_two_splits(federation)
    tokenized, _ = tokenize_federation(federation, small_tokenizer, config.template, config.max_length)
    for client in tokenized:
        for sequence, text in zip(client.test, client.examples.test, strict=True):
            assert sequence.id == text.id
            answer = small_tokenizer.decode(sequence.tokens[sequence.prompt_length : -1].tolist())
            assert answer.strip() == text.output.strip()
