"""Which runs cannot be given more rounds than they were begun with, by their config. Knows nothing about files."""

from __future__ import annotations

from fedmira.config.run import RunConfig
from fedmira.errors import UsageError


def refuse_to_prolong(config: RunConfig, before: int) -> None:
    """Refuse more rounds where earlier ones would have been others if the run had been meant to be so long.

    Raises:
        UsageError: names the setting.
    """
    why = ""
    if config.training.schedule != "constant":
        why = f"training.schedule = {config.training.schedule} spreads over federation.rounds"
    elif config.method.ends_alone:
        why = f"method.name = {config.method.name} trains its last rounds alone"
    if why:
        raise UsageError(
            f"a run of {before} rounds cannot go on to {config.federation.rounds}: {why}, so its first rounds would "
            f"have been others; start a new run, or resume with federation.rounds={before}"
        )
