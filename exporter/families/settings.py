"""What families read config.json with."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from qexport.errors import ModelInvalid

MOST = (1 << 31) - 1  # of whole numbers; no axis is longer


class Settings(BaseModel):
    """Fields of config.json; others are ignored, unsupported values refused.

    Types are not bent: ``"4"``, ``4.0`` or ``true`` is not the number 4, because not every reader takes it for one.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_what_it_is(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = _kinds(cls.model_fields[info.field_name or ""].annotation)
        for part in value if isinstance(value, list | tuple) else (value,):
            if bool in kinds and not isinstance(part, bool | None):
                raise ValueError("is neither true nor false")
            if kinds & {int, float} and isinstance(part, str | bool):
                raise ValueError("is no number")
            if int in kinds and isinstance(part, float):
                raise ValueError("is no whole number")
            if int in kinds and isinstance(part, int) and abs(part) > MOST:
                raise ValueError(f"is beyond {MOST}")
        return value


def misfit(error: ValidationError, where: str) -> ModelInvalid:
    """The first thing that is wrong with settings, by its field."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"])) or "(all)"
    return ModelInvalid(f"field {field!r}: {first['msg'].lower()}", where=where)


def _kinds(annotation: Any) -> set[Any]:
    """The types in an annotation, those inside of unions and tuples among them."""
    inner = [each for each in get_args(annotation) if not isinstance(each, str)]
    return {annotation}.union(*map(_kinds, inner))
