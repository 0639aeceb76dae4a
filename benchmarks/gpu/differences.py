"""The differences of losses, and of tensors on any device."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

CPU = torch.device("cpu")


def difference_of_losses(found: Mapping[str, float], expected: Mapping[str, float]) -> float:
    """Return the largest relative difference; infinity if one is not finite."""
    return max(
        abs(found[key] - value) / max(abs(value), 1e-6) if math.isfinite(found[key]) else math.inf
        for key, value in expected.items()
    )


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over that of ``expected``; infinity if not finite."""
    found, expected = found.to(CPU, torch.float64), expected.to(CPU, torch.float64)
    value = ((found - expected).norm() / expected.norm().clamp_min(1e-12)).item()
    return value if math.isfinite(value) else math.inf
