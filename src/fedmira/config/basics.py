"""What all sections of the config share: the frozen section and the kinds of numbers. No torch, no transformers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo

from fedmira.errors import ConfigError, nearest

Fraction = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
FinitePositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    def changed(self, among: Iterable[str]) -> list[str]:
        """Which of the fields `among` are not as they are by default."""
        fields = type(self).model_fields
        return [name for name in among if getattr(self, name) != fields[name].default]

    def without_effect(self) -> str:
        """Which fields beside an `enabled` that is false are not as they are by default, in words; or nothing."""
        changed = self.changed(name for name in type(self).model_fields if name != "enabled")
        return f"{' and '.join(changed)} {'have' if len(changed) > 1 else 'has'} no effect" if changed else ""


def is_recorded(info: ValidationInfo) -> bool:
    """Whether a run began with what is validated: that is there to be read, whatever has been learnt since."""
    return bool(info.context and info.context.get("recorded"))


def refuse_strangers(key: str, named: Iterable[str], clients: Sequence[str]) -> None:
    """Refuse a setting `key` by client that has one for somebody who is none of the `clients`.

    Raises:
        ConfigError: names the first of them.
    """
    for name in named:
        if name not in clients:
            raise ConfigError(
                f"{key} names {name!r}, which is no client{nearest(name, clients)}; `fedmira data` lists them"
            )
