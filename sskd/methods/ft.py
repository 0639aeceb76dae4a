"""FT: Kim, Park, Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer",
NeurIPS 2018, section 3.

In a first phase a paraphraser learns to put the teacher's last map into fewer channels, its
factor; a translator then learns the same factor from the student's map, beside the student.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sskd.data import Batch, Images
from sskd.methods.adapters import pool_to_smaller, probe_features
from sskd.methods.at import attention
from sskd.methods.base import LossOutput, Phase, in_float32
from sskd.methods.kd import KD
from sskd.models import Features
from sskd.schedule import PhaseSettings
from sskd.settings import Multiple

# Of the teacher's channels; the memory grows with its square.
Rate = Annotated[Multiple, Field(le=4)]


@in_float32
def ft_loss(student_factor: Tensor, teacher_factor: Tensor) -> Tensor:
    """Return the mean absolute difference of two factors' attention, as in the CRD benchmark.

    The paper (section 3.2) normalises the factors themselves; here each, [B, c, h, w], is first
    reduced to the mean square of its channels. The larger is average-pooled to the smaller. A
    scalar, float32.
    """
    student_factor, teacher_factor = pool_to_smaller(student_factor, teacher_factor)
    return F.l1_loss(attention(student_factor), attention(teacher_factor))


def _layers(kind: type[nn.Module], channels: list[int], *, normalised: bool) -> nn.Sequential:
    """Return 3x3 (transposed) convolutions between ``channels``, each with a leaky ReLU."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(channels):
        layers.append(kind(before, after, 3, padding=1))
        if normalised:
            layers.append(nn.BatchNorm2d(after))
        layers.append(nn.LeakyReLU(0.1))
    return nn.Sequential(*layers)


class Paraphraser(nn.Module):
    """An autoencoder of maps of ``channels``, whose code, the factor, has ``factor_channels``."""

    def __init__(self, channels: int, factor_channels: int) -> None:
        super().__init__()
        widths = [channels, channels, factor_channels, factor_channels]
        self.encoder = _layers(nn.Conv2d, widths, normalised=False)
        self.decoder = _layers(nn.ConvTranspose2d, widths[::-1], normalised=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Return ``maps`` [B, c, h, w] as they are reconstructed from their factor."""
        reconstructed: Tensor = self.decoder(self.encoder(maps))
        return reconstructed


class FT(KD):
    """Learn the teacher's paraphrased factor beside its logits."""

    terms = (*KD.terms, "ft")
    teacher_outputs = (*KD.teacher_outputs, "stages")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        data: Images,
        *,
        rate: Rate,
        paraphraser: PhaseSettings,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.rate = rate
        self.phase = paraphraser
        ours = probe_features(student, data).stages[-1].shape[1]
        theirs = probe_features(teacher, data).stages[-1].shape[1]
        factor = max(1, int(rate * theirs))
        # The paraphraser comes first: its initial weights must not depend on the student.
        self.paraphraser = Paraphraser(theirs, factor)
        self.translator = _layers(nn.Conv2d, [ours, ours, factor, factor], normalised=True)
        self.adapters = (self.translator,)

    def phases(self) -> Iterable[Phase]:
        """Yield the paraphraser's phase, shared by students of one learning rate, then the rest."""
        yield Phase(
            "paraphraser",
            self.paraphraser,
            self.reconstruction_loss,
            {"reconstruction": 1.0},
            schedule=self.phase,
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

    def feature_terms(
        self, student: Features, teacher: Features, batch: Batch
    ) -> dict[str, Tensor]:
        """Return ``ft``."""
        factor = self.translator(student.stages[-1])
        with torch.no_grad():
            wanted = self.paraphraser.encoder(teacher.stages[-1])
        return {"ft": ft_loss(factor, wanted)}
