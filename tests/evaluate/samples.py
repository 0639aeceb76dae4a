"""Logits that the tests of the evaluation share."""

from __future__ import annotations

import torch
from torch import Tensor


def overconfident(count: int = 400, classes: int = 12, scale: float = 4.0) -> tuple[Tensor, Tensor]:
    """Return logits [count, classes] (float64) and labels drawn from softmax(logits / scale)."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, classes)
    logits = 1.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return scale * logits, labels
