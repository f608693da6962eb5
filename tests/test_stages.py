"""Stages add up to all the time that passed, each second counted once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fedmira.stages import STAGES, Stopwatch, settle_with, stage, watching


def ticking(*times: float) -> Callable[[], float]:
    moments = iter(times)
    return lambda: next(moments)


def test_an_inner_stage_is_not_counted_as_the_outer_one() -> None:
    watch = Stopwatch(clock=ticking(10, 11, 13, 16, 20, 25))
    with watching(watch), stage("evaluation"), stage("disk"):
        pass
    assert {name: seconds for name, seconds in watch.seconds.items() if seconds} == {
        "other": 1 + 5,
        "evaluation": 2 + 4,
        "disk": 3,
    }
    assert sum(watch.seconds.values()) == 25 - 10


def test_a_stage_that_fails_is_counted_and_left() -> None:
    watch = Stopwatch(clock=ticking(0, 1, 4, 4, 6, 7))
    with watching(watch):
        with pytest.raises(ValueError, match="broken"), stage("forward"):
            raise ValueError("broken")
        with stage("backward"):
            pass
    assert (watch.seconds["forward"], watch.seconds["backward"], watch.seconds["other"]) == (3, 2, 2)


def test_the_device_settles_before_the_clock_is_read() -> None:
    happened = []
    watch = Stopwatch(clock=lambda: float(len(happened)))
    settle_with(lambda: happened.append("nobody watches"))
    with watching(watch):
        settle_with(lambda: happened.append("settled"))
        with stage("forward"):
            assert happened == ["settled"]
    assert watch.seconds["forward"] == 1


def test_nothing_is_counted_where_nobody_watches() -> None:
    watch = Stopwatch(clock=ticking(0, 1))
    with watching(watch):
        pass
    with stage("forward"):
        pass
    assert watch.seconds == {**dict.fromkeys(STAGES, 0.0), "other": 1}
