"""FT: Kim, Park, Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer",
NeurIPS 2018, section 3.

In a first phase a paraphraser, an autoencoder, learns to encode the teacher's last map in fewer
channels, its factor. Then a translator, trained with the student, learns to compute the same factor
from the student's last map.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sskd.data import Batch
from sskd.methods.adapters import pool_to_smaller
from sskd.methods.base import LossOutput, Phase, in_float32
from sskd.methods.kd import KD, Outputs
from sskd.methods.networks import Networks
from sskd.schedule import PhaseSettings
from sskd.settings import Multiple

# The paraphrase rate k, a share of the teacher's channels. Memory grows with its square.
Rate = Annotated[Multiple, Field(le=4)]


def unit_factor(factor: Tensor) -> Tensor:
    """Return the mean of the squared channels of [B, c, h, w], as unit vectors [B, h * w].

    The square is the CRD benchmark's p1 = 2.
    """
    return F.normalize(factor.square().mean(1).flatten(1), dim=1)


@in_float32
def ft_loss(student_factor: Tensor, teacher_factor: Tensor) -> Tensor:
    """Return the mean absolute difference (the CRD benchmark's p2 = 1) of two unit factors.

    The paper (section 3.2) normalises the factors themselves; the CRD benchmark, and this, reduce
    their channels first. The factors are [B, c, h, w]; the larger is average-pooled to the smaller.
    Returns a scalar, float32.
    """
    student_factor, teacher_factor = pool_to_smaller(student_factor, teacher_factor)
    return F.l1_loss(unit_factor(student_factor), unit_factor(teacher_factor))


def _layers(kind: type[nn.Module], channels: list[int], *, batch_norm: bool) -> nn.Sequential:
    """Return 3x3 (transposed) convolutions between ``channels``, each with a leaky ReLU."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(channels):
        layers.append(kind(before, after, 3, padding=1))
        if batch_norm:
            layers.append(nn.BatchNorm2d(after))
        layers.append(nn.LeakyReLU(0.1))
    return nn.Sequential(*layers)


class Paraphraser(nn.Module):
    """An autoencoder of maps of ``channels``; its code, the factor, has ``factor_channels``."""

    def __init__(self, channels: int, factor_channels: int) -> None:
        super().__init__()
        widths = [channels, channels, factor_channels, factor_channels]
        self.encoder = _layers(nn.Conv2d, widths, batch_norm=False)
        self.decoder = _layers(nn.ConvTranspose2d, widths[::-1], batch_norm=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Return ``maps`` [B, c, h, w], reconstructed from their factor."""
        reconstructed: Tensor = self.decoder(self.encoder(maps))
        return reconstructed


class FT(KD):
    """Compare the student's translated factor with the teacher's paraphrased one."""

    terms = (*KD.terms, "ft")
    teacher_outputs = (*KD.teacher_outputs, "stages")

    def __init__(
        self, networks: Networks, *, rate: Rate, paraphraser: PhaseSettings, **shared: Any
    ) -> None:
        super().__init__(networks, **shared)
        self.rate = rate
        self.phase_settings = paraphraser
        student, teacher = (features.stages[-1].shape[1] for features in networks.probe())
        factor = max(1, int(rate * teacher))
        # The paraphraser comes first: its initial weights must not depend on the student.
        self.paraphraser = Paraphraser(teacher, factor)
        self.translator = _layers(nn.Conv2d, [student, student, factor, factor], batch_norm=True)
        self.adapters = (self.translator,)

    def phases(self) -> Iterable[Phase]:
        """Yield the paraphraser's phase, then the main phase.

        Students whose paraphrasers have the same learning rate share the first.
        """
        yield Phase(
            "paraphraser",
            trains=self.paraphraser,
            loss=self.reconstruction_loss,
            weights={"reconstruction": 1.0},
            schedule=self.phase_settings,
            teacher_only=True,
            settings={"rate": self.rate},
        )
        yield from super().phases()

    def reconstruction_loss(self, batch: Batch) -> LossOutput:
        """Return ``reconstruction``, the paraphraser's mean squared error (section 3.1)."""
        with torch.no_grad():
            maps = self.teacher(batch.x).stages[-1]
        loss = F.mse_loss(self.paraphraser(maps).float(), maps.float())
        return LossOutput({"reconstruction": loss}, {})

    def feature_terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """Return ``ft``."""
        student_factor = self.translator(outputs.student.stages[-1])
        with torch.no_grad():
            teacher_factor = self.paraphraser.encoder(outputs.teacher.stages[-1])
        return {"ft": ft_loss(student_factor, teacher_factor)}
