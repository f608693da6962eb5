"""The study of clients that join late: who is late, and from what they start."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tests.federation.builders import initial
from tests.tools import tool

from fedmira import experiment
from fedmira.config.data import PlantedConfig
from fedmira.data.sources import planted
from fedmira.federation.method import State

PAGE = Path(__file__).resolve().parent.parent / "docs" / "results" / "joining.md"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    tool("methods_study")
    return tool("joining_study")


def test_the_last_client_of_each_family_is_late(study: ModuleType) -> None:
    config = PlantedConfig(source="planted")
    with study.without_the_late():
        first = planted.load(config, 0)
    whole = planted.load(config, 0)
    names, late = ({example.client for example in source.examples} for source in (whole, first))
    assert names - late == {f"family-{family}-client-3" for family in range(4)}
    assert [example for example in whole.examples if example.client in late] == list(first.examples)


def test_who_joins_fresh_starts_from_the_initial_adapter(study: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def welcoming(_before: Any, _after: Any, state: State, _round: int) -> State:
        return State(state.adapters.replace(torch.full((5, state.adapters.values_KP.shape[1]), 2.0)), (1,) * 5)

    monkeypatch.setattr(experiment, "take_in", welcoming)
    start = initial(5)
    method = SimpleNamespace(init=lambda adapters, _clients: State(adapters, (0,) * 5))
    after = SimpleNamespace(method=method, initial_adapters=lambda: start, clients=None)
    before = State(start.replace(torch.ones(3, start.values_KP.shape[1])), (1,) * 3)
    with study.joining_fresh():
        # where a run looks it up
        joined = vars(experiment)["take_in"](None, after, before, 4).adapters.values_KP
    assert torch.equal(joined[3:], start.values_KP[3:])
    assert (joined[:3] == 2.0).all()
    assert vars(experiment)["take_in"] is welcoming
    assert "take_in" in experiment._Run._take_in.__code__.co_names


def test_those_who_joined_are_judged_apart(study: ModuleType) -> None:
    line = {"clients": {f"family-0-client-{k}": ["family-0", 10.0 * k, 10, 0.0, 0, 0] for k in (1, 2, 3)}}
    assert study.only(line, True).losses_K.tolist() == [3.0]
    assert study.only(line, False).losses_K.tolist() == [1.0, 2.0]
    assert study.only(None, True) is None


def test_the_page_names_who_made_what_it_shows_and_nobody_else(
    study: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = study.read()
    stale = {**next(iter(known.values())), "commit": "nobody"}
    monkeypatch.setattr(study, "read", lambda: known | {("fresh", "stale"): stale})
    study.page(None)
    assert "nobody" not in capsys.readouterr().out.rpartition("Runs made by")[2]


def test_the_page_is_what_the_committed_runs_say(study: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    study.page(None)
    assert capsys.readouterr().out == PAGE.read_text("utf-8")
