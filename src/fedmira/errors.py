"""The exceptions of fedmira, grouped by what the person who meets one can do about it.

FedmiraError                     exit code 1   something failed while running
|-- DivergedError                1             training left no finite number: lower the learning rate
|-- UsageError                   2             the command or the config is wrong: change it
|   `-- ConfigError              2             one or more keys of the config are wrong: each is listed
|-- DataError                    3             a data file, a client or an example is unusable
|-- SetupError                   4             a package, a device, a model folder or a place to write is missing
|-- IntegrityError               5             a checkpoint or a run directory cannot be trusted
|-- ParticipationError           6             too few clients, or the privacy budget is spent
`-- Interrupted              129, 130, 143     a signal arrived; the state was saved

Every message says what is wrong, what was given, what is allowed and what to do. This module knows nothing
about the rest of the package.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FedmiraError(Exception):
    """Base of all errors that fedmira raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class DivergedError(FedmiraError):
    """Training left no client with finite numbers; a comparison counts such a setting as the worst of its grid."""


class UsageError(FedmiraError):
    """The command was used in a way it does not support."""

    exit_code = 2


class ConfigError(UsageError):
    """One or more keys of a config are wrong; the message lists every one of them."""


class DataError(FedmiraError):
    """A data file, a client or an example cannot be used."""

    exit_code = 3


class SetupError(FedmiraError):
    """A package, a device, a model folder or a place to write is missing or unusable."""

    exit_code = 4


class IntegrityError(FedmiraError):
    """A checkpoint or a run directory is damaged or belongs to another config."""

    exit_code = 5


class ParticipationError(FedmiraError):
    """Too few clients answered, or the privacy budget is spent."""

    exit_code = 6


class Interrupted(FedmiraError):
    """A signal asked the run to stop; everything was saved. `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the allowed name closest to `name`, or an empty string.

    >>> nearest("fedti", ["fedit", "mira"])
    "; did you mean 'fedit'?"
    >>> nearest("zzz", ["fedit", "mira"])
    ''
    """
    matches = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]!r}?" if matches else ""
