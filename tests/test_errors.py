"""Each kind of error has its exit code, and a name that is nearly right gets a suggestion."""

from __future__ import annotations

import pytest

from fedmira import errors


@pytest.mark.parametrize(
    ("kind", "exit_code"),
    [
        (errors.FedmiraError, 1),
        (errors.DivergedError, 1),
        (errors.UsageError, 2),
        (errors.ConfigError, 2),
        (errors.DataError, 3),
        (errors.SetupError, 4),
        (errors.IntegrityError, 5),
        (errors.ParticipationError, 6),
    ],
)
def test_exit_codes(kind: type[errors.FedmiraError], exit_code: int) -> None:
    assert kind("what is wrong").exit_code == exit_code
    assert issubclass(kind, errors.FedmiraError)


@pytest.mark.parametrize(("signal_number", "exit_code"), [(1, 129), (2, 130), (15, 143)])
def test_a_signal_has_the_exit_code_that_shells_expect(signal_number: int, exit_code: int) -> None:
    error = errors.Interrupted("saved", signal_number)
    assert (error.exit_code, str(error)) == (exit_code, "saved")


def test_every_error_is_listed_here() -> None:
    """A new kind of error needs an exit code, and a row above."""
    kinds = {item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, Exception)}
    assert {kind.__name__ for kind in kinds} == {
        "FedmiraError", "DivergedError", "UsageError", "ConfigError", "DataError", "SetupError", "IntegrityError",
        "ParticipationError", "Interrupted",
    }  # fmt: skip


def test_nearest_suggests_what_is_close_and_nothing_else() -> None:
    assert errors.nearest("mria", ["mira", "fedit"]) == "; did you mean 'mira'?"
    assert errors.nearest("quantum", ["mira", "fedit"]) == ""
    assert errors.nearest("mira", []) == ""
