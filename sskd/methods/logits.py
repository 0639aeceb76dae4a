"""What the logits of both networks become before they are compared (``method.logits``).

``standardised`` is LS: Sun, Ren, Li, Wang, Cao, "Logit Standardization in Knowledge Distillation",
CVPR 2024, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from sskd.methods.base import in_float32

LogitTransform = Literal["raw", "standardised"]
EPS = 1e-7


def raw(logits: Tensor) -> Tensor:
    """Return ``logits``."""
    return logits


@in_float32
def standardised(logits: Tensor) -> Tensor:
    """Return each row of ``logits`` [N, C] with a mean of 0 and a standard deviation of 1.

    The result is float32, and the same for ``a * logits + b`` with ``a > 0``. A row of equal logits
    becomes zeros. At a later temperature, the student need not match the range of the teacher's
    logits.
    """
    centred = logits - logits.mean(1, keepdim=True)
    return centred / (EPS + logits.std(1, keepdim=True))


TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {"raw": raw, "standardised": standardised}
