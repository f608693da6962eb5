"""The study of hostile clients: who lies, and what is uploaded instead."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tests.tools import tool

from fedmira.exchange import in_process

PAGE = Path(__file__).resolve().parent.parent / "docs" / "results" / "attacks.md"
START = torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
CLIENTS = [SimpleNamespace(name=f"family-{k // 2}-client-{k % 2}") for k in range(4)]


@pytest.fixture(scope="module")
def study() -> ModuleType:
    tool("methods_study")
    return tool("attack_study")


def trained(_base: Any, _layout: Any, job: Any, *_rest: Any, **_named: Any) -> Any:
    """Every row but the second, which fails, moves by 0.1 in its first half."""
    values_SP = job.start_SP.clone()
    values_SP[:, :250] += 0.1
    return values_SP[[0, 2]], tuple(SimpleNamespace(failure="" if row != 1 else "diverged") for row in range(3))


@pytest.mark.parametrize("attack", ["turned", "random"])
def test_the_first_client_of_a_family_uploads_something_else(study: ModuleType, attack: str) -> None:
    # clients 0 and 2 lead their families; client 1 fails, so the second row that came is that of client 2
    job = SimpleNamespace(start_SP=START, ids=(1, 0, 2), round=3)
    values_SP, reports = study.hostile(trained, attack, 7)(None, None, job, CLIENTS)
    assert [bool(report.failure) for report in reports] == [False, True, False]
    honest_SP, _ = trained(None, None, job)
    assert torch.equal(values_SP[0], honest_SP[0])
    update_P, lie_P = honest_SP[1] - START[2], values_SP[1] - START[2]
    torch.testing.assert_close(lie_P.norm(), 4 * update_P.norm())
    assert not lie_P[250:].any()
    alike = float(torch.cosine_similarity(update_P, lie_P, dim=0))
    assert alike == pytest.approx(-1.0) if attack == "turned" else abs(alike) < 0.3
    again_SP, _ = study.hostile(trained, attack, 7)(None, None, job, CLIENTS)
    assert torch.equal(again_SP, values_SP)


def test_a_run_is_carried_out_with_liars_and_leaves_none_behind(
    study: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, seen = in_process.train, []

    def carry_out(task: Any) -> dict[str, Any]:
        seen.append(in_process.train)
        raise RuntimeError(task.seed)

    monkeypatch.setattr(study.methods, "carry_out", carry_out)
    with pytest.raises(RuntimeError, match="5"):
        study.carry_out(SimpleNamespace(seed=5), "turned")
    assert seen[0] is not honest
    assert in_process.train is honest
    # where a run looks it up
    assert "train" in in_process.InProcess.run.__code__.co_names


def test_only_honest_clients_are_judged(study: ModuleType) -> None:
    line = {
        "clients": {
            "family-0-client-0": ["family-0", 900.0, 10, 0.0, 0, 0],
            "family-0-client-1": ["family-0", 20.0, 10, 0.5, 0, 1],
        }
    }
    assert study.honest_only(line).losses_K.tolist() == [2.0]
    assert study.honest_only({"diverged": "x"}) is None


def test_the_page_names_who_made_what_it_shows_and_nobody_else(
    study: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = study.read()
    stale = {**next(iter(known.values())), "commit": "nobody"}
    monkeypatch.setattr(study, "read", lambda: known | {("turned", "stale"): stale})
    study.page(None)
    assert "nobody" not in capsys.readouterr().out.rpartition("Runs made by")[2]


def test_the_page_is_what_the_committed_runs_say(study: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    study.page(None)
    assert capsys.readouterr().out == PAGE.read_text("utf-8")
