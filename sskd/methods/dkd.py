"""DKD: Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation", CVPR 2022, section 3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sskd.methods.base import in_float32
from sskd.methods.kd import KD, Logits, softened_kl
from sskd.methods.networks import Networks
from sskd.settings import ShareOfAny


def other_classes(logits: Tensor, labels: Tensor) -> Tensor:
    """Return ``logits`` [N, C] without that of the label [N]: [N, C - 1]."""
    classes = torch.arange(logits.shape[1] - 1, device=logits.device)
    return logits.gather(1, classes + (classes >= labels[:, None]))


@in_float32
def target_and_rest(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return logits of two classes, the label and all others, as the softmax at T adds them up.

    ``logits`` is [N, C], ``labels`` [N]. Returns [N, 2], float32, already divided by T.
    """
    softened = logits / temperature
    target = softened.gather(1, labels[:, None])
    rest = other_classes(softened, labels).logsumexp(1, keepdim=True)
    return torch.cat([target, rest], dim=1)


def tckd_rows(logits: Logits, temperature: float) -> Tensor:
    """Return T^2 times the divergence of the probabilities of the label and the rest, [N].

    TCKD of equation 6; ``softened_kl`` = TCKD + (1 - p_t) NCKD, with p_t the teacher's probability
    of the label at T.
    """
    student, teacher = (
        target_and_rest(each, logits.labels, temperature)
        for each in (logits.student, logits.teacher)
    )
    return softened_kl(student, teacher, 1) * temperature**2


def nckd_rows(logits: Logits, temperature: float) -> Tensor:
    """Return T^2 times the divergence among the classes other than the label, [N]: NCKD."""
    student, teacher = (
        other_classes(each, logits.labels) for each in (logits.student, logits.teacher)
    )
    return softened_kl(student, teacher, temperature)


class DKD(KD):
    """KD in two terms with weights of their own: the label against the rest, and the rest."""

    terms = ("ce", "tckd", "nckd")

    def __init__(self, networks: Networks, *, warmup: ShareOfAny, **shared: Any) -> None:
        super().__init__(networks, **shared)
        self.warmup = {"tckd": warmup, "nckd": warmup}

    def logit_terms(self, logits: Logits) -> dict[str, Tensor]:
        """Return ``tckd`` and ``nckd``, whose weights are alpha and beta of the paper."""
        return {
            "tckd": tckd_rows(logits, self.temperature).mean(),
            "nckd": nckd_rows(logits, self.temperature).mean(),
        }
