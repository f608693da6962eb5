"""What all sections of the config share: the frozen section and the kinds of numbers. No torch, no transformers."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
FinitePositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    def without_effect(self) -> str:
        """Which fields beside an `enabled` that is false are not as they are by default, in words; or nothing."""
        fields = type(self).model_fields
        changed = [name for name, field in fields.items() if name != "enabled" and getattr(self, name) != field.default]
        return f"{' and '.join(changed)} {'have' if len(changed) > 1 else 'has'} no effect" if changed else ""
