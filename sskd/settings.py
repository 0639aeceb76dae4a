"""The common ground of all checked settings."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
NonEmpty = Annotated[str, Field(min_length=1)]


class Settings(BaseModel):
    """Settings that refuse what they do not know, and take a value only in its own type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
