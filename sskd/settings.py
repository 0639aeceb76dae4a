"""The base class of all settings, and the types of their values.

Every number has a lower and an upper bound, far from the limits of float32 and int64, because
losses are computed in float32 from products of several settings. A test checks that each number
of each setting has both.
"""

from __future__ import annotations

import sys
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

LARGEST = 1e12  # its square, and its product with a loss, are far below float32's limit of 3e38
SMALLEST = 1e-30  # of the numbers other than 0; float32 has numbers down to 1e-38


def _as_float(value: object) -> object:
    """Replace an integer beyond float's range by the largest float, which exceeds any bound."""
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        return sys.float_info.max if value > 0 else -sys.float_info.max
    return value


def _not_rounded_to_zero(value: float) -> float:
    if 0 < abs(value) < SMALLEST:
        raise ValueError(f"is too close to 0 for float32 (at least {SMALLEST:g})")
    return value


EARLY, LATE = BeforeValidator(_as_float), AfterValidator(_not_rounded_to_zero)

Positive = Annotated[float, Field(gt=0, le=LARGEST, allow_inf_nan=False), EARLY, LATE]
NonNegative = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False), EARLY, LATE]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), EARLY, LATE]
ShareOfAny = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), EARLY, LATE]
ShareBelowAll = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), EARLY, LATE]
LearningRate = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False), EARLY, LATE]
# A multiple of a number of channels or of epochs.
Multiple = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False), EARLY, LATE]

Seed = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(gt=0, le=10**9)]
Epochs = Annotated[int, Field(gt=0, le=10**6)]
Width = Annotated[int, Field(gt=0, le=2**16)]  # of a layer

NonEmpty = Annotated[str, Field(min_length=1)]


class Settings(BaseModel):
    """Immutable settings that reject unknown keys and do not convert a value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)
