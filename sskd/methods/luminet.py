"""LumiNet: Hossain, Elahi, Ramasinghe, Cheraghian, Rahman, Mohammed, Rahman, "LumiNet:
Perception-Driven Knowledge Distillation via Statistical Logit Calibration", TMLR 2025.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sskd.methods.base import in_float32
from sskd.methods.kd import KD, Logits, softened_kl
from sskd.methods.networks import Networks
from sskd.settings import ShareOfAny

EPS = 1e-5


@in_float32
def perception(logits: Tensor) -> Tensor:
    """Return each column of ``logits`` [B, C] with a mean of 0 and a variance of 1.

    The logits of a class are standardised over the images of the batch. A column of equal logits
    becomes zeros, and so does a batch of one image. The result is float32.
    """
    variance, mean = logits.var(0, keepdim=True, correction=0), logits.mean(0, keepdim=True)
    return (logits - mean) * (variance + EPS).rsqrt()


def luminet_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the mean divergence of the softened perceptions, a scalar, without a factor of T^2.

    ``student`` and ``teacher`` are logits [B, C].
    """
    one, other = (perception(each) / temperature for each in (student, teacher))
    return softened_kl(one, other, 1).mean()


class LumiNet(KD):
    """KD of logits that are standardised over the batch, for each class."""

    terms = ("ce", "luminet")

    def __init__(self, networks: Networks, *, warmup: ShareOfAny, **shared: Any) -> None:
        super().__init__(networks, **shared)
        self.warmup = {"luminet": warmup}

    def logit_terms(self, logits: Logits) -> dict[str, Tensor]:
        """Return ``luminet``, whose weight is the square of the authors' alpha."""
        student, teacher = self.whole(logits.student, logits.teacher)
        return {"luminet": luminet_loss(student, teacher, self.temperature)}
