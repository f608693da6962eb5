"""What a run needs on a GPU that is not here is arithmetic: it grows as its parts do, and says what it leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedmira.assembly import assemble
from fedmira.cli.main import main
from fedmira.config.run import RunConfig
from fedmira.forecast.elsewhere import MemoryElsewhere, memory_elsewhere
from fedmira.model.kept_attention import MOST_KEPT
from fedmira.training.memory import activation_bytes_per_token, bytes_per_client, estimate


def needed(dtype: str = "auto", rank: int = 2, **sections: Any) -> MemoryElsewhere:
    return memory_elsewhere(config(dtype, rank, **sections))


def config(dtype: str, rank: int, device: str = "cuda:99", **sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "data": {"source": "planted", "families": 2, "clients_per_family": 3, "examples": 12},
            "model": {"adapter": {"rank": rank, "targets": ["q_proj"]}, "dtype": dtype, "device": device},
            "training": {"local_steps": 2, "batch_size": 2},
            "federation": {"rounds": 2, "clients_per_round": 4},
            "method": {"name": "fedit"},
            **sections,
        }
    )


def test_sizes_are_those_of_the_dtype_it_would_have() -> None:
    wide, narrow = needed("float32"), needed()
    assert (wide.dtype, narrow.dtype) == ("float32", "bfloat16")
    assert wide.base_bytes == 2 * narrow.base_bytes
    # adapters are kept in float32 either way
    assert wide.server_bytes == narrow.server_bytes == 6 * 6 * 4 * wide.adapter_parameters
    assert 0.5 <= narrow.bytes_per_client / wide.bytes_per_client < 0.6
    assert (wide.num_clients, wide.clients_per_round, wide.cohort_size) == (6, 4, None)


def test_a_client_takes_what_training_it_is_estimated_to_take() -> None:
    parts = assemble(config("float32", 2, device="cpu"))
    token_bytes = activation_bytes_per_token(parts.base, parts.layout, length=MOST_KEPT + 1)
    alone = estimate(parts.base, parts.layout, parts.tokenized, parts.config.training, 1, token_bytes)
    found = needed("float32")
    assert found.bytes_per_client == alone.clients_bytes + alone.activation_bytes
    assert alone.clients_bytes == bytes_per_client(parts.layout, parts.config.training)
    assert found.memory_bytes(4) - found.memory_bytes(1) == 3 * found.bytes_per_client


def test_a_larger_adapter_needs_more() -> None:
    assert needed(rank=8).server_bytes == 4 * needed().server_bytes
    assert needed(rank=8).bytes_per_client > needed().bytes_per_client


def test_the_command_says_what_it_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(json.dumps(config("auto", 2).model_dump(mode="json", exclude_unset=True)))
    assert main(["run", "c.yaml", "--dry-run"]) == 0
    text = capsys.readouterr().out
    for words in ("with one client in a cohort", "with all 4 of a round", "in bfloat16", "time is not predicted"):
        assert words in text
    assert main(["run", "c.yaml", "--dry-run", "--json", "training.cohort_size=3"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts["memory_bytes_by_cohort_size"]) == ["3"]
    assert "cuda:99 is not here" in facts["warnings"][-1]
    assert list(Path().iterdir()) == [Path("c.yaml")]
    # the run itself is refused as before
    assert main(["run", "c.yaml"]) == 4
