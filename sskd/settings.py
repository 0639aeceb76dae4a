"""The common ground of all checked settings.

Every number has a lower and an upper bound, far inside what float32 and int64 hold: losses are
computed in float32, from products of several settings. A test holds each
field of each setting to that.
"""

from __future__ import annotations

import sys
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

LARGEST = 1e12  # its square, and its product with a loss, are still far from float32's limit
SMALLEST = 1e-30  # of what is not 0; float32 has numbers down to 1e-38


def _as_float(value: object) -> object:
    """Return an integer that no float can hold as the largest float, which any bound refuses."""
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        return sys.float_info.max if value > 0 else -sys.float_info.max
    return value


def _not_lost(value: float) -> float:
    if 0 < abs(value) < SMALLEST:
        raise ValueError(f"is too close to 0 for float32 (at least {SMALLEST:g})")
    return value


EARLY, LATE = BeforeValidator(_as_float), AfterValidator(_not_lost)

Positive = Annotated[float, Field(gt=0, le=LARGEST, allow_inf_nan=False), EARLY, LATE]
NonNegative = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False), EARLY, LATE]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), EARLY, LATE]
ShareOfAny = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), EARLY, LATE]
ShareBelowAll = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), EARLY, LATE]
LearningRate = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False), EARLY, LATE]
# A factor of a size in memory or of a number of epochs.
Multiple = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False), EARLY, LATE]

Seed = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(gt=0, le=10**9)]
Epochs = Annotated[int, Field(gt=0, le=10**6)]
Width = Annotated[int, Field(gt=0, le=2**16)]  # of a layer

NonEmpty = Annotated[str, Field(min_length=1)]


class Settings(BaseModel):
    """Settings that refuse what they do not know, and take a value only in its own type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)
