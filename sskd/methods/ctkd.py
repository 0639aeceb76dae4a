"""CTKD: Li, Li, Yang, Zhao, Song, Luo, Li, Yang, "Curriculum Temperature for Knowledge
Distillation", AAAI 2023, sections 3.2 and 3.3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sskd.data import Batch
from sskd.methods.base import LossOutput, in_float32
from sskd.methods.kd import KD, Logits
from sskd.methods.networks import Networks
from sskd.settings import Positive, ShareOfAny


class _ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by ``factor``, a scalar."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return factor * gradient, None


def reversal(progress: Tensor, warmup: float) -> Tensor:
    """Return the factor of the temperature's gradient: from 0 to -1 by a cosine, then -1.

    Args:
        progress: the share of the phase's epochs that have begun.
        warmup: the share of them after which the factor is -1.
    """
    return (torch.cos(math.pi * (progress / warmup).clamp(max=1)) - 1) / 2


@in_float32
def learned_kd_loss(student: Tensor, teacher: Tensor, temperature: Tensor) -> Tensor:
    """Return ``kd_loss`` with a gradient for the ``temperature`` too: a scalar, float32.

    ``student`` and ``teacher`` are logits [B, C]; ``temperature`` is a positive scalar.
    """
    log_q = F.log_softmax(student / temperature, dim=1)
    log_p = F.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


class LearnedTemperature(nn.Module):
    """A temperature between ``lowest`` and ``lowest + span``, one for all images."""

    def __init__(self, lowest: float, span: float) -> None:
        super().__init__()
        self.lowest, self.span = lowest, span
        self.theta = nn.Parameter(torch.ones(()))

    @property
    def value(self) -> Tensor:
        """The temperature, a scalar."""
        return self.lowest + self.span * self.theta.sigmoid()

    def forward(self, gradient_factor: Tensor) -> Tensor:
        """Return the temperature; its gradient is multiplied by ``gradient_factor``."""
        scaled: Tensor = _ScaledGradient.apply(self.value, gradient_factor)
        return scaled


class CTKD(KD):
    """KD at a temperature that is learned against the student: it makes the loss larger.

    ``temperature`` is the lowest one.
    """

    def __init__(
        self,
        networks: Networks,
        *,
        temperature_span: Positive,
        reversal_warmup: ShareOfAny,
        **shared: Any,
    ) -> None:
        super().__init__(networks, **shared)
        self.reversal_warmup = reversal_warmup
        self.learned_temperature = LearnedTemperature(self.temperature, temperature_span)
        self.adapters = (self.learned_temperature,)

    def loss(self, batch: Batch) -> LossOutput:
        """Return ``ce`` and ``kd``, and the temperature as a metric."""
        terms, metrics = super().loss(batch)
        temperature = self.learned_temperature.value.detach()
        return LossOutput(terms, {**metrics, "temperature": temperature})

    def logit_terms(self, logits: Logits) -> dict[str, Tensor]:
        """Return ``kd``."""
        factor = reversal(self.progress, self.reversal_warmup)
        temperature = self.learned_temperature(factor)
        return {"kd": learned_kd_loss(logits.student, logits.teacher, temperature)}
