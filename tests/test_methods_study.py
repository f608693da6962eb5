"""The study of all methods: which learning rates are tried, in which order, and which is chosen."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedmira.config import RunConfig

REPOSITORY = Path(__file__).resolve().parent.parent
GRID = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2]


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("methods_study", REPOSITORY / "tools" / "methods_study.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["methods_study"] = module
    spec.loader.exec_module(module)
    return module


def tried(study: ModuleType, loss: Callable[[float], float | None], grid: list[float]) -> tuple[list[list[float]], Any]:
    """The batches of rates that are asked for until one is chosen, and that one."""
    config = RunConfig.model_validate({"name": "s", "compare": {"learning_rates": grid, "methods": ["fedit"]}})
    of = study.Study("s", config, {})
    found: dict[Any, Any] = {}
    batches = []
    while True:
        rate, untried = study.choose_rate(of, "fedit", found)
        if rate is not None:
            return batches, rate
        batches.append([task.learning_rate for task in untried])
        assert all(task.tuning and task.seed == config.compare.tuning_seed for task in untried)
        found |= {task.key: {"validation_loss": loss(task.learning_rate)} for task in untried}


@pytest.mark.parametrize(
    ("best", "batches"),
    [
        (3e-3, [[1e-3, 3e-3, 1e-2]]),
        (1e-3, [[1e-3, 3e-3, 1e-2], [3e-4]]),
        (3e-4, [[1e-3, 3e-3, 1e-2], [3e-4]]),
        (3e-2, [[1e-3, 3e-3, 1e-2], [3e-2]]),
    ],
)
def test_rates_are_tried_outwards_while_the_outermost_is_best(
    study: ModuleType, best: float, batches: list[list[float]]
) -> None:
    assert tried(study, lambda rate: abs(math.log(rate / best)), GRID) == (batches, best)


def test_a_rate_that_diverges_is_never_chosen(study: ModuleType) -> None:
    assert tried(study, lambda rate: None if rate > 2e-3 else rate, GRID)[1] == 3e-4


@pytest.mark.parametrize("grid", [[1e-3], [1e-3, 1e-2]])
def test_a_short_grid_is_tried_whole(study: ModuleType, grid: list[float]) -> None:
    assert tried(study, lambda rate: -rate, grid) == ([grid], grid[-1])
