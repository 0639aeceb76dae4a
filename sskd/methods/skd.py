"""SKD: Jeong et al., "Streamlined Knowledge Distillation", CVPR 2026.

The losses of the authors' code (HyunJunSik/StreamLined) are not the paper's. ``variant`` chooses
between them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from sskd.methods.base import in_float32, unit_vectors
from sskd.methods.kd import KD, Logits, kd_loss
from sskd.methods.low_confidence import low_confidence_shares
from sskd.methods.networks import Networks
from sskd.settings import EARLY, LARGEST, LATE

Variant = Literal["code", "paper"]
# Below, the rounding of float32 decides the length, and the covariance may have no Cholesky factor.
Ridge = Annotated[float, Field(ge=1e-4, le=LARGEST, allow_inf_nan=False), EARLY, LATE]


@in_float32
def direction_differences(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the Gram matrix of the student's unit logits minus the teacher's, [B, B].

    Both are logits [B, C].
    """
    one, other = unit_vectors(student), unit_vectors(teacher)
    return one @ one.T - other @ other.T


@in_float32
def mahalanobis_length(rows: Tensor, ridge: float) -> Tensor:
    """Return the mean Mahalanobis length of ``rows`` [N, K], a scalar.

    The covariance is that of the rows, [K, K], plus ``ridge`` on its diagonal. That of one row is
    0. As in the authors' code, the gradient includes that of the covariance.
    """
    centred = rows - rows.mean(0)
    covariance = centred.T @ centred / max(len(rows) - 1, 1)
    ridged = covariance + ridge * torch.eye(rows.shape[1], device=rows.device)
    # cholesky itself would wait for the device.
    factor = torch.linalg.cholesky_ex(ridged, check_errors=False).L
    # The gradient of a norm of 0 is 0; that of a square root would be infinite.
    return torch.linalg.solve_triangular(factor, rows.T, upper=False).norm(dim=0).mean()


def code_terms(
    student: Tensor, teacher: Tensor, temperature: float, ridge: float
) -> dict[str, Tensor]:
    """Return the terms as the authors' code computes them, from logits [B, C].

    Masks of low-confidence images and classes scale the terms by the share that they keep, as in
    MLLD, and the Gram matrices are divided by the number of classes.
    """
    images, classes = low_confidence_shares(teacher)
    differences = direction_differences(student, teacher) / student.shape[1]
    return {
        "kd": images * kd_loss(student, teacher, temperature),
        "direction": classes * mahalanobis_length(differences, ridge),
    }


def paper_terms(
    student: Tensor, teacher: Tensor, temperature: float, ridge: float
) -> dict[str, Tensor]:
    """Return the terms by the paper's equations, without masks, from logits [B, C]."""
    differences = direction_differences(student, teacher)
    return {
        "kd": kd_loss(student, teacher, temperature),
        "direction": mahalanobis_length(differences, ridge),
    }


VARIANTS: dict[str, Callable[[Tensor, Tensor, float, float], dict[str, Tensor]]] = {
    "code": code_terms,
    "paper": paper_terms,
}


class SKD(KD):
    """Learn the teacher's predictions, and the angles between the logits of a batch's images."""

    terms = ("ce", "kd", "direction")

    def __init__(
        self, networks: Networks, *, ridge: Ridge, variant: Variant, **shared: Any
    ) -> None:
        super().__init__(networks, **shared)
        self.ridge = ridge
        self.terms_of = VARIANTS[variant]

    def logit_terms(self, logits: Logits) -> dict[str, Tensor]:
        """Return ``kd`` and ``direction``."""
        student, teacher = self.whole(logits.student, logits.teacher)
        return self.terms_of(student, teacher, self.temperature, self.ridge)
